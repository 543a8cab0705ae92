"""Task names to the harness's tasks, with local data for those that have a card.

    choices = choose(["mmlu", "ceval", "arc*"], None, log=print)         # names as typed → the harness's names and shots
    loaded = load_tasks(choices, Path("data"), online=False, log=print)  # `as_harness()` is for its `evaluate`

The harness parses all of its 14,000 definition files at start. Here a text search finds the file that defines a name, and
only its folder is parsed.
"""

import difflib
import fnmatch
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import lm_eval.tasks
import lm_eval.utils
import yaml
from lm_eval.api.group import Group
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.tasks import TaskManager

from tnllm import hub
from tnllm.errors import UserError, did_you_mean
from tnllm.evaluation.cards import PAPER_GROUP, PAPER_TASKS, Card, MissingData, find_card, load_cards, subject_card

# The harness compiles a task's template for every question, which takes longer than scoring the question.
lm_eval.utils.env.from_string = lru_cache(maxsize=1024)(lm_eval.utils.env.from_string)

DEFINITIONS = Path(lm_eval.tasks.__file__).parent
_NAMED = re.compile(r'^["\']?(?:task|group|tag)["\']?\s*:[ \t]*(.*(?:\n[ \t]*-[^\n]*)*)', re.MULTILINE)
_HUB = huggingface_hub.constants.ENDPOINT
# What the harness raises for a faulty definition, besides the errors of data that cannot be loaded.
_DEFINITION_ERRORS = (KeyError, TypeError, AttributeError, ImportError, yaml.YAMLError)
# A line names at most this many tasks.
_SHOWN = 3
Log = Callable[[str], None]


@dataclass(frozen=True)
class Choice:
    """A task to run."""

    name: str  # the harness's
    card: Card | None  # if it has offline data
    num_fewshot: int | None  # None: the task's own
    pattern: str | None = None  # that it matches; then it is left out where its data are not here
    include_path: Path | None = None  # the user's folder that defines it


@dataclass
class Loaded:
    """Tasks for the harness, and the sources of their documents."""

    tasks: dict[str, Task] = field(default_factory=dict)
    groups: dict[str, Group] = field(default_factory=dict)
    data: dict[str, dict[str, str]] = field(default_factory=dict)  # task → split, file
    sampled: list[str] = field(default_factory=list)  # tasks and groups that use the packaged sample

    def as_harness(self) -> dict[str, Any]:
        """Return the dictionary that the harness's `evaluate` takes."""
        return {
            "tasks": self.tasks,
            "groups": self.groups,
            "group_map": {group.name: group.child_names for group in self.groups.values()},
        }


@cache
def definition_files(include_path: Path | None = None) -> dict[str, list[Path]]:
    """Map each name of a task, group or tag to the harness's files that contain it, or to those of `include_path`."""
    if include_path is None:
        return _named_below(DEFINITIONS)
    named = _named_below(include_path)
    return definition_files() | {name: named.get(name, []) for name in _defined_in(include_path)}


@cache
def _defined_in(include_path: Path) -> set[str]:
    """The names that a user's folder defines. Raises UserError if it defines none."""
    names = set(TaskManager(include_path=include_path, include_defaults=False).all_tasks)
    if not names:
        raise UserError(f"--include-path {include_path} holds no YAML that defines a task, group or tag")
    return names


@cache
def _named_below(root: Path) -> dict[str, list[Path]]:
    files_of: dict[str, list[Path]] = {}
    for folder, _, files in os.walk(root):
        for file in sorted(files):
            if not file.endswith(".yaml"):
                continue
            path = Path(folder, file)
            for value in _NAMED.findall(path.read_text(encoding="utf-8", errors="replace")):
                first, *items = value.split("\n")
                # A list under `task:` holds members of a group, under `tag:` the tags of this task.
                for name in [first, *(item.strip().removeprefix("-") for item in items)]:
                    name = name.split("#")[0].strip().strip("\"'")
                    if re.fullmatch(r"[\w.:+-]+", name):
                        files_of.setdefault(name, []).append(path)
    return files_of


