"""The bare convolution by cuDNN: forward and input gradient of an NHWC bf16 convolution on CuPy
arrays, sums in f32, through the graph API of `nvidia-cudnn-frontend` (the extra `cudnn`).

Every plan of heuristics A and of the fallback list that builds (within MOST_SECONDS) is timed; the
fastest counts. cuDNN gets its weight as (OC, KH, KW, IC), its favourite layout, and adds no bias:
both favour it.
"""

from __future__ import annotations

import time
from importlib.util import find_spec

from . import timing
from .case import Case

MOST_WORKSPACE = 1 << 30  # bytes; a plan that wants more is no yardstick
MOST_SECONDS = 6.0  # for building and timing plans, the heuristics' best first


def available() -> bool:
    return find_spec("cudnn") is not None


class Convolution:
    """'forward' or 'dx' of a case's convolution: call it to run the fastest plan.

    name: the plan. plans: how many were timed. result: what it writes.
    """

    def __init__(self, case: Case, what: str):
        import cudnn
        import cupy

        self._cupy, self._cudnn = cupy, cudnn
        self._handle = cudnn.create_handle()
        bits = case.layer.weight.view(cupy.uint16)
        weight = cupy.ascontiguousarray(cupy.moveaxis(bits, -1, 0))  # (OC, KH, KW, IC)
        source = case.x if what == "forward" else case.dy
        self.result = cupy.empty_like(case.dy if what == "forward" else case.x)
        bf16, f32 = cudnn.data_type.BFLOAT16, cudnn.data_type.FLOAT
        graph = cudnn.pygraph(
            handle=self._handle,
            io_data_type=bf16,
            intermediate_data_type=f32,
            compute_data_type=f32,
        )
        window = case.layer.window
        walk = {
            "padding": list(window.padding),
            "stride": list(window.stride),
            "dilation": list(window.dilation),
        }
        a = graph.tensor(name="a", data_type=bf16, **_channels_first(source))
        w = graph.tensor(name="w", data_type=bf16, **_channels_first(weight))
        if what == "forward":
            y = graph.conv_fprop(image=a, weight=w, **walk)
        else:
            y = graph.conv_dgrad(loss=a, filter=w, **walk)
            y.set_dim(_channels_first(self.result)["dim"])
        y.set_output(True).set_data_type(bf16)
        y.set_stride(_channels_first(self.result)["stride"])
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        graph.check_support()
        self._graph, self._kept = graph, (source, weight)
        self._pack = {
            a: source.data.ptr,
            w: weight.data.ptr,
            y: self.result.data.ptr,
        }
        self._choose()

    def _choose(self) -> None:
        graph, times, refused = self._graph, {}, []
        end = time.monotonic() + MOST_SECONDS
        for index in range(graph.get_execution_plan_count()):
            if times and time.monotonic() > end:
                break
            try:
                graph.build_plan_at_index(index)
                size = graph.get_workspace_size_plan_at_index(index)
                if size > MOST_WORKSPACE:
                    continue
                self._index, self._workspace = index, self._cupy.empty(max(size, 1), "uint8")
                times[index] = timing.device_us(self, 5)
            except Exception as error:  # a plan that does not build or run here is not one
                refused.append(f"plan {index}: {error}")
        if not times:
            raise RuntimeError(f"cuDNN has no plan: {'; '.join(refused)[:300]}")
        self._index = min(times, key=times.__getitem__)
        size = graph.get_workspace_size_plan_at_index(self._index)
        self._workspace = self._cupy.empty(max(size, 1), "uint8")
        self.plans, self.name = len(times), graph.get_plan_name_at_index(self._index)

    def __call__(self):
        stream = self._cupy.cuda.get_current_stream().ptr
        self._cudnn.set_stream(handle=self._handle, stream=stream)
        self._graph.execute_plan_at_index(
            self._pack, self._workspace.data.ptr, self._index, handle=self._handle
        )
        return self.result


def bare(case: Case) -> dict:
    """'forward' and 'step' (forward and dx) of the convolution, and the plans' names."""
    forward, dx = Convolution(case, "forward"), Convolution(case, "dx")
    return {
        "forward": forward,
        "step": lambda: (forward(), dx()),
        "plans": f"{forward.name} (of {forward.plans}); {dx.name} (of {dx.plans})",
    }


def _channels_first(array) -> dict:
    """dim and stride, in elements, in cuDNN's order of axes: (N, C, *space)."""
    strides = [s // array.itemsize for s in array.strides]
    order = [0, array.ndim - 1, *range(1, array.ndim - 1)]
    return {"dim": [array.shape[i] for i in order], "stride": [strides[i] for i in order]}
