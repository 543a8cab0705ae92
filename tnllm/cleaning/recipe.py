"""Cleaning recipes: YAML whose sections are those of `tnllm.cleaning.settings`.

settings = load_clean_recipe("data/sample", ["dedup.threshold=0.7"])
"""

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from tnllm.cleaning.rules import DEFAULTS, FIGURES
from tnllm.cleaning.settings import CleanSettings
from tnllm.errors import UserError, did_you_mean
from tnllm.recipe import FOLDER, parse_yaml, read_text

_SECTIONS: dict[str, type[BaseModel]] = {name: type(value) for name, value in CleanSettings()}


def find_clean_recipe(name: str) -> Path:
    """The file that `name` means: a path, or a packaged recipe such as `data/sample`. Raises UserError."""
    for path in (Path(name), FOLDER / f"{name}.yaml", FOLDER / "data" / f"{name}.yaml"):
        if path.is_file():
            return path
    packaged = [f"data/{path.stem}" for path in sorted((FOLDER / "data").glob("*.yaml"))]
    hint = did_you_mean(name.removesuffix(".yaml"), packaged)
    raise UserError(f"no cleaning recipe {name}: no such file, and the packaged ones are {', '.join(packaged)}{hint}")


def load_clean_recipe(name: str | None, sets: list[str] | tuple[str, ...] = ()) -> CleanSettings:
    """Read a recipe (None: the defaults) with `sets` (`"section.key=value"`) on top.

    Raises UserError, one line with the key and where it came from, for anything wrong.
    """
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    if name is not None:
        path = find_clean_recipe(name)
        found, lines = parse_yaml(read_text(path), str(path))
        if found is not None and not isinstance(found, dict):
            raise UserError(f"{path}: expected sections such as input: and dedup:, found {type(found).__name__}")
        values = {section: keys for section, keys in (found or {}).items() if keys is not None}
        origins = {key: f"{path}:{line}" for key, line in lines.items()}
    for item in sets:
        key, equals, text = item.partition("=")
        section, dot, field = key.strip().partition(".")
        if not (equals and dot and field):
            raise UserError(f"--set is {item!r}; write section.key=value, such as dedup.threshold=0.7")
        keys = values.setdefault(section, {})
        if not isinstance(keys, dict):
            raise UserError(f"{section} is {keys!r}; expected a section of keys")
        # rules.en.length=[20, null]: one figure of a language, beside those of the recipe.
        field, dot, inner = field.partition(".")
        value = parse_yaml(text, f"--set {key}")[0]
        keys[field] = {**keys.get(field, {}), inner: value} if dot else value
        origins[key.strip()] = "--set"
    try:
        return CleanSettings.model_validate(values)
    except ValidationError as error:
        raise _explain(error, origins) from None


def _explain(error: ValidationError, origins: dict[str, str]) -> UserError:
    first = error.errors()[0]
    parts = [str(part) for part in first["loc"]]
    key = ".".join(parts[:2])
    origin = origins.get(".".join(parts), origins.get(key, origins.get(parts[0], "")))
    where = f" ({origin})" if origin else ""
    if first["type"] == "extra_forbidden":
        known = _SECTIONS.get(parts[0]) if len(parts) > 1 else CleanSettings
        assert known is not None
        return UserError(f"{'.'.join(parts)}: no such key{did_you_mean(parts[-1], known.model_fields)}{where}")
    message = first["msg"].removeprefix("Value error, ")
    return UserError(f"{'.'.join(parts)} is {first['input']!r}: {message[:1].lower() + message[1:]}{where}")


def describe() -> str:
    """Every key with its default and meaning, as a recipe."""
    lines = ["# Every key of a cleaning recipe with its default."]
    defaults = CleanSettings().model_dump(mode="json")
    for name, section in _SECTIONS.items():
        lines += ["", f"# {(section.__doc__ or '').strip()}", f"{name}:"]
        for key, field in section.model_fields.items():
            lines += [f"  # {field.description}", f"  {key}: {json.dumps(defaults[name][key], ensure_ascii=False)}"]
    lines += ["", "# Figures that rules look at, and their ranges in English, Chinese and any other language."]
    for name, meaning in FIGURES.items():
        ranges = ", ".join(
            f"{key} {json.dumps(list(limits[name]))}" for key, limits in DEFAULTS.items() if name in limits
        )
        lines.append(f"#   {name:20} {ranges:62} {meaning}")
    return "\n".join(lines)