def choose(names: Iterable[str], num_fewshot: int | None, log: Log, include_path: Path | None = None) -> list[Choice]:
    """Resolve aliases, patterns, the paper's group, and names defined in `include_path`. Raises UserError for others."""
    known, own = definition_files(include_path), set() if include_path is None else _defined_in(include_path)
    choices: dict[str, Choice] = {}
    for typed in names:
        if typed in own:
            if typed in definition_files():
                log(f"{typed}: defined in {include_path}, instead of lm-evaluation-harness's")
            chosen = [Choice(typed, None, num_fewshot, include_path=include_path)]
        elif typed == PAPER_GROUP:
            if num_fewshot is not None:
                raise UserError(f"{PAPER_GROUP} fixes its number of examples (0, and 5 for MMLU, CMMLU and C-Eval)")
            chosen = [Choice(name, find_card(name), shots) for name, shots in PAPER_TASKS.items()]
        elif card := find_card(typed):
            if card.name != typed:
                log(f"{typed} is {card.name} in lm-evaluation-harness")
            chosen = [Choice(card.name, card, num_fewshot)]
        elif typed in known:
            if near := _almost(typed):
                log(
                    f"{typed} is a task of its own in lm-evaluation-harness, without offline data; did you mean {near!r}?"
                )
            chosen = [Choice(typed, _card_of(typed), num_fewshot)]
        else:
            matches = fnmatch.filter(known, typed) if set(typed) & set("*?[") else []
            if not matches:
                raise UserError(
                    f"task {typed!r} is not known{did_you_mean(typed, [*_offline_names(), *known])}; `tnllm eval ls` lists "
                    f"those with offline data, `tnllm eval ls PATTERN` all {len(known):,} of lm-evaluation-harness"
                )
            chosen = [
                Choice(name, None, num_fewshot, None, include_path) if name in own
                else Choice(name, _card_of(name), num_fewshot, pattern=typed)
                for name in matches
            ]  # fmt: skip
        # What was typed in full is not left out because a pattern matches it too.
        choices.update({each.name: each for each in chosen if each.pattern is None or each.name not in choices})
    return list(choices.values())


def search(pattern: str, include_path: Path | None = None) -> list[str]:
    """Return the harness's names that match or contain a pattern. Raises UserError if there are none."""
    known = definition_files(include_path)
    names = sorted(fnmatch.filter(known, pattern if set(pattern) & set("*?[") else f"*{pattern}*"))
    if not names:
        raise UserError(f"no task matches {pattern!r}{did_you_mean(pattern, known)}; try a part of its name")
    return names


def _offline_names() -> list[str]:
    """Names and aliases of the tasks with offline data."""
    return [PAPER_GROUP, *load_cards(), *(name for card in load_cards().values() for name in card.aliases)]


def _almost(typed: str) -> str | None:
    """The task with offline data that `typed` may be a misspelling of: about one letter more, less or other."""
    near = difflib.get_close_matches(typed, _offline_names(), n=1, cutoff=0.8)
    return near[0] if near and abs(len(near[0]) - len(typed)) <= 1 else None


def _card_of(name: str) -> Card | None:
    """The card of a subject's task, if the harness defines it where the card says: mmlu_pro is not a subject of mmlu."""
    pair = subject_card(name)
    if pair and any(path.is_relative_to(DEFINITIONS / pair[0].folder) for path in definition_files().get(name, [])):
        return pair[0]
    return find_card(name)


