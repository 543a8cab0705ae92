"""The one recipe loader: YAML sections over pydantic models, for training and for cleaning.

    form = Format(RunConfig, sections="model: and train:", setting="train.max_steps=100")
    config = load(form, "385m", ["train.seed=3"])           # one clear line for anything wrong
    values, origins = read_recipe(form, "385m")             # before validation; where each key was given
    describe_keys(form)                                     # {"train.seed": "Seeds the weights, ...", ...}
    read_header(find_recipe("385m"))                        # {"about": ..., "hardware": ..., "loss": ...}

Precedence: defaults of the models < the file that `base:` names (one level) < the recipe < `--set section.key=value`.
`tnllm/recipes` is a link to `recipes/` in a checkout and a folder in the wheel, so there is one copy.
"""

import functools
import json
import re
import textwrap
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Generic, TypeVar, Union, cast, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from tnllm.errors import UserError, did_you_mean
from tnllm.progress import log

FOLDER = Path(__file__).resolve().parent / "recipes"
BASE_DOC = "A recipe whose keys come before this one's: a packaged name, or a file beside it. One level."

Root = TypeVar("Root", bound=BaseModel)
Values = dict[str, dict[str, Any]]  # section → key → value
Origins = dict[str, str]  # dotted key → where it was given: "file:line" or "--set"


