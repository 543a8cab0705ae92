"""`tnllm tokenizer`: train a SentencePiece tokenizer on a corpus, and show how one splits a text."""

import time
from collections.abc import Iterator
from pathlib import Path

import typer

from tnllm.cli.options import AS_JSON, CORPUS, FIELD, Group, OnError, examples
from tnllm.errors import UserError
from tnllm.tables import print_json

app = typer.Typer(
    help="Train and inspect tokenizers.",
    no_args_is_help=True,
    cls=Group,
    epilog=examples(
        "tnllm tokenizer inspect tnllm-8k --text 'Hello world'", "tnllm tokenizer train sample -o my-tokenizer"
    ),
)


@app.command(epilog=examples("tnllm tokenizer train corpus/ --vocab-size 32000 -o my-tokenizer"))
def train(
    context: typer.Context,
    inputs: list[str] = CORPUS,
    out: Path = typer.Option(..., "--out", "-o", help="Folder for tokenizer.model."),
    vocab_size: int = typer.Option(32000, help="Number of tokens, the 256 fallback bytes included."),
    field: str = FIELD,
    character_coverage: float = typer.Option(
        0.9995, help="Share of characters with a token of their own (0.98-1); the rest is spelled in bytes."
    ),
    max_lines: int = typer.Option(2_000_000, help="Train on a sample of this many lines of a larger corpus."),
    on_error: OnError = typer.Option(OnError.stop, help="At a document that cannot be read."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace an existing tokenizer."),
) -> None:
    """Train a BPE tokenizer with byte fallback: decoding gives back every text unchanged."""
    from tnllm.data.documents import LeftOut
    from tnllm.data.remote import find_sources, read_documents
    from tnllm.files import check_output_folder, format_bytes, format_duration, only_writer, write_bytes_atomic
    from tnllm.progress import corpus_progress, log
    from tnllm.tokenizer import FILE_NAME, train_tokenizer

    target = out / FILE_NAME
    files = find_sources(inputs)
    check_output_folder(out, "--out")
    context.with_resource(only_writer(out))
    if target.exists() and not overwrite:
        raise UserError(f"{target} exists; choose another --out or add --overwrite")
    on_bad = LeftOut() if on_error is OnError.skip else None
    advice = "fix it, or leave such documents out with --on-error skip"
    start = time.monotonic()
    with corpus_progress("read") as report:

        def texts() -> Iterator[str]:
            for document in read_documents(files, field, on_bad=on_bad, report=report, more=(), advice=advice):
                yield document.text
            log(f"corpus read; training {vocab_size} tokens")

        model = train_tokenizer(texts(), vocab_size, character_coverage=character_coverage, max_lines=max_lines)
    write_bytes_atomic(target, model)
    seconds = format_duration(time.monotonic() - start)
    print(f"{target}: {vocab_size} tokens, {format_bytes(len(model))}, trained in {seconds}")


@app.command(epilog=examples("tnllm tokenizer inspect my-tokenizer --text 'Hello world' --file sample.txt"))
def inspect(
    model: Path | None = typer.Argument(None, help="tokenizer.model, its folder, tnllm-8k (the default) or tnllm-64k."),
    text: str | None = typer.Option(None, help="Show the tokens of this text."),
    file: str | None = typer.Option(None, help="Count bytes per token over this text file or corpus."),
    field: str = typer.Option("text", help="Field or column of --file that holds the text."),
    as_json: bool = AS_JSON,
) -> None:
    """Show a tokenizer's size and special ids, and how it splits a text."""
    from tnllm import assets
    from tnllm.data.inspect import compression
    from tnllm.data.remote import find_sources
    from tnllm.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(assets.tokenizer_model(model))
    info: dict[str, object] = {
        "path": str(tokenizer.path),
        "sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        **{name: getattr(tokenizer, name) for name in ("unk_id", "bos_id", "eos_id", "pad_id")},
    }
    if text is not None:
        info["tokens"] = [[id, tokenizer.piece(id)] for id in tokenizer.encode(text)]
        info["decoded"] = tokenizer.decode(tokenizer.encode(text))
    if file is not None:
        info |= compression(tokenizer, find_sources([file]), field)
    if as_json:
        print_json(info)
        return
    for name, value in info.items():
        print(f"{name:16}{value!r}" if isinstance(value, str) and "\n" in value else f"{name:16}{value}")
