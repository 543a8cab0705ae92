"""`tnllm bench-stream`: a very long text against float64: memory, drift by position, where the naive form overflows."""

from pathlib import Path

import typer

from tnllm.cli.options import check_outputs, examples, length, write_outputs
from tnllm.errors import RunError
from tnllm.progress import log

EPILOG = examples("tnllm bench-stream --tokens 64k --json stream.json")


def command(
    tokens: str = typer.Option("1m", help="Length of the text: 64k is 65536, 1m is 1048576."),
    preset: str = typer.Option("tiny", help="Size of the model, random weights."),
    json_file: Path | None = typer.Option(None, "--json", help="Write every figure as JSON."),
) -> None:
    """Stream a long text through a model on the CPU and compare with float64 on the way; exit 1 if it drifts.

    A million tokens take about ten minutes.
    """
    check_outputs(json_file)
    count = length(tokens, "--tokens")
    from tnllm.bench.report import environment_line, print_table, write_json
    from tnllm.bench.stream import bench_stream

    results = bench_stream(preset, count, log)
    print(environment_line(results["environment"]))
    columns = [
        ("tokens read", "{tokens:tokens}"), ("next logits", "{logits_gap:.1e}"), ("32 steps", "{steps_gap:.1e}"),
        ("state", "{state_error:.1e}"), ("resident MiB", "{resident_mib:.0f}"), ("tokens/s", "{tokens_per_s:.0f}"),
    ]  # fmt: skip
    title = f"{preset}, float32 against float64: largest gap of logits over their standard deviation"
    print_table(title, columns, results["model"])
    columns = [
        ("steps", "{tokens:tokens}"), ("decay", "{decay}"), ("log decay", "{log_decay:.3g}"), ("error", "{error:.1e}"),
        ("plain form", "{plain_error:.1e}"), ("naive form", "{naive}"),
    ]  # fmt: skip
    rows = [{**row, "naive": _naive(row["naive_broken_at"])} for row in results["layer"]]
    print_table("one layer, step by step: relative error of the latest outputs", columns, rows, ("decay", "naive form"))
    write_outputs(results, (json_file, write_json))
    if not results["passed"]:
        raise RunError(f"float32 drifts from float64 by more than {results['limit']:g}; see the table")


def _naive(broken_at: int | None) -> str:
    return "finite" if broken_at is None else f"not finite from token {broken_at}"
