"""Launches whose blocks wait for each other, and so have to run at once."""

from __future__ import annotations

from ..kernels import Kernel

_TOO_LARGE = 720  # the driver's number for a cooperative launch that has no room
_refused: set[int] = set()  # devices


def launched(kernel: Kernel, grid: tuple, block: tuple, *args, shared: int) -> bool:
    """Launch; False where the driver has no room for all blocks at once, as under MPS with a share
    of the multiprocessors. `refused` says so from then on."""
    import cupy

    try:
        kernel(grid, block, *args, shared=shared, together=True)
    except cupy.cuda.driver.CUDADriverError as error:
        if error.status != _TOO_LARGE:
            raise
        _refused.add(cupy.cuda.runtime.getDevice())
        return False
    return True


def refused() -> bool:
    """Whether the current device had no room once."""
    import cupy

    return cupy.cuda.runtime.getDevice() in _refused
