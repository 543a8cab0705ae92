"""One conversion: open, plan, write to a temporary folder, verify checksums, compare logits, rename.

    report = convert(Path("TransNormerLLM-385M"), Path("385m"), Options(to="tnllm"), log=print, progress=lambda *_: None)

The destination appears only if every check passed.
"""

import hashlib
import math
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

from tnllm import hub
from tnllm.convert import check
from tnllm.convert.checksums import SUMS, Progress, reading, recorded_sums, verify_archives, verify_sums
from tnllm.convert.official import V3_NOTE
from tnllm.convert.onnx import MODEL, check_onnx, check_web, compare_with, write_onnx, write_page
from tnllm.convert.plan import Plan, make_plan
from tnllm.convert.source import Source, open_source, with_products
from tnllm.convert.targets import folder_files
from tnllm.convert.tensors import open_tensors
from tnllm.convert.writer import write_shards
from tnllm.errors import CheckFailed, RunError, Terminated, UserError
from tnllm.files import LOCK, check_output_folder, format_bytes, only_writer, written_folder
from tnllm.modeling.lora import ADAPTER_CONFIG, read_adapter
from tnllm.modeling.weights import split_shards
from tnllm.tokenizer import Tokenizer


@dataclass(frozen=True)
class Options:
    to: str  # tnllm, hf, official, onnx or web
    dtype: torch.dtype | None = None  # None keeps the source's
    shard_bytes: int = 5 * 10**9
    quantize: str | None = None  # int8, for tnllm, hf, onnx and web
    text: Path | None = None  # on which int8 weights are measured
    base: Path | None = None  # of an adapter
    tokenizer: Path | None = None  # instead of the source's
    runtime: Path = Path("node_modules/onnxruntime-web")  # for web
    licence: str | None = None  # of the weights, for the model card
    verify: bool = True
    overwrite: bool = False


@dataclass(frozen=True)
class Report:
    """Outcome of a conversion. `difference` is absolute, `share` relative to the largest logit; None if not checked."""

    source: Source
    files: list[str]
    num_bytes: int
    difference: float | None
    share: float | None
    limit: float | None
    notes: list[str]


def open_input(path: Path, base: Path | None = None) -> Source:
    """Open a folder or hub name; for an adapter, its base (`base`, or the folder it names) with the adapter merged in."""
    path = hub.local(path)
    if not (path / ADAPTER_CONFIG).is_file():
        if base is not None:
            raise UserError(f"--base is for adapters; {path} has no {ADAPTER_CONFIG}")
        return open_source(path)
    adapter = read_adapter(path)
    named = base or adapter.settings.get("base_model_name_or_path")
    base = hub.local(base) if base else Path(named) if named else None
    if base is None or not base.is_dir():
        raise UserError(
            f"the adapter's base {str(base)!r} is not a folder here; give it with --base FOLDER or --base hf://ORG/NAME"
        )
    source = open_source(base)
    source.check()
    adapter.check(source.expected, str(source.folder), "give its own base with --base")
    return with_products(source, adapter.pairs, adapter.product, str(adapter.folder))


def convert(path: Path, target: Path, options: Options, log: Callable[[str], None], progress: Progress) -> Report:
    """Convert the folder at `path` to a new folder `target`; `log` gets lines for people.

    Raises UserError for what cannot be converted, RunError for damaged input or a full disk, CheckFailed if the logits of
    the result differ from the source's.
    """
    if target.name in ("", "..") or target.is_symlink():
        # A link stays a link to the new folder; the present folder has a name too.
        target = target.resolve()
    source = open_input(path, options.base)
    _check_target(source, path, target)
    with _ended_by_sigterm(), only_writer(target):
        return _convert(source, path, target, options, log, progress)


