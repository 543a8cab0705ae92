"""`tnllm bench-stream`: a very long text against float64: memory, drift by position, where the naive form overflows."""

from pathlib import Path

import typer

from tnllm.cli.options import length, write_outputs
from tnllm.cli.tables import print_table
from tnllm.errors import RunError
from tnllm.progress import log

EPILOG = "Example:  tnllm bench-stream --tokens 64k --json stream.json"


def command(
    tokens: str = typer.Option("1m", help="Length of the text: 64k is 65536, 1m is 1048576."),
    preset: str = typer.Option("tiny", help="Size of the model, random weights."),
    json_file: Path | None = typer.Option(None, "--json", help="Write every figure as JSON."),
) -> None:
    """Stream a long text through a model on the CPU and compare with float64 on the way; exit 1 if it drifts.

    A million tokens take about ten minutes.
    """
    count = length(tokens, "--tokens")
    from tnllm.bench.report import environment_line, length_label, write_json
    from tnllm.bench.stream import bench_stream

    results = bench_stream(preset, count, log)
    print(environment_line(results["environment"]))
    columns = ["tokens read", "next logits", "32 steps", "state", "resident MiB", "tokens/s"]
    print_table(
        f"{preset}, float32 against float64: largest gap of logits over their standard deviation",
        columns,
        [
            [
                length_label(row["tokens"]), f"{row['logits_gap']:.1e}", f"{row['steps_gap']:.1e}",
                f"{row['state_error']:.1e}", f"{row['resident_mib']:.0f}", f"{row['tokens_per_s']:.0f}",
            ]
            for row in results["model"]
        ],
        right=columns,
    )  # fmt: skip
    columns = ["steps", "decay", "log decay", "error", "plain form", "naive form"]
    print_table(
        "one layer, step by step: relative error of the latest outputs",
        columns,
        [
            [
                length_label(row["tokens"]), row["decay"], f"{row['log_decay']:.3g}", f"{row['error']:.1e}",
                f"{row['plain_error']:.1e}",
                "finite" if row["naive_broken_at"] is None else f"not finite from token {row['naive_broken_at']}",
            ]
            for row in results["layer"]
        ],
        right=["steps", "log decay", "error", "plain form"],
    )  # fmt: skip
    write_outputs(results, (json_file, write_json))
    if not results["passed"]:
        raise RunError(f"float32 drifts from float64 by more than {results['limit']:g}; see the table")
