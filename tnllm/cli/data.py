"""`tnllm data`: clean a corpus, turn it into token shards, and inspect either."""

import time
from enum import StrEnum
from pathlib import Path
from typing import Any

import typer

from tnllm.cli import data_clean, options
from tnllm.errors import UserError
from tnllm.tables import print_json

app = typer.Typer(
    help="Prepare and inspect training data.",
    no_args_is_help=True,
    cls=options.Group,
    epilog=options.examples(
        "tnllm data clean data/sample -o clean-out",
        "tnllm data tokenize clean-out/clean -o tokens",
        "tnllm data inspect tokens --verify",
    ),
)
SplitOn = StrEnum("SplitOn", {"none": "none", "blank_line": "blank-line", "line": "line"})
Sample = StrEnum("Sample", {"sample": "sample", "dirty": "dirty-sample"})


@app.command(
    epilog=options.examples(
        "tnllm data tokenize sample -o tokens",
        "tnllm data tokenize corpus/ web.jsonl.zst -o tokens --tokenizer my-tokenizer",
    )
)
def tokenize(
    inputs: list[str] = options.CORPUS,
    out: str = typer.Option(..., "--out", "-o", help="Folder or URL for the shards; run again to resume after a stop."),
    tokenizer: Path | None = options.TOKENIZER,
    field: str = options.FIELD,
    split_on: SplitOn = typer.Option(SplitOn.none, help="Cut text files into documents; none: one a file."),
    val_fraction: float = typer.Option(0.01, help="Share of the documents held out for validation."),
    bos: bool = typer.Option(False, "--bos", help="Begin every document with the begin token."),
    on_error: options.OnError = typer.Option(options.OnError.stop, help="At a document that cannot be read."),
    workers: int | None = typer.Option(None, min=1, help="Processes. [default: by cores and corpus size]"),
    shard_tokens: str = typer.Option("100M", help="Tokens per shard, such as 100M."),
    overwrite: bool = options.OVERWRITE,
) -> None:
    """Turn a corpus into memory-mapped token shards with a manifest; a stopped run resumes."""
    from tnllm import assets
    from tnllm.data.encode import Options
    from tnllm.data.remote import find_sources
    from tnllm.data.shards import MANIFEST
    from tnllm.data.tokenize import tokenize_corpus
    from tnllm.data.upload import begin_output, finish_output
    from tnllm.files import format_duration, parse_count
    from tnllm.progress import corpus_progress
    from tnllm.tokenizer import Tokenizer

    start = time.monotonic()
    reading = Options(field, split_on.value, val_fraction, bos)
    folder = begin_output(out, inputs)
    with corpus_progress("tokenize") as report:
        manifest = tokenize_corpus(
            find_sources(inputs),
            folder,
            Tokenizer.load(assets.tokenizer_model(tokenizer)),
            reading,
            on_error=on_error.value,
            workers=workers,
            shard_tokens=max(1, parse_count(shard_tokens, "--shard-tokens")),
            overwrite=overwrite,
            report=report,
        )
    finish_output(out, folder, last=MANIFEST)
    seconds = format_duration(time.monotonic() - start)
    for split in ("train", "val"):
        print(
            f"{split:6}{manifest.total('documents', split):>12,} documents "
            f"{manifest.total('tokens', split):>16,} tokens {manifest.total('text_bytes', split):>16,} bytes"
        )
    skipped = manifest.skipped
    left_out = f", left out {skipped['empty']} empty and {skipped['bad']} bad documents"
    count = len(manifest.shards)
    print(f"{out}: {count} shard{'s' * (count != 1)} in {seconds}{left_out * any(skipped.values())}")


