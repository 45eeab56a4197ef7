"""The launches of a training step on a GPU, counted where there is none: the host code runs dry."""

from unittest import mock

from benchmarks.adapters import adapters
from benchmarks.shapes import Shape
from lycoris_cupy import gemm
from lycoris_cupy.kernels import Kernel
from tests.dry_gpu import dry_gpu
from tests.test_held import adapted, on_device, step


def launches(shape: Shape, name: str) -> list[str]:
    """Of the layer with the adapter that `benchmarks.adapters` names so: the kernels in order, and
    'library' for each call of cuBLASLt."""
    launched, call = [], Kernel.__call__

    def counted(self, *args, **more):
        launched.append(self.op)
        return call(self, *args, **more)

    with dry_gpu(90) as device:
        layer, x, dy = on_device(shape, device)
        engine = adapted(layer, adapters(shape.layer)[name], device)
        with mock.patch.object(Kernel, "__call__", counted):
            gemm.library().matmul = lambda *args: launched.append("library")
            step(engine, x, dy)()
    return launched
