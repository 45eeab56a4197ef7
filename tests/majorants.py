"""Rotations and T-LoRA written from their definitions in f64, and what their rounding errors are
measured against: the same sums over absolute values, with the transforms as they are.
"""

from __future__ import annotations

import numpy as np

from lycoris_cupy.adapters import BOFT, DiagOFT, PeftBOFT, PeftOFT, TLoRA
from lycoris_cupy.ops import product, product_dw, product_dx

ON_INPUT = (PeftOFT, PeftBOFT)
NONLINEAR = (DiagOFT, BOFT, TLoRA, *ON_INPUT)


def skew(adapter, blocks):
    """(Q after the limit, what the limit multiplied it by, its norm before)."""
    q = blocks - np.swapaxes(blocks, -1, -2)
    norm = float(np.sqrt((q**2).sum()))
    limit = adapter.limit
    share = 1.0 if limit is None else min(1.0, limit / (norm + 1e-8))
    return q * share, share, norm


def places(adapter, stage):
    """Where each output stands when the blocks of a stage are taken: (blocks, B)."""
    outputs, size = adapter.shape.outputs, adapter.block_size
    if isinstance(adapter, DiagOFT):
        return np.arange(outputs).reshape(-1, size)
    half = 2**stage * size // 2
    at = np.empty(outputs, int)
    for o in range(outputs):
        a, t, j = o // (2 * half), o // half % 2, o % half
        at[(a * half + j) * 2 + t] = o
    return at.reshape(-1, size)


def stages(adapter, factors):
    """(places, rotation less identity as rows turn: v' = v + v @ e) of each stage."""
    q = skew(adapter, factors["blocks"])[0]
    q = q[None] if q.ndim == 3 else q
    eye = np.eye(adapter.block_size)
    out = []
    for stage, blocks in enumerate(q):
        e = np.array([(eye + k) @ np.linalg.inv(eye - k) - eye for k in blocks])
        turned = isinstance(adapter, BOFT)  # it applies R to columns, Diag-OFT R^T
        out.append((places(adapter, stage), np.swapaxes(e, 1, 2) if turned else e))
    return out


def dense(at, e, outputs):
    """The (OUT, OUT) matrix that turns rows by blocks e at these places."""
    out = np.zeros((outputs, outputs))
    for place, block in zip(at, e, strict=True):
        out[np.ix_(place, place)] = block
    return out


def turn_of_inputs(adapter, factors):
    """(Q, the change of R) of each block, so that PEFT's weight is c (W + e W) with inputs in the
    rows; BOFT's R multiplies from the other side in its own order.
    """
    size, eye = adapter.block_size, np.eye(adapter.block_size)
    blocks = factors["blocks"]
    if isinstance(adapter, PeftBOFT):
        q = (blocks[0] - np.swapaxes(blocks[0], 1, 2)) / 2
        e = np.array([(eye + k) @ np.linalg.inv(eye - k) - eye for k in q])
        return q, np.swapaxes(e, 1, 2)
    q = np.zeros((blocks.shape[0], size, size))
    q[:, *np.triu_indices(size, 1)] = blocks
    q = q - np.swapaxes(q, 1, 2)
    if adapter.terms == 5:
        e = np.array([2 * k + 2 * k @ k + 2 * k @ k @ k + k @ k @ k @ k for k in q])
    elif adapter.terms == 3:
        e = np.array([2 * k + 2 * k @ k + k @ k @ k for k in q])
    else:
        e = np.array([(eye - k) @ np.linalg.inv(eye + k) - eye for k in q])
    if adapter.shared:
        q, e = (np.repeat(a, adapter.blocks, 0) for a in (q, e))
    return q, e


def _by_inputs(adapter, e):
    """The blocks as one (IN, IN) matrix."""
    at = np.arange(adapter.shape.inputs).reshape(-1, adapter.block_size)
    return dense(at, e, adapter.shape.inputs)


def rescale_of(adapter, factors):
    return factors["rescale"] if adapter.rescaled else np.ones(adapter.shape.outputs)


def triplets(adapter, matrix, factors):
    """((q, lambda, p) trained, the same of the weight's own largest singular values)."""
    u, values, v = np.linalg.svd(matrix[0], full_matrices=False)
    r = adapter.rank
    pad = max(r - values.size, 0)
    first = (
        np.pad(u[:, :r], ((0, 0), (0, pad))),
        np.pad(values[:r], (0, pad), constant_values=1e-6),
        np.pad(v[:r], ((0, pad), (0, 0))),
    )
    inputs, outputs = matrix.shape[1:]
    q, p = factors["q"].reshape(inputs, r), factors["p"].reshape(r, outputs)
    return (q, factors["lambda"], p), first


def adapted(matrix, adapter, factors, strength):
    """The weight, (taps, IN, OUT), with this adapter."""
    if isinstance(adapter, TLoRA):
        one, other = ((q * middle) @ p for q, middle, p in triplets(adapter, matrix, factors))
        return matrix + strength * adapter.scale * (one - other)
    reference, v = adapter.rule == "reference", matrix
    if isinstance(adapter, ON_INPUT):
        e = _by_inputs(adapter, turn_of_inputs(adapter, factors)[1])
        v = (v + (strength if reference else 1) * e @ v) * rescale_of(adapter, factors)
        return v if reference else matrix + strength * (v - matrix)
    for at, e in stages(adapter, factors):
        v = v + (strength if reference else 1) * v @ dense(at, e, matrix.shape[-1])
    v = v * rescale_of(adapter, factors)
    return v if reference else matrix + strength * (v - matrix)