class _LocalTask(ConfigurableTask):
    """A task of the harness that reads its documents from a card's files."""

    def __init__(self, config: dict[str, Any]) -> None:
        config = dict(config)
        config.pop("class")
        self.source: _CardData = config.pop("source")
        self.data_used: dict[str, str] = {}
        super().__init__(config=config)

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Load the scored split, and the split of examples if there are shots; the others stay empty."""
        card, shots = self.source.card, self.source.num_fewshot
        subject = self.config.dataset_name if card.subject_tasks else None
        scored = self.config.test_split or self.config.validation_split
        examples = self.config.fewshot_split or self.config.training_split
        self.dataset = {}
        for split in {*filter(None, [scored, examples, self.config.training_split, self.config.validation_split])}:
            if split == scored or (split == examples and shots):
                documents, used, file = card.load(self.source.data_dir, split, subject)
                if not documents:
                    raise MissingData(f"{file} holds no document of {self.config.task}")
                if split == scored:
                    self.data_used = {"split": used, "file": file, "scored_split": split}
                self.dataset[split] = datasets.Dataset.from_list(documents)
            else:
                self.dataset[split] = datasets.Dataset.from_list([])


@dataclass(frozen=True)
class _CardData:
    """Where a task reads its documents."""

    card: Card
    data_dir: Path | None
    num_fewshot: int


def load_tasks(choices: list[Choice], data_dir: Path | None, online: bool, log: Log) -> Loaded:
    """Load definitions and documents: from `data_dir`, without it from the packaged samples, with `online` from the hub.

    Raises UserError for missing data, with the names that were looked for, or if a download fails.
    """
    loaded = Loaded()
    for each in load_each(choices, data_dir, online, log).values():
        for part in fields(Loaded):
            mine, more = getattr(loaded, part.name), getattr(each, part.name)
            setattr(loaded, part.name, mine + more if isinstance(mine, list) else mine | more)
    log_data(loaded, log)
    return loaded


def load_each(choices: list[Choice], data_dir: Path | None, online: bool, log: Log) -> dict[str, Loaded]:
    """`load_tasks` for each choice by itself, without its lines about the data."""
    left_out: dict[str, list[str]] = {}
    if not online:
        for choice in choices:
            if choice.pattern is not None and choice.card is None:
                left_out.setdefault(choice.pattern, []).append(choice.name)
        choices = [choice for choice in choices if choice.pattern is None or choice.card is not None]
    if online or any(choice.card is None and _needs_hub(choice) for choice in choices):
        _prefer_cache_offline(log)
    sets: dict[str, Loaded] = {}
    for choice in choices:
        try:
            sets[choice.name] = _load(choice, data_dir, online, log)
        except MissingData:
            if choice.pattern is None:
                raise
            left_out.setdefault(choice.pattern, []).append(choice.name)
    for pattern, names in left_out.items():
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        where = "here" if data_dir is None else f"in {data_dir}"
        log(
            f"{pattern}: left out {', '.join(names[:_SHOWN])}{more}, whose data are not {where} (--online downloads them)"
        )
    if not sets:
        patterns = ", ".join(left_out)
        raise UserError(
            f"no task that matches {patterns} has its data here; give --data-dir DIR, or --online to download"
        )
    return sets


def _needs_hub(choice: Choice) -> bool:
    """Whether a task may read data of the hub: all but a user's, in files of a format that the datasets library reads."""
    if choice.include_path is None:
        return True
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in choice.include_path.rglob("*.y*ml")]
    sources = {source for text in texts for source in re.findall(r"^dataset_path\s*:\s*[\"']?([^\s\"'#]+)", text, re.M)}
    return not all(
        source in datasets.packaged_modules._PACKAGED_DATASETS_MODULES or Path(source).exists() for source in sources
    )


def _load(choice: Choice, data_dir: Path | None, online: bool, log: Log) -> Loaded:
    loaded = Loaded()
    if choice.card is None or online:
        _add(loaded, _load_online(choice), choice.num_fewshot)
    elif data_dir is None and choice.card.subject_tasks and choice.name == choice.card.name:
        _load_sample_group(loaded, choice, log)
    else:
        manager = TaskManager(include_path=[DEFINITIONS / choice.card.folder], include_defaults=False)
        shots = _sample_shots(choice, log) if data_dir is None else choice.num_fewshot
        if data_dir is None:
            loaded.sampled.append(choice.name)
        _add(loaded, _build(manager, choice.name, _CardData(choice.card, data_dir, shots or 0)), shots)
    return loaded


def _build(manager: TaskManager, name: str, source: _CardData) -> Task | Group:
    overrides = {"class": _LocalTask, "source": source}
    return manager._factory.build(manager.task_index[name], overrides=overrides, registry=manager.task_index)


def _sample_shots(choice: Choice, log: Log) -> int | None:
    """The number of shots, at most the examples in the packaged sample."""
    assert choice.card is not None
    if choice.num_fewshot and choice.card.sample is not None:
        subject = (subject_card(choice.name) or (None, None))[1] or next(iter(choice.card.sample_subjects()), None)
        examples = next((name for name in choice.card.files if name in ("dev", "train")), "train")
        available = len(choice.card.load(None, examples, subject)[0])
        if available < choice.num_fewshot:
            log(
                f"{choice.name}: the packaged sample has {available} examples, so {available} shots instead of "
                f"{choice.num_fewshot}"
            )
            return available
    return choice.num_fewshot


def _load_sample_group(loaded: Loaded, choice: Choice, log: Log) -> None:
    """Load the subjects that have a sample as one group."""
    card = choice.card
    assert card is not None and card.subject_tasks is not None
    subjects = card.sample_subjects()
    manager = TaskManager(include_path=[DEFINITIONS / card.folder], include_defaults=False)
    definition = manager.task_index[card.name].cfg or {}
    kept = {key: definition[key] for key in ("group", "aggregate_metric_list", "metadata") if key in definition}
    group = Group.from_config(kept)
    shots = _sample_shots(choice, log)
    for subject in subjects:
        task = _build(manager, card.subject_tasks.format(subject=subject), _CardData(card, None, shots or 0))
        group.add(task)
    loaded.sampled.append(choice.name)
    _add(loaded, group, shots)


