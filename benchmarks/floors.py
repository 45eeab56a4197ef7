"""The two numbers of every measurement, before it: the operations that must be done, and the fewest
bytes that must move (each input read once, each output written once, bf16; factor gradients f32).

    python -m benchmarks.floors      prints the table of benchmarks/NOTES.md

A forward does the base product and each adapter's x2 and x2 @ W2; a step adds the input gradient
and, for every adapter product, the gradients of both its sides. No kernel is much faster than the
larger of the two times.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from lycoris_cupy import Adapter, Full, LoCon, LoHa, LoKr

from .adapters import Group, adapters
from .shapes import SHAPES, Shape

# One H100, as measured: an 8192^3 bf16 product, and a device-to-device copy.
PRODUCT_TFLOP_S, COPY_GB_S = 793.0, 3000.0


@dataclass(frozen=True)
class Floor:
    """flops and bytes of one call."""

    flops: int
    bytes: int

    def us(self, tflop_s: float = PRODUCT_TFLOP_S, gb_s: float = COPY_GB_S) -> float:
        """The time that no version beats."""
        return max(self.flops / tflop_s / 1e6, self.bytes / gb_s / 1e3)

    @property
    def bound(self) -> str:
        """Which of the two it is, at the ceilings above."""
        arithmetic = self.flops / PRODUCT_TFLOP_S / 1e6 >= self.us()
        return "arithmetic" if arithmetic else "bytes"


def inner_width(adapter: Adapter) -> int:
    """Columns of x2: what an adapter's prologue makes of a position of x."""
    if isinstance(adapter, Full):
        return 0  # a second weight over x itself
    if isinstance(adapter, LoHa):
        return adapter.rank**2
    if isinstance(adapter, LoKr):
        rows, _, _, width = adapter.split
        return rows * (width if adapter.w2_rank is None else adapter.w2_rank)
    if isinstance(adapter, LoCon):
        return adapter.rank * (adapter.shape.taps if adapter.per_tap else 1)
    raise TypeError(f"no count for {type(adapter).__name__}")


def multiply_adds(adapter: Adapter) -> int:
    """An output position's, of the cheapest exact way that never builds the change."""
    shape = adapter.shape
    taps, inputs, outputs = shape.taps, shape.inputs, shape.outputs
    if isinstance(adapter, Full):
        return taps * inputs * outputs
    if isinstance(adapter, LoHa):
        return min(adapter.rank**2 * (taps * inputs + outputs), taps * inputs * outputs)
    if isinstance(adapter, LoKr):
        rows, columns, blocks, width = adapter.split
        if adapter.w2_rank is None:
            return rows * blocks * width + taps * outputs * width
        rank = adapter.w2_rank
        down = blocks * rank * taps * (rank if adapter.tucker else width)
        down += inputs * rank if adapter.tucker else 0
        return down + rows * blocks * rank + rank * outputs
    if isinstance(adapter, LoCon):
        if adapter.tucker:
            down = adapter.down_rank * (inputs + taps * adapter.rank)
        else:
            down = taps * inputs * adapter.rank
        return down + inner_width(adapter) * outputs
    raise TypeError(f"no count for {type(adapter).__name__}")


def parameters(adapter: Adapter) -> int:
    """Numbers that an adapter trains."""
    return sum(prod(form.canonical(adapter.shape)) for form in adapter.factors().values())


def floors(shape: Shape, group: Group) -> dict[str, Floor]:
    """'forward' and 'step' of a shape with these adapters, or with none."""
    extra = 2 * shape.positions * sum(map(multiply_adds, group))
    count = sum(map(parameters, group))
    outputs = shape.weight[-1]
    weight, x, y = 2 * prod(shape.weight), 2 * prod(shape.x), 2 * shape.positions * outputs
    forward = weight + x + y + 2 * outputs + 2 * count
    # dx: reads dy and the weight; the factors' gradients read x again.
    backward = weight + y + x + (x + (2 + 4) * count if group else 0)
    return {
        "forward": Floor(shape.flops + extra, forward),
        "step": Floor(2 * shape.flops + 3 * extra, forward + backward),
    }


def step_memory(shape: Shape, group: Group, bare: int) -> int:
    """Bytes that a step may hold: the bare layer's, the f32 gradients, and twice x2 (x2 and dh)."""
    widths = sum(map(inner_width, group))
    rounding = 64 * 512  # CuPy's pool gives each array a multiple of 512 bytes
    return bare + 4 * sum(map(parameters, group)) + 2 * 2 * shape.positions * widths + rounding


def build_bytes(shape: Shape, group: Group) -> int:
    """Of W + dW: the weight read and written, the factors read."""
    return 2 * 2 * prod(shape.weight) + 2 * sum(map(parameters, group))


def table() -> str:
    """Markdown: GFLOP, MB and floor of forward and step, and the step's and forward's ratio to the
    bare layer's floor.
    """
    lines = [
        "| layer | adapter | forward: GFLOP; MB; us | bound | step: GFLOP; MB; us | bound "
        "| over bare: forward; step |",
        "|---|---|---|---|---|---|---|",
    ]
    for shape in SHAPES:
        bare = floors(shape, ())
        for name, group in {"none": (), **adapters(shape.layer)}.items():
            both = floors(shape, group)
            cells = [shape.name if name == "none" else "", name]
            for floor in both.values():
                cells.append(f"{floor.flops / 1e9:.0f}; {floor.bytes / 1e6:.0f}; {floor.us():.0f}")
                cells.append(floor.bound)
            ratios = (both[k].us() / bare[k].us() for k in both)
            cells.append("; ".join(f"{ratio:.2f}" for ratio in ratios))
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
