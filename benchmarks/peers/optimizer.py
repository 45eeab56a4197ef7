"""torch's fused AdamW on the factors of an adapter, a process of its own:

    python -m benchmarks.peers.optimizer '[[2560, 16], [16, 640], ...]'

prints one JSON line: the device's and the host's time of a step on f32 parameters with f32
gradients, and of the same followed by the copy to bf16, which the project's step has in it.
"""

from __future__ import annotations

import json
import sys
import time

import torch

from .torch_timing import measure


def main() -> int:
    shapes = json.loads(sys.argv[1])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    gpu = device == "cuda"
    parameters = [torch.nn.Parameter(torch.randn(*s, device=device)) for s in shapes]
    for p in parameters:
        p.grad = torch.randn_like(p)
    # capturable: the step number lies on the device, as a captured step needs it.
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True, capturable=gpu)
    rounded = [p.detach().bfloat16() for p in parameters]

    def step():
        optimizer.step()

    def both():
        optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(rounded, parameters)

    row = {"version": torch.__version__}
    for name, run in (("step", step), ("step_and_copy", both)):
        found = measure(run, device)
        row |= {f"{name}_{key}": value for key, value in found.items()}
        row[f"{name}_wall_us"] = _wall_us(run, gpu)
    print(json.dumps(row))
    return 0


def _wall_us(run, gpu: bool, repeats: int = 20) -> float:
    """Of eager calls in a row, the device's end awaited once."""
    for timed in (False, True):
        if gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(repeats if timed else 3):
            run()
        if gpu:
            torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats * 1e6


if __name__ == "__main__":
    raise SystemExit(main())