def _convert(
    source: Source, path: Path, target: Path, options: Options, log: Callable[[str], None], progress: Progress
) -> Report:
    if not options.overwrite and any(file.name != LOCK for file in target.iterdir()):
        raise UserError(f"{target} exists and is not empty; give another folder, or --overwrite to replace it")
    source.check()
    # The graph is that of the model in a Hugging Face folder.
    graph = options.to in ("onnx", "web")
    if graph:
        check_onnx(source.config, options.dtype)
    to, dtype, quantize = ("hf", torch.float32, None) if graph else (options.to, options.dtype, options.quantize)
    plan = make_plan(source, to, dtype, quantize)
    files, copies, notes = folder_files(source, path, plan, options.tokenizer, options.licence)
    if options.to == "web":
        check_web(source.num_parameters, [*files, *copies], options.runtime)
    notes = [*source.notes, *notes]
    if source.kind == "official" and source.version == "v3":
        notes.append(V3_NOTE)
    log(f"source    {source.kind} {source.version}, {source.num_parameters:,} parameters, {source.tensors.form}")
    if options.verify:
        _verify_source(source, log, progress)
    source.check_tied_head()
    _check_space(target, plan.num_bytes + sum(file.stat().st_size for file in copies.values()))
    with _new_folder(target) as temporary:
        folder = temporary / "hf" if graph else temporary
        folder.mkdir(exist_ok=True)
        _write(folder, plan, files, copies, options.shard_bytes, progress)
        checked: tuple[float, float, float] | None = None
        num_bytes = plan.num_bytes
        if options.verify:
            verify_sums(recorded_sums(folder, sorted(folder.iterdir())), progress)
            checked = _compare(source, folder, plan, options.text, progress, notes)
            _require_equal(checked, target, log)
        if graph:
            log("exporting the graph ...")
            write_onnx(folder, temporary, bool(options.quantize), log)
            if options.to == "web":
                write_page(temporary, options.runtime)
            num_bytes = sum(file.stat().st_size for file in temporary.glob(f"{MODEL}*"))
            if options.verify:
                allowed = check.LIMITS["int8 graph" if options.quantize else "same"]
                checked = (*compare_with(folder, temporary / MODEL), allowed)
                _require_equal(checked, target, log)
            shutil.rmtree(folder)
    names = sorted(file.name for file in target.iterdir())
    difference, share, limit = checked or (None, None, None)
    return Report(source, names, num_bytes, difference, share, limit, notes)


def _require_equal(checked: tuple[float, float, float], target: Path, log: Callable[[str], None]) -> None:
    difference, share, limit = checked
    log(f"logits    largest difference {difference:.2e}, {share:.2e} of the largest logit (limit {limit:.0e})")
    # Written so that NaN fails.
    if not share <= limit:
        raise CheckFailed(
            f"the logits of the result differ from the source's by {difference:.3g}, {share:.2e} of the largest "
            f"(limit {limit:.0e}); nothing was kept at {target}"
        )


