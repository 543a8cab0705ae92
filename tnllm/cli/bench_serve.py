"""`tnllm bench-serve`: many streams at once against a running server."""

import os
import resource
from pathlib import Path

import typer

from tnllm.cli import options
from tnllm.errors import RunError
from tnllm.progress import log

EPILOG = options.examples("tnllm bench-serve --streams 100 --tokens 64   (with tnllm serve running)")


def command(
    url: str = typer.Option("http://127.0.0.1:8000", help="Address of the server."),
    streams: int = typer.Option(100, min=1, help="Streams open at the same time."),
    tokens: int = typer.Option(64, min=1, help="Tokens of each."),
    check: int = typer.Option(20, min=0, help="Streams requested again alone afterwards, to compare their texts."),
    api_key: str | None = typer.Option(None, help="The server's key; or the variable TNLLM_API_KEY."),
    json_file: Path | None = options.JSON_FILE,
) -> None:
    """Open many streams at once: is each answered completely and with its own text, and how fast? Exit 1 if not."""
    options.check_outputs(json_file)
    from tnllm.bench.report import write_json
    from tnllm.bench.serve import bench_serve

    # Each stream is a connection, and some systems allow 256 open files.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = streams + 64
    if soft < needed:
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (needed if hard == resource.RLIM_INFINITY else min(needed, hard), hard)
        )
    key = api_key if api_key is not None else os.environ.get("TNLLM_API_KEY")
    results = bench_serve(url, streams, tokens, check, key, log)
    failed, different = results["failed"], results["different"]
    print(f"{results['streams']} streams of {tokens} tokens at once: {results['whole']} complete, {len(failed)} failed")
    print(f"{results['checked']} requested again alone: {results['checked'] - len(different)} the same text")
    print(f"{results['seconds']:.1f} s in all, {results['tokens_per_s']:.0f} tokens/s together")
    for name, title in (("first_token_s", "to the first token"), ("between_tokens_s", "between two texts of a stream")):
        if spread := results[name]:
            print(
                f"{title}: median {spread['median']:.3f} s, 95 % within {spread['p95']:.3f} s, most {spread['most']:.3f} s"
            )
    memory = results["memory_mib"]
    print(
        f"server memory: {memory['before']:.0f} MiB before, {memory['peak']:.0f} at most, {memory['after']:.0f} after"
    )
    options.write_outputs(results, (json_file, write_json))
    if failed:
        raise RunError(f"{len(failed)} streams failed; the first: {failed[0]['error']}")
    if results["whole"] < streams:
        raise RunError(f"{streams - results['whole']} streams ended early")
    if different:
        raise RunError(f"streams {different[:10]} have another text when requested alone")
