"""A training step in torch: forward, mean squared error, backward, AdamW; eager or a CUDA graph.

bf16 is torch.autocast over f32 weights and f32 trained parameters, which is how trainers around
lycoris-lora run it; f32 is everything in f32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from .torch_network import tensor

BETAS, EPS = (0.9, 0.999), 1e-8


class Trainer:
    """`step(low, original)` on tensors of the device; returns the loss, (), not read.

    network: what is run. trained: the parameters that learn. rate: step -> AdamW's rate.
    """

    def __init__(
        self,
        network: Callable,
        trained: Iterable[nn.Parameter],
        rate: Callable[[int], float],
        device: str,
        dtype: str,
    ):
        self.network, self.rate, self.device = network, rate, device
        self.trained, self.steps = list(trained), 0
        gpu = device != "cpu"
        # On the GPU the rate is a tensor, which a captured step reads anew each time.
        self.lr = torch.zeros((), device=device) if gpu else rate(0)
        self.optimizer = torch.optim.AdamW(
            self.trained, self.lr, BETAS, EPS, weight_decay=0.0, fused=True, capturable=gpu
        )
        self.autocast = dtype == "bf16"
        self._replay: Callable | None = None

    def forward(self, low: np.ndarray) -> np.ndarray:
        """A picture (N, H, W, 3) through the network as it is trained: for PSNR and losses."""
        with torch.no_grad(), self._precision():
            y = self.network(self.input(low))
        return y.float().cpu().numpy()

    def input(self, low: np.ndarray) -> torch.Tensor:
        """On the device, f32: bf16 values stay as they are under autocast."""
        return tensor(low).float().to(self.device)

    def step(self, low: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
        lr = self.rate(self.steps)
        if isinstance(self.lr, torch.Tensor):
            self.lr.fill_(lr)
        else:
            self.optimizer.param_groups[0]["lr"] = lr
        self.steps += 1
        return self._once(low, original) if self._replay is None else self._replay(low, original)

    def _once(self, low: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        with self._precision():
            y = self.network(low)
        loss = functional.mse_loss(y.float(), original)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def capture(self, low: torch.Tensor, original: torch.Tensor) -> None:
        """Make every later step a replay of one CUDA graph. RuntimeError, with the reason, where
        the step waits for the device and so cannot be captured; it then stays as it was.
        """
        before = [p.detach().clone() for p in self.trained]
        try:
            self._record(low.clone(), original.clone())
        finally:  # trying it out takes steps; what they change is put back
            with torch.no_grad():
                for p, kept in zip(self.trained, before, strict=True):
                    p.copy_(kept)
                for state in self.optimizer.state.values():
                    for value in state.values():
                        value.zero_()

    def _record(self, low: torch.Tensor, original: torch.Tensor) -> None:
        # Asked before, since a capture that fails spoils the process for what follows.
        self._once(low, original)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            self._once(low, original)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._once(low, original)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self.optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = self._once(low, original)

        def replay(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            low.copy_(x)
            original.copy_(target)
            graph.replay()
            return loss

        self._replay = replay

    def _precision(self):
        if not self.autocast:
            return contextlib.nullcontext()
        # Without the cache of casts, which must not outlive a capture; each weight is read once.
        kind = self.device.split(":")[0]
        return torch.autocast(kind, torch.bfloat16, cache_enabled=False)