class Section(BaseModel):
    """A section of a recipe: frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_truth_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        # pydantic reads true as 1.0, but who writes it means a switch.
        if isinstance(value, bool) and float in _types(cls.model_fields[str(info.field_name)].annotation):
            raise ValueError("expected a number")
        return value


def _types(annotation: Any) -> list[Any]:
    """An annotation and the members of its union, without their constraints."""
    if get_origin(annotation) is Annotated:
        return _types(get_args(annotation)[0])
    members = get_args(annotation) if isinstance(annotation, UnionType) or get_origin(annotation) is Union else ()
    return [annotation, *(item for member in members for item in _types(member))]


@dataclass(frozen=True)
class Format(Generic[Root]):
    """One kind of recipe. The fields of `root` are its sections, each a pydantic model.

    `noun` and the examples `sections` and `setting` appear in errors. Packaged recipes are in recipes/`folder`. `extra`:
    keys that are not fields (the caller removes them before validation) and their meaning. `restarts`: section → a key
    that discards what earlier files gave in that section. `may_be_empty`: an empty file means defaults.
    """

    root: type[Root]
    sections: str
    setting: str
    noun: str = "recipe"
    folder: str = ""
    extra: Mapping[str, str] = field(default_factory=dict)
    restarts: Mapping[str, str] = field(default_factory=dict)
    may_be_empty: bool = False

    @property
    def models(self) -> dict[str, type[BaseModel]]:
        """The model of each section, by name."""
        return {name: cast(type[BaseModel], item.annotation) for name, item in self.root.model_fields.items()}


def one_or_more(value: Any) -> Any:
    """A validator for lists that may be written as one string or mapping."""
    return [value] if isinstance(value, str | dict) else value


# Plain scalars follow YAML 1.2: PyYAML's 1.1 reads 1e-4 as a string, `on` and `no` as booleans, 1:30 as ninety.
_INT = re.compile(r"[-+]?[0-9]+(_[0-9]+)*")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(_[0-9]+)*(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_MOST_DIGITS = 400  # of a number; float64 ends at 309
_WORDS = {"": None, "~": None, "null": None, "Null": None, "true": True, "True": True, "false": False, "False": False}


class _Dumper(yaml.SafeDumper):
    """Quotes strings that only `parse_yaml` would read as a number, such as 1e5 or 08."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # PyYAML writes these line separators unquoted and reads them back as a space.
    style = '"' if any(end in text for end in "\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _text)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"(?:{_FLOAT.pattern})$"), list("-+.0123456789"))


def dump_yaml(value: Any) -> str:
    """`value` as YAML; `parse_yaml` of it is equal to `value`."""
    return yaml.dump(value, Dumper=_Dumper, allow_unicode=True, width=110)


def packaged_recipes(folder: str = "") -> list[Path]:
    """The recipes that ship, by name; `folder` "data": those of cleaning."""
    return sorted((FOLDER / folder).glob("*.yaml"))


def find_recipe(name: str, beside: Path | None = None, folder: str = "", noun: str = "recipe") -> Path:
    """Return the file that `name` means: a path (relative to `beside`, if given), or the name of a packaged recipe.

    `recipes/385m.yaml`, as it is called in a checkout, means the packaged recipe where no such file is; a line says so.
    Raises UserError if there is none.
    """
    paths = [Path(name)] if beside is None else [beside / name, beside / f"{name}.yaml"]
    if len(name) > 1000 or not name.isprintable():
        raise UserError(f"no {noun} {name[:1000]}: not a name that a file can have")
    for path in [*paths, FOLDER / f"{name}.yaml", FOLDER / folder / f"{name}.yaml"]:
        if path.is_file():
            return path
    if Path(name).parts[0:1] == ("recipes",) and (FOLDER.parent / name).is_file():
        _log_packaged(name)
        return FOLDER.parent / name
    prefix = f"{folder}/" if folder else ""
    names = [prefix + path.stem for path in packaged_recipes(folder)]
    stem = prefix + Path(name).name.removesuffix(".yaml").removesuffix(".yml")
    hint = f"; did you mean the packaged {noun} {stem!r}?" if stem in names else did_you_mean(stem, names)
    if Path(name).is_dir():
        raise UserError(f"no {noun} {name}: that is a folder; give a file, or one that ships: {', '.join(names)}")
    raise UserError(f"no {noun} {name}: no such file, and the packaged ones are {', '.join(names)}{hint}")


@functools.cache
def _log_packaged(name: str) -> None:
    """Once for a name: a command may read its recipe several times."""
    log(f"there is no {name} here: using the recipe of that name that ships with tnllm")


def load(form: Format[Root], name: str | None, sets: Sequence[str] = ()) -> Root:
    """Read a recipe (None: the defaults) with `sets` (`"section.key=value"`) applied, and validate it.

    Raises UserError, one line with the key and where it was given, for anything wrong.
    """
    values, origins = ({}, {}) if name is None else read_recipe(form, name)
    values, origins = apply_sets(form, values, origins, sets)
    try:
        return form.root.model_validate(values)
    except ValidationError as error:
        raise explain(form, error, origins, name or "--set") from None


def read_recipe(form: Format[Any], name: str) -> tuple[Values, Origins]:
    """The sections of a recipe merged over those of its base, and where each dotted key was given."""
    path = find_recipe(name, folder=form.folder, noun=form.noun)
    base, values, origins = _read_file(form, path)
    if base is None:
        return values, origins
    if not isinstance(base, str):
        raise UserError(f"base is {base!r}; expected the name of one {form.noun} ({origins['base']})")
    below, merged, below_origins = _read_file(form, find_recipe(base, path.parent, form.folder, form.noun))
    if below is not None:
        raise UserError(f"base: {base} has a base itself, and only one level is read ({origins['base']})")
    for section, keys in values.items():
        restarts = form.restarts.get(section) in keys
        merged[section] = {**({} if restarts else merged.get(section, {})), **keys}
    return merged, {**below_origins, **origins}


def _read_file(form: Format[Any], path: Path) -> tuple[Any, Values, Origins]:
    """The base of one file (None: it has none), its sections, and the line of each key."""
    values, lines = parse_yaml(read_text(path), str(path))
    if values is None and form.may_be_empty:
        values = {}
    if not isinstance(values, dict):
        found = "nothing" if values is None else type(values).__name__
        raise UserError(f"{path}: expected sections such as {form.sections}, found {found}")
    origins = {key: f"{path}:{line}" for key, line in lines.items()}
    base = values.pop("base", None)
    values = {section: keys for section, keys in values.items() if keys is not None}
    _check_keys(form, values, origins)
    return base, values, origins


def apply_sets(form: Format[Any], values: Values, origins: Origins, sets: Iterable[str]) -> tuple[Values, Origins]:
    """`values` and `origins` with each `section.key=value` of `sets` applied; the arguments stay as they are.

    One entry of a key that holds a mapping is set as section.key.entry=value, such as rules.en.length=[20, null].
    """
    changes: dict[tuple[str, str, str], Any] = {}
    for given in sets:
        dotted, equals, text = given.partition("=")
        dotted = dotted.strip()
        section, dot, key = dotted.partition(".")
        if dotted in form.models:
            name, item = next(iter(form.models[dotted].model_fields.items()))
            example = f"{dotted}.{name}={json.dumps(item.default)}"
            raise UserError(f"--set is {given!r}, and {dotted} is a section: set one of its keys, such as {example}")
        if equals and dotted and not dot:
            raise _unknown_key(form, dotted, {dotted: "--set"}, form.models)
        if not (equals and section and key):
            raise UserError(f"--set is {given!r}; write section.key=value, such as {form.setting}")
        first, _, rest = key.partition(".")
        key, entry = (first, rest) if _holds_mapping(form, section, first) else (key, "")
        changes[section, key, entry] = parse_yaml(text, f"--set {dotted}")[0]
        origins = {**origins, section: "--set", f"{section}.{key}": "--set", dotted: "--set"}
    restarted = {section for section, key, _ in changes if form.restarts.get(section) == key}
    merged = {section: {} if section in restarted else dict(keys) for section, keys in values.items()}
    for (section, key, entry), value in changes.items():
        keys = merged.setdefault(section, {})
        keys[key] = {**(keys.get(key) or {}), entry: value} if entry else value
    _check_keys(form, merged, origins)
    return merged, origins


def _holds_mapping(form: Format[Any], section: str, key: str) -> bool:
    known = form.models[section].model_fields if section in form.models else {}
    return key in known and get_origin(known[key].annotation) is dict


def describe_keys(form: Format[Any]) -> dict[str, str]:
    """Every dotted key of a recipe and what it means, in order."""
    docs = {"base": BASE_DOC, **form.extra}
    for name, model in form.models.items():
        docs.update({f"{name}.{key}": item.description or "" for key, item in model.model_fields.items()})
    return docs


def to_yaml(form: Format[Root], config: Root, doc: bool = False) -> str:
    """Every key with its value; `load` of it gives an equal config. `doc`: with what each section and key means."""
    docs = describe_keys(form)
    lines = []
    if doc:
        for key in ("base", *form.extra):
            lines += _comment(f"{key} may also be given. {docs[key]}")
    for name, keys in config.model_dump(mode="json").items():
        if doc:
            lines += ["", *_comment(form.models[name].__doc__ or "")]
        lines.append(f"{name}:")
        for key, value in keys.items():
            if doc:
                lines += [f"  {line}" for line in _comment(docs[f"{name}.{key}"])]
            lines += [f"  {line}" for line in dump_yaml({key: value}).rstrip("\n").split("\n")]
    return "\n".join(lines) + "\n"


def _comment(text: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(" ".join(text.split()), 110)]


def _check_keys(form: Format[Any], values: Mapping[str, Any], origins: Origins) -> None:
    known = describe_keys(form)
    for section, keys in values.items():
        if section not in form.models:
            raise _unknown_key(form, section, origins, [*form.models, "base"])
        if not isinstance(keys, dict):
            raise UserError(f"{section} is {keys!r}; expected a section of keys{origin_of(section, origins)}")
        for key in keys:
            if f"{section}.{key}" not in known:
                raise _unknown_key(form, f"{section}.{key}", origins, known)


def _unknown_key(form: Format[Any], key: str, origins: Origins, allowed: Iterable[str]) -> UserError:
    # The right key in the wrong section is the more frequent mistake, so it is looked for first.
    last = key.rpartition(".")[2]
    elsewhere = [known for known in describe_keys(form) if known.rpartition(".")[2] == last]
    hint = f"; did you mean {elsewhere[0]!r}?" if elsewhere else did_you_mean(key, allowed)
    return UserError(f"{key}: no such key{hint}{origin_of(key, origins)}")


def origin_of(key: str, origins: Origins) -> str:
    """` (file:line)` for a dotted key, or for the nearest key above it whose origin is known; else an empty string."""
    while key and key not in origins:
        key = key.rpartition(".")[0]
    return f" ({origins[key]})" if key else ""


# pydantic's error types → what is expected, in the words of the documentation.
_EXPECTED = {
    "float_parsing": "a number",
    "float_type": "a number",
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "string_type": "a string (quote it)",
    "tuple_type": "a list",
    "too_short": "more items",
    "too_long": "fewer items",
    "int_type": "a whole number",
}


def explain(form: Format[Any], error: ValidationError, origins: Origins, name: str) -> UserError:
    """One line for the first mistake that pydantic reports: key, value, what is expected, where it was given."""
    first = error.errors()[0]
    # A section that was validated by itself reports its keys without its name.
    alone = [section for section, model in form.models.items() if model.__name__ == error.title]
    key = ".".join(map(str, [*alone, *first["loc"]]))
    message = first["msg"].removeprefix("Value error, ")
    if not key:
        return UserError(f"{message} ({name})")
    if first["type"] == "extra_forbidden":
        return UserError(f"{key}: no such key{origin_of(key, origins)}")
    expected = _EXPECTED.get(first["type"])
    message = f"expected {expected}" if expected else message[:1].lower() + message[1:]
    return UserError(f"{key} is {first['input']!r}: {message}{origin_of(key, origins)}")


def read_text(path: Path) -> str:
    """Text of a recipe. Raises UserError if it is not UTF-8."""
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None


def read_comment(path: Path) -> list[str]:
    """Lines of the opening comment, without `#`."""
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
    """Read one YAML document: its value, and the line (from 1) of each dotted key.

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
        lines: dict[str, int] = {}
        return (None if node is None else _to_value(node, where, "", lines)), lines
    except RecursionError:
        raise UserError(f"{where}: lists and sections are nested too deeply") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{where}{line}: not YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not YAML: {error}") from None


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
    if len(text) > _MOST_DIGITS and _FLOAT.fullmatch(text):
        raise UserError(f"{where}:{node.start_mark.line + 1}: a number of {len(text)} digits; write it shorter")
    if _INT.fullmatch(text):
        return int(text)
    return float(text) if _FLOAT.fullmatch(text) else text
