"""One conversion from end to end: look, refuse or plan, write aside, verify, compare logits, rename.

    report = convert(Path("TransNormerLLM-385M"), Path("385m"), Options(to="tnllm"), say=print)

Nothing is left at the destination unless every check passed.
"""

import hashlib
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tnllm.convert import check
from tnllm.convert.adapter import is_adapter, merge, open_adapter
from tnllm.convert.checksums import SUMS, Progress, recorded_sums, verify_archives, verify_sums, write_sums
from tnllm.convert.official import V3_NOTE, Layout
from tnllm.convert.plan import Plan, make_plan
from tnllm.convert.source import Source, open_source
from tnllm.convert.targets import folder_files
from tnllm.convert.tensors import open_tensors
from tnllm.convert.writer import plan_shards, write_shards
from tnllm.errors import CheckFailed, RunError, UserError
from tnllm.files import format_bytes, replace_dir

FORMATS = ("tnllm", "hf", "official")


@dataclass(frozen=True)
class Options:
    """How to convert. `settings` are `KEY=VALUE` of `Layout`."""

    to: str
    dtype: torch.dtype | None = None  # None keeps the source's
    shard_bytes: int = 5 * 10**9
    quantize: str | None = None  # int8
    base: Path | None = None  # of an adapter
    tokenizer: Path | None = None  # instead of the source's
    settings: tuple[str, ...] = ()
    verify: bool = True
    overwrite: bool = False


@dataclass(frozen=True)
class Report:
    """What a conversion did. `difference` is absolute and `share` relative to the largest logit; None without the check."""

    source: Source
    files: list[str]
    num_bytes: int
    difference: float | None
    share: float | None
    limit: float | None
    notes: list[str]


def open_input(named: Path, options: Options) -> Source:
    """The source, or the base of an adapter with the adapter merged in."""
    layout = Layout().with_settings(list(options.settings))
    if not is_adapter(named):
        if options.base is not None:
            raise UserError(f"--base is for adapters; {named} has no adapter_config.json")
        return open_source(named, layout)
    adapter = open_adapter(named)
    base = options.base or adapter.base
    if base is None or not base.is_dir():
        raise UserError(f"the adapter's base {str(base)!r} is no folder here; give it with --base FOLDER")
    source = open_source(base, layout)
    source.check()
    return merge(adapter, source)


def convert(named: Path, target: Path, options: Options, say: Callable[[str], None], progress: Progress) -> Report:
    """Convert the folder `named` to a new folder `target`.

    `say` gets lines for people. Raises UserError for what cannot be converted, RunError for damaged input or a full disk,
    CheckFailed where the result does not compute what the source does.
    """
    source = open_input(named, options)
    layout = Layout().with_settings(list(options.settings))
    _check_target(source, named, target, options.overwrite)
    source.check()
    plan = make_plan(source, options.to, options.dtype, options.quantize, layout)
    files, copies, notes = folder_files(source, named, plan, options.tokenizer)
    notes = [*source.notes, *notes]
    if source.kind == "official" and source.version == "v3":
        notes.append(V3_NOTE)
    say(f"source    {source.kind} {source.version}, {source.num_parameters:,} parameters, {source.tensors.form}")
    if options.verify:
        _verify_source(source, say, progress)
    source.check_tied_head()
    needed = plan.num_bytes + sum(file.stat().st_size for file in copies.values())
    _check_space(target, needed)
    aside = target.with_name(f"{target.name}.tmp-convert")
    with _cleaned(aside):
        _write(aside, plan, files, copies, options.shard_bytes, progress)
        difference = share = limit = None
        if options.verify:
            verify_sums(recorded_sums(aside, sorted(aside.iterdir())), progress)
            difference, share, limit = _compare(source, aside, plan, options, layout, progress, notes)
            say(f"logits    largest difference {difference:.2e}, {share:.2e} of the largest logit (limit {limit:.0e})")
            if not share <= limit:
                raise CheckFailed(
                    f"the logits of the result differ from the source's by {difference:.3g}, {share:.2e} of the largest "
                    f"(limit {limit:.0e}); nothing was kept at {target}"
                )
        replace_dir(aside, target)
    names = sorted(file.name for file in target.iterdir())
    return Report(source, names, plan.num_bytes, difference, share, limit, notes)


def _check_target(source: Source, named: Path, target: Path, overwrite: bool) -> None:
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} is a file; give a new folder")
    inputs = {named.resolve(), source.folder.resolve()}
    if target.resolve() in {folder for path in inputs for folder in (path, *path.parents)}:
        raise UserError(f"{target} holds the source; give another folder")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise UserError(f"{target} exists and is not empty; give another folder, or --overwrite to replace it")


