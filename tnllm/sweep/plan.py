"""What a sweep runs: a YAML file of groups, each a recipe with overrides, a grid and seeds.

plan = read_plan(Path("recipes/evidence/loss.yaml"))
cells = plan.cells(plan.groups["rate"], rows)     # None while a group it chooses from is not done

    groups:
      rate:
        recipe: tiny                               # a file beside the sweep file, or a packaged recipe
        set: {train.max_steps: 200}                # overrides of every cell
        grid: {optimizer.learning_rate: [1e-3, 3e-3]}
      seeds:
        best_of: [rate]                            # starts from the cell of lowest final val_loss in these groups
        seeds: [1, 2]
      ablation:
        best_of: [rate]                            # with a recipe of its own: the best cell's overrides on that one
        variants: [{model.position: decay}, {model.gate: none}]

A cell is one choice of the grid, one variant and one seed. Cells run in the order of the file. `alone: true` is for
cells whose speed counts: nothing else runs beside them. `trainer: llama` trains transformers' model of the same sizes
(tnllm.sweep.llama). `charts` names what tnllm.sweep.chart draws.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from tnllm.errors import UserError, did_you_mean
from tnllm.recipe import find_recipe, parse_yaml, read_text
from tnllm.training.config import load_recipe

Row = dict[str, Any]
_GROUP_KEYS = ("recipe", "set", "grid", "variants", "seeds", "best_of", "alone", "trainer")
_CHART_KEYS = ("title", "x", "groups")
_SEED = "train.seed"
# What runs a cell: arguments of `python -m` before the recipe, and what follows the output folder.
TRAINERS = {"tnllm": (["tnllm", "train"], ["--resume", "auto"]), "llama": (["tnllm.sweep.llama"], [])}


@dataclass(frozen=True)
class Group:
    """One entry of `groups`."""

    name: str
    recipe: str | None
    sets: dict[str, Any]
    grid: dict[str, list[Any]]
    variants: list[dict[str, Any]]
    seeds: list[int]
    best_of: list[str]
    alone: bool
    trainer: str


@dataclass(frozen=True)
class Chart:
    """One entry of `charts`: `x` is what tnllm.sweep.chart lists, or a key of the grid."""

    name: str
    title: str
    x: str
    groups: list[str]


@dataclass(frozen=True)
class Cell:
    """One run of the trainer. `choice` is what tells it from the others of its group, `seed` aside."""

    group: str
    choice: str
    recipe: str
    overrides: dict[str, str]
    seed: int
    alone: bool = False
    trainer: str = "tnllm"

    @property
    def name(self) -> str:
        """Unique in a sweep, and the path of its run folder."""
        return f"{self.group}/{self.choice},seed={self.seed}" if self.choice else f"{self.group}/seed={self.seed}"

    def sets(self) -> list[str]:
        """Items of `tnllm train --set`."""
        return [f"{key}={value}" for key, value in self.overrides.items()] + [f"{_SEED}={self.seed}"]


@dataclass(frozen=True)
class Plan:
    """A sweep file, read and checked."""

    path: Path
    groups: dict[str, Group]
    charts: list[Chart] = field(default_factory=list)

    def cells(self, group: Group, rows: Sequence[Row]) -> list[Cell] | None:
        """The cells of `group`, given the rows there are; None where it waits for a group it chooses from.

        There are none where every cell it could choose from failed: one bad group does not stop the others.
        """
        if not group.best_of:
            return _expand(group)
        candidates = self._candidates(group, rows)
        if not candidates:
            return None if candidates is None else []
        return _expand(group, min(candidates, key=lambda item: (item[0], item[1].name))[1])

    def _candidates(self, group: Group, rows: Sequence[Row]) -> list[tuple[float, Cell]] | None:
        """Loss and cell of all that ended well in the groups `group` chooses from; None while one of them is open."""
        by_name = {row["cell"]: row for row in rows}
        candidates: list[tuple[float, Cell]] = []
        for name in group.best_of:
            cells = self.cells(self.groups[name], rows)
            if cells is None or any(cell.name not in by_name for cell in cells):
                return None
            candidates += [
                (float(by_name[cell.name]["val_loss"]), cell)
                for cell in cells
                if by_name[cell.name]["status"] == "done"
            ]
        return candidates

    def examples(self, group: Group) -> list[Cell]:
        """The cells of `group` as they would be if the first cell it can choose from were the best."""
        return _expand(group, self.examples(self.groups[group.best_of[0]])[0] if group.best_of else None)


def _expand(group: Group, best: Cell | None = None) -> list[Cell]:
    """The cells of `group`, which start from the `best` of the groups it chooses from."""
    cells, recipe, before = [], group.recipe or (best.recipe if best else ""), best.overrides if best else {}
    for values in product(*group.grid.values()):
        chosen = dict(zip(group.grid, values, strict=True))
        for variant in group.variants:
            own = {**chosen, **variant}
            overrides = {key: _text(value) for key, value in {**group.sets, **own}.items()}
            choice = ",".join(f"{key.rpartition('.')[2]}={_text(value)}" for key, value in own.items())
            for seed in group.seeds:
                more = {**before, **overrides}
                cells.append(Cell(group.name, choice, recipe, more, seed, group.alone, group.trainer))
    return cells


def _text(value: Any) -> str:
    """A value as it is typed after `--set key=`."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str | int | float):
        return str(value)
    return json.dumps(value, separators=(",", ":"))


