"""The yardstick for linear layers: a LoRA as a plain composition of cuBLASLt products, captured.

Forward: y = x @ W + b; h = x @ down; y += s h @ up. Step, with h kept: dx = dy @ W^T;
dh = s dy @ up^T; dx += dh @ down^T; d_up = s h^T @ dy; d_down = x^T @ dh. Also the bare layer by
cuBLASLt alone: y and dx.
"""

from __future__ import annotations

import numpy as np

from lycoris_cupy.gemm import gemm

from .case import Case


def bare(case: Case) -> dict:
    """'forward' and 'step' of the layer without adapters; for a layer of one tap."""
    weight, bias = case.layer.matrix[0], case.layer.bias
    x, dy = _rows(case.x), _rows(case.dy)

    def step():
        return gemm(x, weight, bias=bias), gemm(dy, weight, transpose_b=True)

    return {"forward": lambda: gemm(x, weight, bias=bias), "step": step}


def composition(case: Case, engine) -> dict:
    """'forward' and 'step' of the layer with the engine's LoRA 'a0'."""
    weight, bias = case.layer.matrix[0], case.layer.bias
    p = engine.parameters("a0")["layer"]
    down, up = (p[n].reshape(p[n].shape[-2:]) for n in ("down", "up"))
    scale = engine.attachments["a0"].scales["layer"]
    x, dy = _rows(case.x), _rows(case.dy)

    def outputs():
        y, h = gemm(x, weight, bias=bias), gemm(x, down)
        return gemm(h, up, scale=scale, add=y, out=y), h

    def forward():
        return outputs()[0]

    def step():
        y, h = outputs()
        dh = gemm(dy, up, transpose_b=True, scale=scale)
        dx = gemm(dy, weight, transpose_b=True)
        gemm(dh, down, transpose_b=True, add=dx, out=dx)
        d_up = gemm(h, dy, transpose_a=True, scale=scale, dtype=np.float32)
        d_down = gemm(x, dh, transpose_a=True, dtype=np.float32)
        grads = {"down": d_down.reshape(p["down"].shape), "up": d_up.reshape(p["up"].shape)}
        return y, (dx, {"a0": {"layer": grads}})

    return {"forward": forward, "step": step}


def _rows(a):
    return a.reshape(-1, a.shape[-1])
