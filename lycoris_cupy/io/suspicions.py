"""What looks wrong in an adapter: values that no training leaves behind."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..adapters import Adapter
from ..svd import Svd

DEAD = 1e-6  # of the largest singular value: a direction that carries nothing
HUGE_VALUE = 1e3  # factors are of order 1; f16 ends at 65504
HUGE_SHARE = 1.0  # a change as large as the weight itself
OUTLIER = 50.0  # times the median norm of the file's layers
ODD_SCALE = 16.0  # alpha / rank is 1 or less in most recipes


def suspicions(
    adapter: Adapter,
    params: Mapping[str, np.ndarray],
    svd: Svd | None,
    relative: float | None,
    median: float,
) -> list[str]:
    """One phrase a suspicion. svd: of the change, if known; relative: |dW| / |W|; median: of the
    norms of the file.
    """
    out = []
    empty = [name for name, value in params.items() if value.size and not value.any()]
    if svd is not None and svd.norm == 0:
        why = f" ({', '.join(empty)} is all zero)" if empty else ""
        out.append(f"changes nothing{why}: untrained?")
    elif empty:
        out.append(f"{', '.join(empty)} is all zero")
    if svd is not None and svd.norm and adapter.has_rank:
        alive = int((svd.values > DEAD * svd.values[0]).sum())
        most = min(adapter.rank, svd.values.size)
        if alive < most:
            out.append(f"{most - alive} of {most} ranks carry nothing")
    largest = max((_largest(value) for value in params.values()), default=0.0)
    if largest > HUGE_VALUE:
        out.append(f"a factor has a value of {largest:.3g}")
    if relative is not None and relative > HUGE_SHARE:
        out.append(f"the change is {relative:.3g} times the weight")
    elif svd is not None and median and svd.norm > OUTLIER * median:
        out.append(f"the change is {svd.norm / median:.3g} times that of the median layer")
    scale = adapter.reported_scale
    if abs(scale) > ODD_SCALE:
        out.append(f"a scale of {scale:g}")
    if scale < 0:
        out.append(f"a negative scale, {scale:g}")
    return out


def _largest(value: np.ndarray) -> float:
    return float(np.abs(value.astype(np.float64)).max()) if value.size else 0.0