def _check_target(source: Source, path: Path, target: Path) -> None:
    # The folder is made beside its place first.
    for folder in (target, target.absolute().parent):
        check_output_folder(folder, "DST")
    if target.is_mount():
        # It would only fail at the end, when the complete folder is renamed to it.
        raise UserError(f"{target} is a mount point, which cannot be replaced; give a new folder inside it")
    inputs = {path.resolve(), source.folder.resolve()}
    if target.resolve() in {folder for each in inputs for folder in (each, *each.parents)}:
        raise UserError(f"{target} holds the source; give another folder")


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
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the block as an exception does, so that what it began is undone."""

    def stop(*_: object) -> None:
        # A second one must not interrupt the clearing up.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise SystemExit(143)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except SystemExit as error:
        if error.code != 143:
            raise
        raise Terminated("stopped by SIGTERM") from None
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """`written_folder`, with a full disk and the like as RunError."""
    try:
        with written_folder(target, "convert") as temporary:
            yield temporary
    except OSError as error:
        raise RunError(f"cannot write {target.parent} ({error.strerror or error}); nothing was left there") from error


def _verify_source(source: Source, log: Callable[[str], None], progress: Progress) -> None:
    files = source.tensors.files
    sums = recorded_sums(source.folder, files)
    verify_sums(sums, progress)
    verify_archives([file for file in files if file not in sums], progress)
    log(f"checksums {len(sums)} of {len(files)} weight files have a recorded SHA-256{'; all match' if sums else ''}")


def _write(
    folder: Path, plan: Plan, files: dict[str, str], copies: dict[str, Path], shard_bytes: int, progress: Progress
) -> None:
    sums = write_shards(folder, plan.outputs, shard_bytes, plan.metadata, progress)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
        sums[name] = hashlib.sha256(text.encode()).hexdigest()
    for name, file in copies.items():
        with reading(file):
            data = file.read_bytes()
        (folder / name).write_bytes(data)
        # Of the original, so that the check below sees a bad copy.
        sums[name] = hashlib.sha256(data).hexdigest()
    text = "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))
    (folder / SUMS).write_text(text, encoding="utf-8")


def _compare(
    source: Source, folder: Path, plan: Plan, text: Path | None, progress: Progress, notes: list[str]
) -> tuple[float, float, float]:
    """Absolute and relative difference of the logits, and the limit of the relative one; appends to `notes`."""
    config = source.config
    before = check.reference_logits(config, source.read, progress)
    if plan.rounds and plan.quantizer is None:
        # Rounding moves the logits by more than the limit, so the result is compared with the rounded source.
        dtypes = {name: outputs[0].dtype for name, outputs in plan.by_name.items()}
        exact = before
        before = check.reference_logits(config, lambda name: source.read(name).to(dtypes[name]), progress)
        moved, share = check.compare(exact, before)
        notes.append(f"rounding to {plan.dtype} moves the logits by up to {moved:.2e}, {share:.2e} of the largest")
    read: Callable[[str], Tensor]
    tensors = open_tensors(folder, allow_int8=plan.quantizer is not None)
    baseline = config.kind == "transformer"
    if plan.quantizer is not None or (baseline and plan.to == "hf"):
        read = plan.reader(tensors)
    else:
        result = open_source(folder)
        result.check()
        read = result.read
    if plan.to == "hf" and find_spec("transformers") is not None:
        if baseline:
            after = check.llama_logits(config, tensors.read, folder, progress)
        else:
            after = check.exported_logits(config, read, folder, progress)
    else:
        if plan.to == "hf":
            notes.append(
                "transformers is not installed: the folder's weights were checked, its Python code was not run"
            )
        after = check.block_logits(config, read, progress)
    if plan.quantizer is None:
        return *check.compare(before, after), check.LIMITS["same"]
    notes.append(f"{check.agreement(before, after):.1%} of the check's tokens have the same most likely successor")
    if text is not None:
        notes.append(_measure(source, read, Tokenizer.load(folder), text, progress))
    return *check.compare(before, after), check.LIMITS["int8"]


def _measure(
    source: Source, read: Callable[[str], Tensor], tokenizer: Tokenizer, text: Path, progress: Progress
) -> str:
    """What rounding costs on the start of a text, as a line for people."""
    try:
        with reading(text):
            ids = tokenizer.encode(text.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"--text {text} is not UTF-8 (byte {error.start})") from None
    if len(ids) < 2:
        raise UserError(f"--text {text} has {len(ids)} tokens; give at least two")
    rows = check.text_rows(ids, source.config.vocab_size)
    num_bytes = sum(len(tokenizer.token_bytes[id]) for row in rows.tolist() for id in row[1:])
    before, after = (check.block_logits(source.config, each, progress, rows) for each in (source.read, read))
    bits = [check.nats(logits, rows) / math.log(2) / max(1, num_bytes) for logits in (before, after)]
    same = check.agreement(before, after)
    return (
        f"{text}: {bits[0]:.4f} bits per byte before and {bits[1]:.4f} after ({bits[1] / bits[0] - 1:+.2%}); {same:.1%} of "
        f"{rows.numel():,} tokens have the same most likely successor"
    )


def key_map(source: Source, plan: Plan) -> list[dict[str, Any]]:
    """Return the rows that `--dry-run` prints: each key of the source and the tensors written for it."""
    infos = source.tensors.infos
    return [
        {
            "source": key, "shape": list(source.expected[name]),
            "dtype": str(infos[key].dtype).removeprefix("torch.") if key in infos else None,
            "result": [output.name for output in plan.by_name[name]], "status": "ok" if key in infos else "missing",
        }
        for name, key in source.keys.items()
    ]  # fmt: skip


def shard_names(plan: Plan, shard_bytes: int) -> dict[str, int]:
    """Return the weight files of the result: name → bytes of tensors."""
    sizes = {output.name: output.num_bytes for output in plan.outputs}
    return {file: sum(sizes[name] for name in names) for file, names in split_shards(sizes, shard_bytes).items()}
