"""Recipe files as they lie on disk: find one by name, read its YAML, take its opening comment.

find_recipe("385m")                  # the packaged 385m.yaml; a path works too
values, lines = parse_yaml(text)     # plain Python values, and the line of every `section.key`
read_header(path)                    # {"about": ..., "hardware": ..., "loss": ...}

`tnllm/recipes` is a link to `recipes/` in a checkout and a folder in the wheel, so there is one copy.
"""

import re
from collections.abc import Hashable
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml

from tnllm.errors import UserError, did_you_mean

FOLDER = Path(__file__).resolve().parent / "recipes"

# Plain scalars follow YAML 1.2: PyYAML's 1.1 reads 1e-4 as a string, `on` and `no` as booleans, 1:30 as ninety.
_INT = re.compile(r"[-+]?[0-9][0-9_]*")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?")
_WORDS = {"": None, "~": None, "null": None, "Null": None, "true": True, "True": True, "false": False, "False": False}


class _Dumper(yaml.SafeDumper):
    """Quotes a text that `parse_yaml` would take for a number and PyYAML would not, such as 1e5 or 08."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # PyYAML writes these line ends plain and reads them as a space.
    style = '"' if any(end in text for end in "\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _text)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"(?:{_FLOAT.pattern})$"), list("-+.0123456789"))


def dump_yaml(value: Any) -> str:
    """`value` as YAML, which `parse_yaml` reads back as it was."""
    return yaml.dump(value, Dumper=_Dumper, allow_unicode=True, width=110)


def packaged_recipes() -> list[Path]:
    """The recipes that ship, by name."""
    return sorted(FOLDER.glob("*.yaml"))


def find_recipe(name: str, beside: Path | None = None) -> Path:
    """Return the file that `name` means: a path, a file in the folder `beside`, or a packaged recipe's name.

    Raises UserError when there is none.
    """
    candidates = [Path(name)]
    if beside is not None:
        candidates = [beside / name, beside / f"{name}.yaml"]
    for path in [*candidates, FOLDER / f"{name}.yaml"]:
        if path.is_file():
            return path
    names = [path.stem for path in packaged_recipes()]
    stem = Path(name).name.removesuffix(".yaml").removesuffix(".yml")
    hint = f"; did you mean the packaged recipe {stem!r}?" if stem in names else did_you_mean(stem, names)
    raise UserError(f"no recipe {name}: no such file, and the packaged ones are {', '.join(names)}{hint}")


def read_text(path: Path) -> str:
    """Text of a recipe; UserError where it is not UTF-8."""
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None


def read_comment(path: Path) -> list[str]:
    """Lines of the opening comment, without their signs."""
    lines = read_text(path).splitlines()
    return [line.removeprefix("#").removeprefix(" ") for line in takewhile(lambda line: line.startswith("#"), lines)]


def read_header(path: Path) -> dict[str, str]:
    """The opening comment: `about` is its text up to the first `Key: value` line, then one entry per key."""
    entries = {"about": ""}
    key = "about"
    for text in read_comment(path):
        named = re.match(r"([A-Z][a-z]+): +(.*)", text)
        if named:
            key, text = named[1].lower(), named[2]
        entries[key] = f"{entries.get(key, '')} {text.strip()}".strip()
    return entries


def parse_yaml(text: str, where: str = "text") -> tuple[Any, dict[str, int]]:
    """Read one YAML document: its value, and the line (from 1) of each dotted key of its two outer levels.

    Raises UserError, one line naming `where` and the line, for a syntax error, a key given twice, an alias or a tag.
    """
    try:
        for token in yaml.scan(text, Loader=yaml.SafeLoader):
            if isinstance(token, yaml.AliasToken | yaml.TagToken):
                line = f"{where}:{token.start_mark.line + 1}"
                raise UserError(
                    f"{line}: aliases (*name) and tags (!name) are not read; write the value out, or quote it"
                )
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{where}{line}: not YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not YAML: {error}") from None
    lines: dict[str, int] = {}
    return (None if node is None else _to_value(node, where, "", lines)), lines


def _to_value(node: yaml.Node, where: str, prefix: str, lines: dict[str, int]) -> Any:
    if isinstance(node, yaml.SequenceNode):
        return [_to_value(item, where, "", {}) for item in node.value]
    if isinstance(node, yaml.MappingNode):
        result: dict[Hashable, Any] = {}
        for key_node, value_node in node.value:
            key, line = str(key_node.value), key_node.start_mark.line + 1
            if key in result:
                raise UserError(f"{where}:{line}: {prefix}{key} is given twice")
            lines[prefix + key] = line
            result[key] = _to_value(value_node, where, f"{prefix}{key}.", lines)
        return result
    assert isinstance(node, yaml.ScalarNode), node
    text = node.value
    if node.style is not None:
        return text
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text):
        return int(text)
    return float(text) if _FLOAT.fullmatch(text) else text