def _add(loaded: Loaded, item: Task | Group | list[Task], num_fewshot: int | None) -> None:
    """Add the tasks of `item` to `loaded`, with `num_fewshot` examples, the task's own number, or none."""
    if isinstance(item, Group):
        tasks = item.get_all_tasks()
        loaded.groups |= {group.name: group for group in (item, *item.get_all_groups())}
    else:
        tasks = item if isinstance(item, list) else [item]
    for task in tasks:
        own = task.get_config("num_fewshot")
        # A task whose definition says 0 cannot have examples.
        if own is None or (num_fewshot is not None and own != 0):
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
        loaded.tasks[task.task_name] = task
        if isinstance(task, _LocalTask):
            loaded.data[task.task_name] = task.data_used


def log_data(loaded: Loaded, log: Log) -> None:
    """Say which tasks are samples, and which are scored on another split than the harness's."""
    for name in loaded.sampled:
        log(f"{name}: a sample that ships with tnllm, not a score; give --data-dir for the whole set (tnllm eval ls)")
    others: dict[tuple[str, str], list[str]] = {}
    for name, data in loaded.data.items():
        if data["split"] != data["scored_split"]:
            others.setdefault((data["scored_split"], data["split"]), []).append(name)
    for (scored, used), names in others.items():
        log(f"{', '.join(names)}: no {scored} split in the data folder, so scored on {used}")


def _prefer_cache_offline(log: Log) -> None:
    """Use only the hub's cache if the hub does not answer: its libraries would retry each file for half a minute."""
    if datasets.config.HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE") or hub.answers(_HUB):
        return
    log(f"{_HUB} does not answer: reading its cache on this machine only (HF_HUB_OFFLINE=0 tries anyway)")
    huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True


def _load_online(choice: Choice) -> Any:
    """Load a task with its own data: from the Hugging Face hub or its local cache, or a user's task from what it names."""
    own = choice.include_path
    folders = sorted({path.parent for path in _definitions_of(choice.name, own)})
    manager = TaskManager(include_path=folders, include_defaults=False)
    try:
        if choice.name not in manager.task_index:
            manager = TaskManager(include_path=own)
        return manager._load_spec(choice.name)
    except (ConnectionError, FileNotFoundError, ValueError, OSError, *_DEFINITION_ERRORS) as error:
        reason = " ".join(str(error).split())[:200]
        if own is not None:
            raise UserError(
                f"task {choice.name} of {own} could not be loaded ({type(error).__name__}: {reason})"
            ) from None
        if isinstance(error, _DEFINITION_ERRORS):
            raise
        if datasets.config.HF_HUB_OFFLINE:
            reason = "offline, and they are not in its cache on this machine"
        near = _almost(choice.name)
        hint = f"did you mean {near!r}?" if near else "only `tnllm eval ls` tasks work offline"
        hint = "give --data-dir DIR instead" if choice.card else hint
        raise UserError(
            f"the data of {choice.name} come from the Hugging Face hub, and could not be loaded ({reason}); {hint}"
        ) from None


def _definitions_of(name: str, include_path: Path | None) -> set[Path]:
    """Files that define a name and, for a group, all its members."""
    known = definition_files(include_path)
    files: set[Path] = set()
    todo = [name]
    seen: set[str] = set()
    while todo:
        current = todo.pop()
        if current in seen:
            continue
        seen.add(current)
        for path in known.get(current, []):
            text = path.read_text(encoding="utf-8", errors="replace")
            defines = re.search(
                rf"^[\"']?(task|group|tag)[\"']?\s*:[ \t]*[\"']?{re.escape(current)}[\"']?\s*$", text, re.M
            )
            listed = re.search(rf"^[\"']?tag[\"']?\s*:(?:\s*-[^\n]*)*{re.escape(current)}", text, re.M)
            if defines or listed:
                files.add(path)
                if re.search(r"^[\"']?group[\"']?\s*:", text, re.M):
                    todo += [
                        item.strip("\"'")
                        for item in re.findall(r"^\s*-\s*(?:task:|group:)?\s*([\w.:\"'+-]+)\s*$", text, re.M)
                    ]
    return files