def _check_space(target: Path, needed: int) -> None:
    folder = target.resolve().parent
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise RunError(
            f"{target} needs {format_bytes(needed)} and {folder} has {format_bytes(free)} free; nothing was written"
        )


@contextmanager
def _cleaned(aside: Path) -> Iterator[None]:
    """An empty folder that is gone afterwards, whatever happens: errors, Ctrl-C, SIGTERM."""
    made = [folder for folder in aside.parents if not folder.exists()]
    shutil.rmtree(aside, ignore_errors=True)

    def stop(*_: object) -> None:
        raise SystemExit(143)

    before = signal.signal(signal.SIGTERM, stop) if threading.current_thread() is threading.main_thread() else None
    try:
        aside.mkdir(parents=True)
        yield
    except OSError as error:
        raise RunError(f"cannot write {aside.parent} ({error.strerror or error}); nothing was left there") from error
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
        shutil.rmtree(aside, ignore_errors=True)
        for folder in made:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def _verify_source(source: Source, say: Callable[[str], None], progress: Progress) -> None:
    root = source.folder
    sums = recorded_sums(root, source.tensors.files)
    verify_sums(sums, progress)
    verify_archives([file for file in source.tensors.files if file not in sums], progress)
    count = len(source.tensors.files)
    say(f"checksums {len(sums)} of {count} weight files have a recorded SHA-256{'; all match' if sums else ''}")


def _write(
    aside: Path, plan: Plan, files: dict[str, str], copies: dict[str, Path], shard_bytes: int, progress: Progress
) -> None:
    sums = write_shards(aside, plan.outputs, shard_bytes, plan.metadata, progress)
    for name, text in files.items():
        (aside / name).write_text(text, encoding="utf-8")
        sums[name] = hashlib.sha256(text.encode()).hexdigest()
    for name, file in copies.items():
        shutil.copyfile(file, aside / name)
        sums[name] = hashlib.sha256(file.read_bytes()).hexdigest()
    (aside / SUMS).write_text(write_sums(sums), encoding="utf-8")


def _compare(
    source: Source, aside: Path, plan: Plan, options: Options, layout: Layout, progress: Progress, notes: list[str]
) -> tuple[float, float, float]:
    """Absolute and relative difference of the logits, and the limit."""
    config = source.config
    restate = check.reference_logits if config.kind == "transnormer" else check.block_logits
    before = restate(config, source.read, progress)
    if plan.rounds and plan.quantizer is None:
        # A cast moves the logits by what the model makes of rounding; the result must be exactly the rounded source.
        kinds = {name: outputs[0].dtype for name, outputs in plan.by_name.items()}
        exact = before
        before = restate(config, lambda name: source.read(name).to(kinds[name]), progress)
        moved, share = check.compare(exact, before)
        notes.append(f"rounding to {plan.dtype} moves the logits by up to {moved:.2e}, {share:.2e} of the largest")
    read: Callable[[str], Tensor]
    if plan.quantizer is not None:
        read = plan.reader_of_quantized(open_tensors(aside, allow_int8=True))
    else:
        result = open_source(aside, layout)
        result.check()
        read = result.read
    if options.to == "hf" and find_spec("transformers") is not None:
        after = check.exported_logits(config, read, aside, progress)
    else:
        if options.to == "hf":
            notes.append(
                "transformers is not installed: the folder's weights were checked, its Python code was not run"
            )
        after = check.block_logits(config, read, progress)
    return *check.compare(before, after), check.LIMITS["int8" if plan.quantizer else "same"]


def key_map(source: Source, plan: Plan) -> list[dict[str, Any]]:
    """What `--dry-run` shows: every key of the source and what becomes of it."""
    rows = []
    for name, key in source.keys.items():
        present = key in source.tensors.infos
        rows.append(
            {
                "source": key,
                "shape": list(source.expected[name]),
                "dtype": str(source.info(name).dtype).removeprefix("torch.") if present else None,
                "result": [output.name for output in plan.by_name[name]],
                "status": "ok" if present else "missing",
            }
        )
    return rows


def shard_names(plan: Plan, shard_bytes: int) -> dict[str, int]:
    """File name → bytes of tensors."""
    return {
        name: sum(output.num_bytes for output in shard)
        for name, shard in plan_shards(plan.outputs, shard_bytes).items()
    }
