"""What is compared: an algorithm, its options, and the rate at which it is trained.

Both sides get the same: ranks, alpha = rank, the factors before the first step, and the rates.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from lycoris_cupy.engine import Engine

ADAPTER = "adapter"


@dataclass(frozen=True)
class Method:
    """algorithm and options: as `Engine.add` takes them. rate: AdamW's greatest."""

    algorithm: str
    rate: float
    options: dict = field(default_factory=dict)

    def on(self, base: Engine, seed: int) -> Engine:
        """An engine of the same layers with a new ADAPTER, which changes nothing yet."""
        engine = Engine(base.layers, base.topology, device=base.device, dtype=base.dtype)
        engine.add(ADAPTER, self.algorithm, seed=seed, **self.options)
        return engine


# Rates by trials of 150 steps of four patches: LoCon reached 26.8 dB at 4e-3, 27.7 at 8e-3, and
# diverged at 1.6e-2; LoHa 26.7 at 3e-3, 27.2 at 6e-3; LoKr 26.4 at 5e-3 and at 1e-2; Full 27.2 at
# 5e-4, 27.1 at 1e-3, 25.8 at 2e-3.
#
# Full trains every weight and bias of the network's convolutions from where they are, which is full
# fine-tuning of them; only the 1088 slopes of its PReLUs stay.
METHODS = {
    "LoCon": Method("locon", 6e-3, {"rank": 8}),
    "LoCon Tucker": Method("locon", 6e-3, {"rank": 16, "tucker": True}),
    "LoHa": Method("loha", 5e-3, {"rank": 8}),
    "LoKr": Method("lokr", 6e-3, {"rank": 16, "factor": 4}),
    "Full": Method("full", 7e-4, {"bias": True}),
}
# In torch alone: every parameter of the network itself, the slopes too, without an adapter.
FINE_TUNING = "fine-tuning"
FINE_TUNING_RATE = METHODS["Full"].rate