def read_plan(path: Path, sets: Sequence[str] = ()) -> Plan:
    """Read a sweep file; `sets` are overrides of every cell, with which each must make a recipe that loads.

    Raises UserError, one line with the file and where in it, for anything wrong.
    """
    if not path.is_file():
        like = "recipes/evidence/loss.yaml in the repository"
        raise UserError(f"no sweep file {path}; give a YAML file with groups, such as {like}")
    values, lines = parse_yaml(read_text(path), str(path))
    if not isinstance(values, dict) or not isinstance(values.get("groups"), dict) or not values["groups"]:
        raise UserError(f"{path}: a sweep file needs groups, each a name with a recipe")
    _known(values, ("groups", "charts"), str(path))
    groups: dict[str, Group] = {}
    for name, entry in values["groups"].items():
        where = f"{path}:{lines[f'groups.{name}']}: {name}"
        groups[str(name)] = _read_group(str(name), entry, where, groups, path.parent)
    charts = [
        _read_chart(str(name), entry, f"{path}:{lines[f'charts.{name}']}: {name}", groups)
        for name, entry in (values.get("charts") or {}).items()
    ]
    plan = Plan(path, groups, charts)
    _check_cells(plan, lines, sets)
    return plan


def _check_cells(plan: Plan, lines: dict[str, int], sets: Sequence[str]) -> None:
    for group in plan.groups.values():
        where = f"{plan.path}:{lines[f'groups.{group.name}']}: {group.name}"
        names = set()
        for cell in plan.examples(group):
            if cell.name in names:
                raise UserError(f"{where}: {cell.choice or 'a seed'} is there twice")
            if "/" in cell.name.removeprefix(f"{group.name}/") or len(cell.choice) > 200:
                raise UserError(f"{where}: {cell.choice} does not make a folder's name; put long values under set")
            names.add(cell.name)
            try:
                load_recipe(cell.recipe, [*cell.sets(), *sets])
            except UserError as error:
                raise UserError(f"{where}: {error}") from None


def _read_group(name: str, entry: Any, where: str, before: dict[str, Group], folder: Path) -> Group:
    entry = _mapping(entry, where)
    _known(entry, _GROUP_KEYS, where)
    if "/" in name:
        raise UserError(f"{where}: a group's name is a folder's; leave out the /")
    best_of = entry.get("best_of") or []
    best_of = [best_of] if isinstance(best_of, str) else best_of
    if not best_of and "recipe" not in entry:
        raise UserError(f"{where}: give a recipe, or best_of")
    for other in _list(best_of, f"{where}: best_of"):
        if other not in before:
            raise UserError(f"{where}: best_of names {other}, no group above it{did_you_mean(str(other), before)}")
    try:
        recipe = str(find_recipe(str(entry["recipe"]), beside=folder)) if "recipe" in entry else None
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    grid = {
        key: _list(choices, f"{where}: grid of {key}")
        for key, choices in _mapping(entry.get("grid", {}), f"{where}: grid").items()
    }
    variants = [
        _mapping(item, f"{where}: variants") for item in _list(entry.get("variants", [{}]), f"{where}: variants")
    ]
    seeds = _list(entry.get("seeds", [0]), f"{where}: seeds")
    if not all(isinstance(seed, int) for seed in seeds):
        raise UserError(f"{where}: seeds are {seeds}; expected whole numbers")
    alone = entry.get("alone", False)
    if not isinstance(alone, bool):
        raise UserError(f"{where}: alone is {alone!r}; expected true or false")
    trainer = entry.get("trainer", "tnllm")
    if trainer not in TRAINERS:
        raise UserError(f"{where}: trainer is {trainer!r}; allowed: {', '.join(TRAINERS)}")
    sets = _mapping(entry.get("set", {}), f"{where}: set")
    return Group(name, recipe, sets, grid, variants, seeds, best_of, alone, trainer)


def _read_chart(name: str, entry: Any, where: str, groups: dict[str, Group]) -> Chart:
    entry = _mapping(entry, where)
    _known(entry, _CHART_KEYS, where)
    chosen = _list(entry.get("groups"), f"{where}: groups")
    for group in chosen:
        if group not in groups:
            raise UserError(f"{where}: {group} is not a group{did_you_mean(str(group), groups)}")
    return Chart(name, str(entry.get("title", name)), str(entry.get("x", "tokens")), chosen)


def _known(entry: dict[str, Any], allowed: Sequence[str], where: str) -> None:
    for key in entry:
        if key not in allowed:
            raise UserError(
                f"{where}: {key} is not a key here; allowed: {', '.join(allowed)}{did_you_mean(key, allowed)}"
            )


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected `key: value` pairs, not {value!r}")
    return value


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        # An empty best_of is no best_of at all.
        if value == []:
            return []
        raise UserError(f"{where}: expected a list such as [1, 2], not {value!r}")
    return value
