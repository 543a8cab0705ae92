"""`tnllm convert`: between released checkpoints, training checkpoints, adapters and Hugging Face folders."""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from tnllm import hub
from tnllm.cli.options import AS_JSON, check_choice, examples
from tnllm.errors import UserError
from tnllm.files import format_bytes, format_duration, parse_count
from tnllm.progress import Progress, log

if TYPE_CHECKING:
    from tnllm.convert.run import Options, Report
    from tnllm.convert.source import Source

EPILOG = examples(
    "tnllm convert TransNormerLLM-385M 385m --to tnllm",
    "tnllm convert runs/tiny tiny-hf --to hf",
    "tnllm convert my-adapter merged --to hf --base 385m",
    "tnllm convert 385m 385m-official --to official --dtype bfloat16",
    "tnllm convert TransNormerLLM2-7B-300B x --to tnllm --dry-run",
    "tnllm convert 385m 385m-int8 --to tnllm --quantize int8 --text book.txt",
    "tnllm convert runs/first first-onnx --to onnx --quantize int8",
    "tnllm convert runs/first first-web --to web --quantize int8",
    "tnllm convert runs/first first-hf --to hf --push my-org/first --licence apache-2.0",
)
FORMATS = ("tnllm", "hf", "official", "onnx", "web")
DTYPES = ("auto", "float32", "bfloat16", "float16")


