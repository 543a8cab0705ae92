"""Mutated recipes: each is read and checked, or refused in one line. Not a test: a tool.

    python -m tests.training.recipe_fuzz --count 5000 --seed 0      # a few minutes on a CPU

A recipe that ships is changed at random: values of other types and sizes, odd keys, damaged text. It is then loaded, built
on the meta device, planned (--dry-run) and estimated. Exits 1 if anything but a UserError of one short line came out, with
the recipe that did it.
"""

import argparse
import random
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml

from tests.training.sections import memory_of
from tnllm.errors import UserError
from tnllm.modeling.config import PRESETS
from tnllm.recipe import describe_keys, packaged_recipes
from tnllm.training.config import FORMAT, load_recipe
from tnllm.training.dry_run import check_recipe, dry_run_text

NAMES = ("tiny", "tiny-transformer", "demo", "sft", "385m", "1b")
LONGEST_LINE = 1000
# As they are written in YAML.
VALUES = (
    "1_", "1__0", "_1", "1e400", "-1e400", "1e-400", "inf", ".inf", "-.inf", "nan", ".nan", "9" * 5000,
    "1" * 400 + ".5", "1000000000000000000", "1e18", "18446744073709551616", "-9223372036854775809", "0", "-1",
    "1", "2", "3", "7", "64", "0.5", "1.5", "1e-9", "0x10", "0o7", "1:30", "true", "false", "yes", "off", "null",
    "~", "''", "' '", "a", "é" * 300, "x" * 20_000, "[]", "{}", "[[]]", "[null]", "{a: 1}", "[1, 2]", "{path: x}",
    "[{path: x, weight: 0}]", "300B", "0.5M", "1T", "999999T", "1e30B", "-5M", "5 M", "0.0001K", "{prompt}",
    "'{prompt}'", "'{prompt}{prompt}'", "/dev/null", ".", "..", "/proc/self/mem", "~/x", "'\\0'", '"\\0"',
    '"\\ud800"', '"\\n"', "packaged", "auto", "cpu", "cuda", "cuda:99", "cuda:" + "9" * 30, "ape", "lrpe", "decay",
    "transformer", "low-rank", "chat", "concat", "wsd", "linear", "constant", "bf16", "fp32", "full", "skip", "on",
    "[qkvu_proj]", "[l1, l1]", "[piqa]", "nowhere", "2026-01-01", "!!python/object:a.b {}", "&a [*a]", "*a", "<<",
    "? x", "|\n  text", ">-\n  text", "[" * 2000, "{a: " * 500, "[" * 400 + "]" * 400, "- 1", "%", "@", "`",
)  # fmt: skip

NUMBERS = (
    "0", "1", "2", "3", "4", "8", "16", "33", "64", "100", "128", "256", "1K", "64K", "1M", "0.5", "0.1", "1e-4", "null",
)  # fmt: skip
WORDS = (
    "null", "packaged", "tnllm-8k", "tnllm-64k", "[]", "the", "'Q: {prompt} A: '", "cpu", "[l1]", "[qkvu_proj, l3]", "piqa",
)  # fmt: skip


def choices(annotation: Any) -> list[str]:
    """The words of every Literal within a type."""
    found = (
        [str(item) for item in get_args(annotation) if isinstance(item, str)]
        if get_origin(annotation) is Literal
        else []
    )
    return found + [word for item in get_args(annotation) for word in choices(item)]


def fitting(section: str, key: str, draw: random.Random) -> str:
    """A value of a type that the key may have."""
    field = FORMAT.models[section].model_fields.get(key)
    if field is None:  # model.preset
        return draw.choice(list(PRESETS))
    words = choices(field.annotation)
    if words:
        return draw.choice(words)
    if isinstance(field.default, bool):
        return draw.choice(("true", "false"))
    return draw.choice(
        NUMBERS if isinstance(field.default, int | float) or key.endswith(("steps", "tokens")) else WORDS
    )


def one_line(value: Any) -> str:
    """A value as YAML on one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).strip().removesuffix("...").strip()


def mutate(draw: random.Random) -> str:
    """The text of a recipe with one to four changes."""
    name = draw.choice(NAMES)
    path = next(path for path in packaged_recipes() if path.stem == name)
    values: dict[str, dict[str, str]] = {}
    for section, keys in (yaml.safe_load(path.read_text()) or {}).items():
        if isinstance(keys, dict):
            values[section] = {key: one_line(value) for key, value in keys.items()}
    known = [key for key in describe_keys(FORMAT) if "." in key]
    for _ in range(draw.choice((1, 1, 1, 2, 2, 3, 4))):
        section, _, key = draw.choice(known).partition(".")
        chosen = fitting(section, key, draw) if draw.random() < 0.6 else draw.choice(VALUES)
        values.setdefault(section, {})[key] = chosen
        if draw.random() < 0.05:
            values.setdefault(section, {})[draw.choice(VALUES)] = draw.choice(VALUES)
    lines = []
    for section, keys in values.items():
        lines.append(f"{section}:")
        lines += [f"  {key}: {value}" for key, value in keys.items()]
    if draw.random() < 0.05:
        lines.insert(draw.randrange(len(lines) + 1), draw.choice((f"base: {draw.choice(NAMES)}", *VALUES)))
    text = "\n".join(lines) + "\n"
    if draw.random() < 0.1:
        start = draw.randrange(len(text))
        text = (
            text[:start]
            + draw.choice(("", "\t", ":", "\x00", "\ufeff", "\x85", "}"))
            + text[start + draw.randrange(5) :]
        )
    return text


def outcome(file: Path) -> tuple[str, str]:
    """What became of a recipe: "ok", "refused", or "BAD"; and the line or the traceback."""
    try:
        check_recipe(str(file))
        config = load_recipe(str(file))
        memory_of(config)
        dry_run_text(config)
    except UserError as error:
        text = str(error)
        good = text and "\n" not in text and len(text) <= LONGEST_LINE and error.exit_code in (2, 3)
        return ("refused" if good else "BAD"), text[:2000]
    except BaseException:  # what this tool looks for
        return "BAD", traceback.format_exc()[-2500:]
    return "ok", ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.yaml"
        for number in range(args.count):
            text = mutate(random.Random(args.seed * 1_000_003 + number))
            file.write_bytes(text.encode("utf-8", "surrogateescape"))
            result, said = outcome(file)
            counts[result] += 1
            if result == "BAD":
                print(f"recipe {number}:\n{text[:3000]}\n{said}", flush=True)
            if sys.stderr.isatty() or (number + 1) % 1000 == 0:
                print(f"\r{number + 1} of {args.count}: {dict(counts)}", end="", file=sys.stderr, flush=True)
    print(f"\n{args.count} recipes: {dict(counts)}")
    sys.exit(1 if counts["BAD"] else 0)


if __name__ == "__main__":
    main()
