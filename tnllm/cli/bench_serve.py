"""`tnllm bench-serve`: many streams at once against a running server."""

import os
import resource
import secrets
from functools import partial
from pathlib import Path

import typer

from tnllm.cli import options
from tnllm.errors import RunError
from tnllm.progress import log

EPILOG = options.examples(
    "tnllm bench-serve --streams 100 --tokens 64   (with tnllm serve running)",
    "tnllm bench-serve --streams 1,32,256 --prompt-tokens 2048 --tokens 2048 --check 0 --csv serve.csv",
)


def command(
    url: str = typer.Option("http://127.0.0.1:8000", help="tnllm serve, or another server with OpenAI's completions."),
    streams: str = typer.Option("100", help="Streams open at the same time; several numbers with commas, a row each."),
    requests: int = typer.Option(1, min=1, help="Requests of each stream, one after another."),
    prompt_tokens: int | None = typer.Option(None, min=1, help="Random tokens of a prompt. Default: a short sentence."),
    prefix_tokens: int = typer.Option(0, min=0, help="Random tokens before each prompt, the same for all."),
    tokens: int = typer.Option(64, min=1, help="Tokens of each answer."),
    check: int = typer.Option(20, min=0, help="Requests of the last row sent again alone, to compare their texts."),
    seed: int | None = typer.Option(None, min=0, help="Default: a new one: no prompt is in the server's cache."),
    api_key: str | None = typer.Option(None, help="The server's key; or the variable TNLLM_API_KEY."),
    json_file: Path | None = options.JSON_FILE,
    csv_file: Path | None = options.CSV_FILE,
) -> None:
    """Open many streams at once: is each answered completely and with its own text, and how fast? Exit 1 if not."""
    numbers = options.counts(streams, "--streams", "1,32,256")
    options.check_outputs(json_file, csv_file)
    from tnllm.bench.report import print_line, write_json
    from tnllm.bench.serve import Load, bench_serve
    from tnllm.bench.tables import SERVE
    from tnllm.files import write_csv

    # Each stream is a connection, and some systems allow 256 open files.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = max(numbers) + 64
    if soft < needed:
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (needed if hard == resource.RLIM_INFINITY else min(needed, hard), hard)
        )
    key = api_key if api_key is not None else os.environ.get("TNLLM_API_KEY")
    results = bench_serve(
        url, numbers, Load(tokens, prompt_tokens, prefix_tokens, requests), check,
        secrets.randbits(32) if seed is None else seed, key, log, partial(print_line, SERVE),
    )  # fmt: skip
    failed, different = results["failed"], results["different"]
    if results["checked"]:
        same = results["checked"] - len(different)
        print(f"{results['checked']} requested again alone: {same} the same text, "
              f"{len(results['of_another'])} the text of another stream")  # fmt: skip
    options.write_outputs(results, (json_file, write_json), (csv_file, lambda all, path: write_csv(path, all["rows"])))
    if failed:
        raise RunError(f"{len(failed)} streams failed; the first: {failed[0]}")
    if short := sum(row["requests"] - row["whole"] for row in results["rows"]):
        raise RunError(f"{short} streams ended early")
    if different:
        raise RunError(f"streams {different[:10]} have another text when requested alone")
