"""`tnllm bench-serve`: many streams at once against a running server."""

import os
import resource
import sys
from pathlib import Path

import typer

from tnllm.errors import RunError

EPILOG = "Example:  tnllm bench-serve --streams 100 --tokens 64   (with tnllm serve running)"


def command(
    url: str = typer.Option("http://127.0.0.1:8000", help="Address of the server."),
    streams: int = typer.Option(100, min=1, help="Streams open at the same time."),
    tokens: int = typer.Option(64, min=1, help="Tokens of each."),
    check: int = typer.Option(20, min=0, help="Streams asked again alone afterwards, to compare their texts."),
    api_key: str | None = typer.Option(None, help="The server's key; or the variable TNLLM_API_KEY."),
    json_file: Path | None = typer.Option(None, "--json", help="Write every figure as JSON."),
) -> None:
    """Open many streams at once: are all answered, whole, each with its own text, and how fast? Exit 1 if not."""
    from tnllm.bench.serve import bench_serve

    # Each stream is a connection, and some systems allow 256 open files.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = streams + 64
    if soft < wanted:
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard)
        )
    key = api_key if api_key is not None else os.environ.get("TNLLM_API_KEY")
    found = bench_serve(url, streams, tokens, check, key, _note)
    failed, different = found["failed"], found["different"]
    print(f"{found['streams']} streams of {tokens} tokens at once: {found['whole']} whole, {len(failed)} failed")
    print(f"{found['checked']} asked again alone: {found['checked'] - len(different)} the same text")
    print(f"{found['seconds']:.1f} s in all, {found['tokens_per_s']:.0f} tokens/s together")
    for name, title in (("first_token_s", "to the first token"), ("between_tokens_s", "between two texts of a stream")):
        if spread := found[name]:
            print(
                f"{title}: median {spread['median']:.3f} s, 95 % within {spread['p95']:.3f} s, most {spread['most']:.3f} s"
            )
    memory = found["memory_mib"]
    print(
        f"server memory: {memory['before']:.0f} MiB before, {memory['peak']:.0f} at most, {memory['after']:.0f} after"
    )
    if json_file is not None:
        from tnllm.bench.report import write_json

        write_json(found, json_file)
        _note(f"wrote {json_file}")
    if failed:
        raise RunError(f"{len(failed)} streams failed; the first: {failed[0]['error']}")
    if found["whole"] < streams:
        raise RunError(f"{streams - found['whole']} streams ended early")
    if different:
        raise RunError(f"streams {different[:10]} said something else when asked alone")


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
