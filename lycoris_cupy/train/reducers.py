"""Means over processes: through NCCL on GPUs, through the parent process without any.

`cupyx.distributed` would do for GPUs, but its rendezvous is a server process of its own at a fixed
port, which outlives a rank 0 that is killed. Here the parent, which is there anyway, hands on
NCCL's id, and CuPy's communicator is used as it is.
"""

from __future__ import annotations

import warnings
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from ..arrays import Array, f64, gpu_missing
from ..errors import DeviceError


class ParentReducer:
    """The parent adds up in the order of ranks, so that the result is the same in every run.

    Arrays are NumPy's.
    """

    device = "cpu"

    def __init__(self, connection: Connection, rank: int, size: int):
        self._connection, self.rank, self.size = connection, rank, size

    def mean(self, array: Array) -> None:
        self._connection.send(("mean", array))
        array[...] = self._connection.recv()


class NcclReducer:
    """GPU `rank` of this machine in each process. Nothing waits: the mean is in the stream."""

    def __init__(self, connection: Connection, rank: int, size: int):
        import cupy
        from cupy.cuda import nccl as library

        nccl: Any = library  # its names are those of a compiled module
        self.rank, self.size, self.device = rank, size, f"cuda:{rank}"
        cupy.cuda.Device(rank).use()
        connection.send(("join", nccl.get_unique_id() if rank == 0 else None))
        self._communicator: Any = nccl.NcclCommunicator(size, connection.recv(), rank)
        self._types = {np.dtype("f4"): nccl.NCCL_FLOAT32, f64: nccl.NCCL_FLOAT64}
        self._sum = nccl.NCCL_SUM

    def mean(self, array: Array) -> None:
        import cupy

        place, stream = array.data.ptr, cupy.cuda.get_current_stream().ptr
        kind = self._types[array.dtype]
        self._communicator.allReduce(place, place, array.size, kind, self._sum, stream)
        array *= 1 / self.size


def require_gpus(count: int) -> None:
    """Raise DeviceError unless there are so many GPUs, and NCCL."""
    reason = gpu_missing()
    if reason:
        raise DeviceError(f"{count} GPUs were asked for, but {reason}")
    import cupy

    there = cupy.cuda.runtime.getDeviceCount()
    if there < count:
        raise DeviceError(f"{count} GPUs were asked for, this machine has {there}")
    reason = nccl_missing()
    if reason:
        raise DeviceError(f"{count} GPUs were asked for, but {reason}")


def nccl_missing() -> str:
    """Why NCCL cannot be used, as a clause for a sentence; empty when it can."""
    import cupy

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # CuPy's own word for the same
        from cupy.cuda import nccl
    if getattr(nccl, "available", False):
        return ""
    major = cupy.cuda.runtime.runtimeGetVersion() // 1000
    return f'CuPy cannot load NCCL: python -m pip install "lycoris_cupy[nccl{major}]"'
