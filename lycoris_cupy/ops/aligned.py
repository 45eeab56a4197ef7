"""What kernels that move 16 bytes at a time can read."""

from __future__ import annotations

from ..arrays import bf16


def aligned(*arrays) -> bool:
    """Whether each array is None or bf16, contiguous and not empty, with rows and an address of a
    multiple of 16 bytes.
    """
    return all(
        a is None
        or (
            a.dtype == bf16
            and a.flags.c_contiguous
            and a.size > 0
            and a.shape[-1] % 8 == 0
            and a.data.ptr % 16 == 0
        )
        for a in arrays
    )