def command(
    src: Path = typer.Argument(help="Released checkpoint, run, step or weights folder, adapter, or hf://ORG/NAME."),
    dst: Path = typer.Argument(help="The new folder."),
    to: str = typer.Option(
        ...,
        "--to",
        help="tnllm (weights folder), hf (for transformers), official (the released layout), onnx, or web (a page).",
    ),
    dtype: str = typer.Option("auto", help="Of the weights: auto (as they are), float32, bfloat16 or float16."),
    shard_size: str = typer.Option("5GB", help="Largest weight file, such as 500MB or 5GB (powers of 1000)."),
    quantize: str | None = typer.Option(None, help="int8, for --to tnllm, hf (needs torchao), onnx and web."),
    text: Path | None = typer.Option(None, help="UTF-8 text on which --quantize measures bits per byte (tnllm, hf)."),
    base: Path | None = typer.Option(None, help="Base weights of an adapter. Default: the folder the adapter names."),
    tokenizer: Path | None = typer.Option(None, help="tokenizer.model or *.tiktoken to use. Default: the source's."),
    runtime: Path = typer.Option(Path("node_modules/onnxruntime-web"), help="For --to web: that npm package."),
    licence: str | None = typer.Option(
        None, "--licence", "--license", help="Of the weights, for the model card of --to hf: apache-2.0, cc-by-4.0, ..."
    ),
    push: str | None = typer.Option(None, metavar="ORG/NAME", help="Upload the result of --to hf to the hub."),
    private: bool = typer.Option(False, "--private", help="If --push makes a new repository, others cannot see it."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Show the key map, what is missing or unexpected, and stop."),
    verify: bool = typer.Option(True, help="Check checksums, and compare logits before and after."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace DST if it exists."),
    json_: bool = AS_JSON,
) -> None:
    """Convert a model from one folder layout to another, and check the result."""
    check_choice("--to", to, FORMATS)
    check_choice("--dtype", dtype, DTYPES)
    check_choice("--quantize", quantize, ("int8",))
    shard_bytes = parse_count(shard_size.upper().removesuffix("B"), "--shard-size")
    if shard_bytes < 10**6:
        raise UserError(f"--shard-size is {shard_size!r}; give at least 1MB")
    if to != "hf" and (push or licence):
        raise UserError(
            f"{'--push' if push else '--licence'} is for --to hf, whose folder has a model card; --to is {to}"
        )
    if text is not None:
        _check_text(text, bool(quantize) and to in ("tnllm", "hf") and verify)
    if private and not push:
        raise UserError("--private is for --push")
    src = hub.local(src)
    if not src.is_dir():
        raise UserError(f"{src} is not a folder; give a folder with config.json and weights, or hf://ORG/NAME")

    from tnllm.convert.run import Options, convert
    from tnllm.modeling.weights import DTYPES as TYPES

    options = Options(
        to=to, dtype=None if dtype == "auto" else TYPES[dtype], shard_bytes=shard_bytes, quantize=quantize, base=base,
        tokenizer=tokenizer, runtime=runtime, verify=verify, overwrite=overwrite, licence=licence, text=text,
    )  # fmt: skip
    if dry_run:
        if to in ("onnx", "web"):
            raise UserError("--dry-run shows names of tensors, which a graph has not; leave it out, or see --to hf")
        _dry_run(src, options, json_)
        if push:
            log(f"would upload {dst} to hf://{hub.repo_name('hf://' + push)}; nothing was sent")
        return
    if push:
        hub.check_push(push)
    start = time.monotonic()
    with Progress(announce=True) as progress:
        report = convert(src, dst, options, progress.log, progress.update)
    elapsed = time.monotonic() - start
    for note in report.notes:
        log(f"note      {note}")
    if push:
        log(f"uploading to hf://{push} ...")
        log(f"uploaded  {hub.push(dst, push, private)}")
    if json_:
        print(json.dumps(_as_json(report, dst, elapsed)))
        return
    checked = "" if verify else ", nothing verified (--no-verify)"
    size = format_bytes(report.num_bytes)
    print(f"{dst}: {len(report.files)} files, {size} of weights, {format_duration(elapsed)}{checked}")
    if to == "tnllm" or (to == "hf" and not quantize):
        log(f'try       tnllm generate --model {dst} --prompt "Once upon a time"')
    if to == "web":
        log(f"try       python -m http.server --directory {dst}, and open http://127.0.0.1:8000")


def _check_text(text: Path, is_used: bool) -> None:
    if not is_used:
        raise UserError("--text is for --quantize int8 with --to tnllm or hf, and part of --verify")
    if not text.is_file():
        raise UserError(f"--text {text} is not a file; give a UTF-8 text")


def _as_json(report: "Report", dst: Path, elapsed: float) -> dict[str, object]:
    return {
        "folder": str(dst), "source": report.source.kind, "version": report.source.version,
        "parameters": report.source.num_parameters, "files": report.files, "weight_bytes": report.num_bytes,
        "largest_difference": report.difference, "share_of_largest_logit": report.share, "limit": report.limit,
        "notes": report.notes, "time_s": round(elapsed, 2),
    }  # fmt: skip


def _dry_run(src: Path, options: "Options", as_json: bool) -> None:
    """Show every key and its result; raises the conversion's own error if the keys do not fit."""
    from tnllm.convert.official import V3_NOTE
    from tnllm.convert.plan import make_plan
    from tnllm.convert.run import key_map, open_input, shard_names

    source = open_input(src, options.base)
    plan = make_plan(source, options.to, options.dtype, options.quantize)
    rows = key_map(source, plan)
    if as_json:
        result = {
            "source": source.kind, "version": source.version, "keys": rows, "missing": source.missing(),
            "unexpected": source.unexpected(), "wrong_shape": source.misshapen(),
            "files": shard_names(plan, options.shard_bytes), "weight_bytes": plan.num_bytes,
        }  # fmt: skip
        print(json.dumps(result))
    else:
        _print_map(source, rows)
        size = format_bytes(plan.num_bytes)
        print(
            f"would write {len(plan.outputs)} tensors, {size}, in {len(shard_names(plan, options.shard_bytes))} files"
        )
    if source.kind == "official" and source.version == "v3":
        log(f"note      {V3_NOTE}")
    source.check()


def _print_map(source: "Source", rows: list[dict]) -> None:
    width = max(len(row["source"]) for row in rows)
    for row in rows:
        shape = "x".join(map(str, row["shape"]))
        status = "  MISSING" if row["status"] != "ok" else ""
        print(f"{row['source']:{width}}  {shape:>13}  {row['dtype'] or '-':>8}  -> {', '.join(row['result'])}{status}")
    for key in source.unexpected():
        print(f"{key:{width}}  UNEXPECTED")
    for line in source.misshapen():
        print(f"WRONG SHAPE  {line}")
    if source.head_key:
        print(f"{source.head_key:{width}}  the embedding again (tied)")
