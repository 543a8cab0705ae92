"""Cleaning recipes: YAML whose sections are those of `tnllm.cleaning.settings`.

settings = load_clean_recipe("data/sample", ["dedup.threshold=0.7"])
print(describe())                  # every key with its default and meaning
"""

import json
from collections.abc import Sequence

from tnllm import recipe
from tnllm.cleaning.rules import DEFAULTS, FIGURES
from tnllm.cleaning.settings import CleanSettings

FORMAT = recipe.Format(
    CleanSettings,
    sections="input: and dedup:",
    setting="dedup.threshold=0.7",
    noun="cleaning recipe",
    folder="data",
    may_be_empty=True,
)


def load_clean_recipe(name: str | None, sets: Sequence[str] = ()) -> CleanSettings:
    """Read a recipe (None: the defaults) with `sets` (`"section.key=value"`) on top; see `tnllm.recipe.load`."""
    return recipe.load(FORMAT, name, sets)


def describe() -> str:
    """Every key with its default and meaning, as a recipe."""
    lines = ["# Every key of a cleaning recipe with its default.", recipe.to_yaml(FORMAT, CleanSettings(), doc=True)]
    lines += ["# Figures that rules look at, and their ranges in English, Chinese and any other language."]
    for name, meaning in FIGURES.items():
        ranges = ", ".join(
            f"{key} {json.dumps(list(limits[name]))}" for key, limits in DEFAULTS.items() if name in limits
        )
        lines.append(f"#   {name:20} {ranges:62} {meaning}")
    return "\n".join(lines)