@app.command(epilog=options.examples("tnllm data inspect dirty-sample", "tnllm data inspect tokens --verify"))
def inspect(
    source: str = typer.Argument(
        ..., metavar="PATH", help="A folder of token shards or of a cleaning run, corpus files, sample or dirty-sample."
    ),
    field: str = options.FIELD,
    samples: int = typer.Option(2, min=0, help="Show the start of this many documents."),
    verify: bool = typer.Option(False, "--verify", help="Compare every shard with its hash."),
    reason: str | None = typer.Option(None, help="Of a cleaning run: show documents rejected for this step or reason."),
    as_json: bool = options.AS_JSON,
) -> None:
    """Count what token shards, a cleaning run or a corpus holds, and show some of it."""
    path = Path(source)
    if (path / "recipe.json").is_file():
        data_clean.show_run(path, reason, samples, as_json)
        return
    if reason is not None:
        raise UserError(f"--reason is for the folder of a cleaning run, and {path} is not one")
    from tnllm.data.inspect import inspect_corpus, inspect_shards
    from tnllm.data.remote import find_sources
    from tnllm.data.shards import is_shard_folder
    from tnllm.progress import corpus_progress

    if is_shard_folder(path):
        summary = inspect_shards(path, samples, verify)
    elif verify:
        raise UserError(f"{path} is not a folder of token shards, so there is no hash to verify")
    else:
        with corpus_progress("read") as report:
            summary = inspect_corpus(find_sources([source]), field, report, samples)
    if as_json:
        print_json(summary)
    else:
        _show(summary)


@app.command(epilog=options.examples("tnllm data sample -o corpus", "tnllm data sample dirty-sample -o dirty"))
def sample(
    name: Sample = typer.Argument(Sample.sample, help="Which corpus that ships."),
    out: Path = typer.Option(..., "--out", "-o", help="Folder for its files, which must not be there."),
) -> None:
    """Write a corpus that ships, as plain JSON Lines with its licences. Every data command also takes its name."""
    from tnllm.data.sample import write_sample

    for path in write_sample(name.value, out):
        print(path)


@app.command(epilog=options.examples("tnllm data synth mqar -o mqar --seq-len 64 --pairs 4 --vocab 256"))
def synth(
    task: str = typer.Argument(..., help="mqar, recall, fuzzy, noisy or copy."),
    out: Path = options.OUT,
    rows: int = typer.Option(20_000, help="Rows to train on."),
    val_rows: int = typer.Option(1_000, help="Rows held out for validation."),
    seq_len: int = typer.Option(128, help="Tokens of a row; data.seq_len must be a multiple."),
    pairs: str = typer.Option("8", help="Keys of a row; tokens to copy. 4,8,16: of each in turn."),
    vocab: int | None = typer.Option(None, help="Ids are below this number. [default: the tokenizer's pieces]"),
    tokenizer: Path | None = options.TOKENIZER,
    seed: int = typer.Option(0, min=0, help="Of the rows; training and validation never share one."),
    overwrite: bool = options.OVERWRITE,
) -> None:
    """Write a synthetic task of recall as token shards of which only the answers are labels."""
    from tnllm import assets
    from tnllm.data.synth import Task, write_task
    from tnllm.progress import corpus_progress
    from tnllm.tokenizer import Tokenizer

    loaded = Tokenizer.load(assets.tokenizer_model(tokenizer))
    kinds = [
        Task(task, seq_len, count, vocab or loaded.vocab_size) for count in options.counts(pairs, "--pairs", "4,8,16")
    ]
    with corpus_progress(task) as report:
        manifest = write_task(out, kinds, loaded, rows, val_rows, seed, overwrite=overwrite, report=report)
    for split in ("train", "val"):
        print(f"{split:6}{manifest.total('documents', split):>12,} rows {manifest.total('tokens', split):>16,} tokens")


app.command("clean", epilog=data_clean.CLEAN_EPILOG)(data_clean.clean)
app.command("dedup", epilog=data_clean.DEDUP_EPILOG)(data_clean.dedup)
app.command("self-clean", epilog=data_clean.SELF_CLEAN_EPILOG)(data_clean.self_clean)
app.command("score", epilog=data_clean.SCORE_EPILOG)(data_clean.score)


def _show(summary: dict[str, Any], indent: str = "") -> None:
    for name, value in summary.items():
        label = f"{indent}{name.replace('_', ' '):30}"
        if isinstance(value, dict):
            print(label.rstrip())
            _show(value, indent + "  ")
        elif isinstance(value, list):
            print(f"{label}none" if not value else label.rstrip())
            for item in value:
                print(f"{indent}  {item!r}" if isinstance(item, str) else f"{indent}  {item}")
        else:
            print(f"{label}{value:,}" if isinstance(value, int) and not isinstance(value, bool) else f"{label}{value}")