def _turned(matrix, adapter, factors, strength):
    """(the weight before each stage and after all, each stage's |e|), over absolute values."""
    s = abs(strength) if adapter.rule == "reference" else 1.0
    if isinstance(adapter, ON_INPUT):
        e = np.abs(_by_inputs(adapter, turn_of_inputs(adapter, factors)[1]))
        return [], np.abs(matrix) + s * e @ np.abs(matrix), []
    v, kept, found = np.abs(matrix), [], []
    for at, e in stages(adapter, factors):
        kept.append(v)
        found.append((at, s * np.abs(e)))
        v = v + v @ dense(at, s * np.abs(e), matrix.shape[-1])
    return kept, v, found


def weight_size(matrix, adapter, factors, strength):
    """The adapted weight as a sum of absolute values."""
    if isinstance(adapter, TLoRA):
        parts = triplets(adapter, matrix, factors)
        both = [(np.abs(q) * np.abs(middle)) @ np.abs(p) for q, middle, p in parts]
        return np.abs(matrix) + abs(strength * adapter.scale) * (both[0] + both[1])
    _, v, _ = _turned(matrix, adapter, factors, strength)
    c = np.abs(rescale_of(adapter, factors))
    s = 1.0 if adapter.rule == "reference" else abs(strength)
    return np.abs(matrix) + s * (v * c + np.abs(matrix))


def sizes(layer, adapter, factors, x, dy, strength):
    """(y, dx, gradient of each factor, weight), as sums of absolute values."""
    matrix, window = layer.matrix, layer.window
    weight = weight_size(matrix, adapter, factors, strength)
    bias = None if layer.bias is None else np.abs(layer.bias)
    x, dy = np.abs(x), np.abs(dy)
    space = x.shape[1:-1] if window.axes else ()
    g = product_dw(x, dy, window)
    run = _tlora_gradients if isinstance(adapter, TLoRA) else _rotation_gradients
    run = _input_gradients if isinstance(adapter, ON_INPUT) else run
    grads = run(matrix, adapter, factors, g, abs(strength))
    grads = {name: value.reshape(factors[name].shape) for name, value in grads.items()}
    y = product(x, weight, window, bias=bias)
    if bias is not None and isinstance(adapter, (DiagOFT, BOFT)):
        # The bias is turned with the layer's output, and taken out again.
        y = y + weight_size(bias.reshape(1, 1, -1), adapter, factors, strength).reshape(-1)
    return y, product_dx(dy, weight, window, space), grads, weight


def _tlora_gradients(matrix, adapter, factors, g, strength):
    (q, middle, p), _ = (
        [np.abs(part) for part in parts] for parts in triplets(adapter, matrix, factors)
    )
    g = g[0] * strength * abs(adapter.scale)
    return {
        "q": g @ p.T * middle,
        "lambda": np.einsum("ir,io,ro->r", q, g, p),
        "p": (q * middle).T @ g,
    }


def _input_gradients(matrix, adapter, factors, g, strength):
    q, e = (np.abs(a) for a in turn_of_inputs(adapter, factors))
    c = np.abs(rescale_of(adapter, factors))
    w, g = np.abs(matrix[0]), g[0] * strength
    out = {}
    if adapter.rescaled:
        out["rescale"] = (g * (w + _by_inputs(adapter, e) @ w)).sum(axis=0)
    full, size = (g * c) @ w.T, adapter.block_size
    at = np.arange(adapter.shape.inputs).reshape(-1, size)
    ge = np.array([full[np.ix_(place, place)] for place in at])
    # Of any function whose derivative has the powers of Q on both sides, each at most twice.
    powers = np.eye(size) + q + q @ q + q @ q @ q + e
    both = ge + np.swapaxes(ge, 1, 2)
    h = 2 * np.swapaxes(powers, 1, 2) @ both @ np.swapaxes(powers, 1, 2)
    h = h + np.swapaxes(h, 1, 2)
    if isinstance(adapter, PeftBOFT):
        return {**out, "blocks": h[None]}
    h = h.sum(axis=0, keepdims=True) if adapter.shared else h
    return {**out, "blocks": h[:, *np.triu_indices(size, 1)]}


def _rotation_gradients(matrix, adapter, factors, g, strength):
    kept, v, found = _turned(matrix, adapter, factors, strength)
    c = np.abs(rescale_of(adapter, factors))
    outer = 1.0 if adapter.rule == "reference" else strength
    inner = strength if adapter.rule == "reference" else 1.0
    rows = g.reshape(-1, g.shape[-1]) * outer
    out = {"rescale": (rows * v.reshape(rows.shape)).sum(axis=0)} if adapter.rescaled else {}
    rows = rows * c
    by_stage = []
    for before, (at, e) in zip(kept[::-1], found[::-1], strict=True):
        full = before.reshape(rows.shape).T @ rows * inner
        ge = np.array([full[np.ix_(place, place)] for place in at])
        # |(I - Q)^-1| = |I + e / 2|, on both sides of the flow.
        inverse = np.eye(adapter.block_size) + np.abs(e) / (2 * max(inner, 1e-3))
        h = (
            2
            * np.swapaxes(inverse, 1, 2)
            @ (ge + np.swapaxes(ge, 1, 2))
            @ np.swapaxes(inverse, 1, 2)
        )
        by_stage.append(h + np.swapaxes(h, 1, 2))
        rows = rows + rows @ dense(at, e, rows.shape[-1]).T
    da = np.array(by_stage[::-1]).reshape(factors["blocks"].shape)
    q, share, norm = skew(adapter, factors["blocks"])
    if share < 1 and norm:
        q = np.abs(q / share) if share else np.abs(factors["blocks"]) * 2
        da = share * (da + q * (da * q).sum() / norm**2)
    return {**out, "blocks": da + 1e-30}
