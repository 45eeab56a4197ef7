"""Recipes: which layers of a network get which adapters, with this project's words or LyCORIS's.

report = engine.add("style", "lokr", [":attention", "proj"], rank=8, factor=4)
report = engine.add("style", Recipe.from_table(table))      # one of a TOML file, say
print(report.text())
"""

from .added import AddedLayer
from .matching import Matching, Selected, Skipped, match
from .memory import Memory, activation_bytes
from .presets import PRESETS, Preset
from .recipe import Recipe
from .report import AddReport
from .selectors import GROUPS
from .statement import Settings, Statement

__all__ = [
    "AddReport",
    "AddedLayer",
    "GROUPS",
    "Matching",
    "Memory",
    "PRESETS",
    "Preset",
    "Recipe",
    "Selected",
    "Settings",
    "Skipped",
    "Statement",
    "activation_bytes",
    "match",
]
