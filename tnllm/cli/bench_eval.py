"""`tnllm bench-eval`: scoring with shared prefixes against one request at a time."""

from pathlib import Path
from typing import Any

import typer

from tnllm.cli import options
from tnllm.errors import RunError, UserError
from tnllm.progress import Progress, log

EPILOG = options.examples(
    "tnllm eval requests mmlu.npz.xz --tasks mmlu --num-fewshot 5 --data-dir data",
    "tnllm bench-eval mmlu.npz.xz --preset 385m --json mmlu-385m.json",
)


def command(
    file: Path = typer.Argument(..., help="Requests that `tnllm eval requests` wrote."),
    model: str | None = options.MODEL,
    preset: str | None = typer.Option(None, help="A preset with random weights instead, such as 385m: equal times."),
    questions: int | None = typer.Option(None, min=1, help="Only the first N questions."),
    plain: bool = typer.Option(True, help="Also score one request at a time, and compare."),
    batch_tokens: int | None = options.BATCH_TOKENS,
    device: str = options.DEVICE,
    dtype: str = options.DTYPE,
    json_file: Path | None = options.JSON_FILE,
) -> None:
    """Score the same questions with and without shared prefixes: answers compared, tokens and time counted."""
    options.check_outputs(json_file)
    if model is not None and preset is not None:
        raise UserError("--model and --preset were given; give one of them")
    import torch

    from tnllm.bench.report import write_json
    from tnllm.device import describe_device, pick_device
    from tnllm.evaluation.request_file import load_bundle
    from tnllm.evaluation.sharing_bench import bench_sharing
    from tnllm.generation.loading import load, pick_dtype

    where = pick_device(device, "--device")
    wanted = pick_dtype(dtype, where)
    bundle = load_bundle(file)
    if preset is not None:
        from tnllm.modeling.config import get_preset
        from tnllm.modeling.model import build_model

        network = build_model(get_preset(preset), where, wanted or torch.bfloat16, seed=0).eval().requires_grad_(False)
        name = f"{preset}, random weights"
    else:
        ready = load(model, device, dtype)
        network, name = ready.model, str(model or "demo model")
    with Progress() as progress:
        results = bench_sharing(network, bundle, questions, plain, batch_tokens, log, progress.update)
    results = {
        "environment": {**describe_device(where), "dtype": network.dtype_name},
        "model": name, "file": str(file), "about": {k: v for k, v in bundle.about.items() if k != "tasks"}, **results,
    }  # fmt: skip
    _show(results)
    if json_file is not None:
        write_json(results, json_file)
    # Written so that NaN fails.
    agreement = results.get("agreement")
    if agreement and not agreement["largest_difference"] <= agreement["tolerance"]:
        raise RunError(
            f"shared and plain log-probabilities differ by {agreement['largest_difference']:.3g} at question "
            f"{agreement['question_of_largest']}, above the tolerance of {agreement['tolerance']:g}: "
            "its speeds do not count"
        )


def _show(results: dict[str, Any]) -> None:
    from tnllm.bench.report import environment_line, print_table

    environment, counts = results["environment"], results["counts"]
    print(f"{results['model']}, {environment_line(environment)}")
    print(
        f"{results['questions']:,} questions, {counts['requests']:,} requests; tokens one by one {counts['one_by_one']:,}, "
        f"equal inputs once {counts['equal_inputs_once']:,}, shared {counts['shared']:,}"
    )
    columns = [
        ("way", "{way}"), ("tokens computed", "{tokens:,}"), ("seconds", "{seconds:.2f}"),
        ("tokens/s", "{tokens_per_s:,.0f}"), ("requests/s", "{requests_per_s:,.1f}"), ("GiB", "{memory_gib:.1f}"),
        ("accuracy %", "{percent:.2f}"),
    ]  # fmt: skip
    print_table("", columns, [{**row, "percent": 100 * row["accuracy"]} for row in results["ways"]], left=("way",))
    if agreement := results.get("agreement"):
        print(
            f"shared against plain: {results['token_ratio']:.1f} x fewer tokens, {results['time_ratio']:.1f} x faster; "
            f"log-probabilities differ by {agreement['mean_difference']:.2g} on average, "
            f"{agreement['largest_difference']:.2g} at most (allowed {agreement['tolerance']:g})"
        )
        changed = agreement["changed"]
        within = agreement["margins_within_difference"]
        print(
            f"{len(changed)} of {results['questions']:,} answers differ; {within} have a margin within twice that largest "
            "difference"
        )
        for row in changed[:20]:
            print(
                f"  question {row['question']}: choice {row['plain']} the plain way, {row['shared']} shared; "
                f"the plain way's two most likely are {row['margin']:.2g} apart"
            )
        if len(changed) > 20:
            print(f"  and {len(changed) - 20} more (all with --json)")
