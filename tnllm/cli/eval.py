"""`tnllm eval`: tasks of lm-evaluation-harness, comparison with other results or the paper, perplexity of a file."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import typer

from tnllm.cli import options
from tnllm.cli.evaluation_view import (
    quiet_libraries,
    quiet_transformers,
    show_check,
    show_comparison,
    show_results,
    show_tasks,
)
from tnllm.errors import CheckFailed, UserError
from tnllm.files import check_output_file, check_output_folder, only_writer
from tnllm.progress import Progress, ScoringProgress, corpus_progress, log
from tnllm.tables import print_json

EXAMPLES = options.examples(
    "tnllm eval --tasks mmlu,ceval",
    "tnllm eval --model runs/tiny --tasks piqa --data-dir data",
    "tnllm eval ls",
    "tnllm eval compare A.json B.json",
    "tnllm eval check --tasks piqa",
    "tnllm eval ppl book.txt",
    "tnllm eval niah --lengths 512,1k",
)
app = typer.Typer(cls=options.Group, epilog=EXAMPLES)
_prompt, _compute, _output = map(options.panel, ("Prompts", "Computing", "Output"))


@app.callback(invoke_without_command=True, epilog=EXAMPLES)
def run(
    context: typer.Context,
    tasks: str | None = typer.Option(
        None, "--tasks", "-t", help="Names with commas; `tnllm eval ls` lists them, tnl-paper is the paper's tables."
    ),
    model: str | None = options.MODEL,
    data_dir: Path | None = options.DATA_DIR,
    online: bool = typer.Option(False, "--online", help="Download each task's data from the Hugging Face hub instead."),
    include_path: Path | None = options.INCLUDE_PATH,
    limit: float | None = typer.Option(None, help="Only the first N questions of each task, or a share below 1."),
    num_fewshot: int | None = _prompt(None, "--num-fewshot", "-n", min=0, help=options.NUM_FEWSHOT.help),
    apply_chat_template: bool = _prompt(False, "--apply-chat-template", help="Put prompts into the model's turns."),
    fewshot_as_multiturn: bool = _prompt(True, help="With a chat template: each example as separate turns."),
    system_instruction: str | None = _prompt(None, help="Text before every prompt."),
    gen_kwargs: str | None = _prompt(None, help="For tasks that generate, such as temperature=0.5,do_sample=True."),
    seed: int = _prompt(1234, min=0, help="For randomly chosen examples and for sampling."),
    batch_size: str = _compute("auto", help="auto, or the most texts computed together."),
    batch_tokens: int | None = _compute(None, min=1, help="Most tokens together. Default 4096 on CPU, 32768 on a GPU."),
    share_prefix: bool = _compute(True, help="Read a prefix that prompts share once and fork its state."),
    use_cache: bool = _compute(False, "--use-cache", help="Keep answers on disk, so that a stopped run resumes."),
    cache_dir: Path | None = _compute(None, help="Where --use-cache keeps them. Default: ~/.cache/tnllm/eval."),
    device: str = _compute("auto", help="auto, cpu, cuda or cuda:N."),
    dtype: str = _compute("auto", help=options.DTYPE.help),
    out: Path | None = _output(None, "--out", "-o", "--output-path", help="Folder for results_*.json, as lm-eval's."),
    log_samples: bool = _output(False, "--log-samples", help="With --out: every question, prompt and answer."),
    subtasks: bool = _output(False, "--subtasks", help="Show every subject."),
    as_json: bool = _output(False, "--json", help="Print the results file instead of a table."),
) -> None:
    """Score a model on tasks of lm-evaluation-harness, from local files or the hub."""
    if context.invoked_subcommand is not None:
        return
    names = _names(tasks, "mmlu,ceval")
    if log_samples and out is None:
        raise UserError("--log-samples writes files; say where with --out DIR")
    _check_folders(data_dir, include_path, online)
    if batch_size != "auto" and not (batch_size.isdecimal() and int(batch_size)):
        raise UserError(f"--batch-size is {batch_size!r}; allowed: auto, or a number from 1")
    log("loading")
    quiet_libraries(names, online)

    from tnllm.evaluation.harness import TransNormerLM
    from tnllm.evaluation.run import Settings, evaluate, results_folder, write_results
    from tnllm.evaluation.tasks import choose, load_tasks
    from tnllm.modeling.weights import trained_length

    settings = Settings(
        limit, seed, apply_chat_template, fewshot_as_multiturn, system_instruction, _gen_kwargs(gen_kwargs), log_samples
    )
    if out is not None:
        check_output_folder(out, "--out")
    loaded = load_tasks(choose(names, num_fewshot, log, include_path), data_dir, online, log)
    options.log_default_model(model)
    folder = (cache_dir or Path.home() / ".cache" / "tnllm" / "eval") if use_cache or cache_dir else None
    with Progress() as progress:
        lm = TransNormerLM(
            model, device, dtype, batch_size, None, batch_tokens, share_prefix, folder, seed,
            log=log, progress=progress.update,
        )  # fmt: skip
        if out is not None and lm.rank == 0:
            context.with_resource(only_writer(results_folder(out, str(lm.ready.folder))))
        results = evaluate(lm, loaded, settings)
    if results is None:
        return
    trained = trained_length(lm.ready.folder)
    longest = results["tnllm"]["longest_tokens"]
    if trained is not None and longest > trained:
        log(f"the longest prompt has {longest:,} tokens, the model was trained on {trained:,}; nothing was cut off")
    if as_json:
        from lm_eval.utils import handle_non_serializable

        kept = {key: value for key, value in results.items() if key != "samples"}
        print_json(kept, default=handle_non_serializable)
    else:
        show_results(results, subtasks)
    if out is not None:
        log(f"results in {write_results(out, results, log_samples)}")


@app.command("ls", epilog=options.examples("tnllm eval ls", "tnllm eval ls 'arc*'", "tnllm eval ls --data-dir data"))
def list_tasks(
    pattern: str | None = typer.Argument(None, help="Search all of lm-evaluation-harness; * and ? match anything."),
    data_dir: Path | None = typer.Option(None, help="Say which sets are in this folder."),
    include_path: Path | None = options.INCLUDE_PATH,
    as_json: bool = options.AS_JSON,
) -> None:
    """List the tasks with offline data, or search all names."""
    if pattern is not None:
        quiet_libraries([], online=False)
        from tnllm.evaluation.tasks import search

        _check_folders(None, include_path)
        names = search(pattern, include_path)
        print(json.dumps(names) if as_json else "\n".join(names))
        return
    from tnllm.evaluation.cards import load_cards

    _check_folders(data_dir)
    rows = [
        {
            "task": card.name, "title": card.title, "aliases": card.aliases, "questions": card.questions,
            "licence": card.licence, "sample": card.sample, "source": card.source,
            "file": str(card.locate(data_dir) or "") if data_dir else None,
        }
        for card in load_cards().values()
    ]  # fmt: skip
    if as_json:
        print_json(rows)
    else:
        show_tasks(rows, data_dir is not None)


@app.command(
    "compare", epilog=options.examples("tnllm eval compare evals/a evals/b", "tnllm eval compare evals/a --paper 385m")
)
def compare_results(
    first: Path = typer.Argument(..., help="results_*.json, or a folder: its newest."),
    second: Path | None = typer.Argument(None, help="A second one."),
    paper: str | None = typer.Option(None, help="Compare with the paper's model: 385m, 1b, 7b or 15b."),
    as_json: bool = options.AS_JSON,
) -> None:
    """Compare two results, or one with the paper's table."""
    from tnllm.evaluation.compare import compare, differences, read_results

    if second is None and paper is None:
        raise UserError("nothing to compare with; give a second results file or --paper 385m")
    a, b = read_results(first), None if second is None else read_results(second)
    rows = compare(a, b, paper)
    notes = [] if b is None else differences(a, b)
    if as_json:
        print_json({"rows": rows, "notes": notes})
    else:
        show_comparison(rows, paper)
        for note in notes:
            log(note)


@app.command("ppl", epilog=options.examples("tnllm eval ppl book.txt", "tnllm eval ppl web.jsonl --window 2048 --json"))
def file_perplexity(
    file: Path = typer.Argument(..., help="Text, JSON Lines or parquet."),
    model: str | None = options.MODEL,
    field: str = options.FIELD,
    window: int | None = typer.Option(None, min=1, help="Also score independent windows of this many tokens."),
    batch_tokens: int | None = options.BATCH_TOKENS,
    device: str = options.DEVICE,
    dtype: str = options.DTYPE,
    as_json: bool = options.AS_JSON,
) -> None:
    """Perplexity of a file: each document read in full, its state carried from start to end."""
    from tnllm.cli.evaluation_view import show_perplexity
    from tnllm.evaluation.perplexity import perplexity
    from tnllm.generation.loading import load

    options.log_default_model(model)
    with corpus_progress("perplexity") as report:
        progress = ScoringProgress(report)
        texts = _Texts(file, field, progress)
        ready = load(model, device, dtype)
        result = perplexity(ready, texts, window, batch_tokens, progress.on_scored)
    if as_json:
        print(json.dumps({"file": str(file), "model": str(ready.folder), **result}))
    else:
        show_perplexity(result)


@app.command(
    "niah",
    epilog=options.examples(
        "tnllm eval niah --lengths 512,1k", "tnllm eval niah --haystack book.txt --depths 0,50 --json"
    ),
)
def needle(
    lengths_: str = typer.Option("1k,2k,4k", "--lengths", help="Tokens of a prompt: 1k,4k, or 1k:64k, doubling."),
    depths: str = typer.Option("0,25,50,75,100", help="Where the needle stands, in per cent of the text."),
    samples: int = typer.Option(8, "--samples", "-n", min=1, help="Prompts for each length and depth."),
    model: str | None = options.MODEL,
    haystack: Path | None = typer.Option(None, help="File whose sentences are the haystack. Default: made up."),
    seed: int = typer.Option(0, min=0, help="For numbers, cities and sentences."),
    batch_tokens: int | None = options.BATCH_TOKENS,
    device: str = options.DEVICE,
    dtype: str = options.DTYPE,
    as_json: bool = options.AS_JSON,
    csv: Path | None = options.CSV_FILE,
) -> None:
    """A needle in a haystack: find a number that the text gave long before, by length and depth."""
    from tnllm.evaluation.niah import FILLER, niah, split_sentences

    sizes = sorted(set(options.lengths(lengths_, "--lengths")))
    places = [part.strip() for part in depths.split(",")]
    if not all(part.isdecimal() and int(part) <= 100 for part in places):
        raise UserError(f"--depths is {depths!r}; write per cents from 0 to 100 with commas, such as 0,50,100")
    options.check_outputs(csv)
    from tnllm.cli.evaluation_view import show_needles
    from tnllm.files import write_csv
    from tnllm.generation.loading import load
    from tnllm.modeling.weights import trained_length

    sentences = FILLER if haystack is None else split_sentences("\n\n".join(_Texts(haystack, "text")))
    options.log_default_model(model)
    ready = load(model, device, dtype)
    trained = trained_length(ready.folder)
    if trained is not None and max(sizes) > trained:
        log(f"the longest prompts have {max(sizes):,} tokens, the model was trained on {trained:,}")
    with Progress() as progress:
        report = partial(progress.update, "niah")
        rows = niah(ready, sizes, sorted(set(map(int, places))), samples, seed, sentences, batch_tokens, report)
    if as_json:
        print_json({"model": str(ready.folder), "seed": seed, "rows": rows})
    else:
        show_needles(rows)
    options.write_outputs(rows, (csv, lambda found, file: write_csv(file, found)))


@app.command("check", epilog=options.examples("tnllm eval check --tasks openbookqa,piqa --data-dir data --limit 100"))
def check_against_harness(
    tasks: str = typer.Option(..., "--tasks", "-t", help="Multiple-choice tasks, with commas."),
    model: str | None = options.MODEL,
    data_dir: Path | None = options.DATA_DIR,
    include_path: Path | None = options.INCLUDE_PATH,
    limit: int | None = options.LIMIT,
    num_fewshot: int | None = options.NUM_FEWSHOT,
    batch_size: int = typer.Option(8, min=1, help="Batch size of the hf model."),
    seed: int = typer.Option(1234, min=0, help="For randomly chosen examples."),
    device: str = options.DEVICE,
    dtype: str = typer.Option("float32", help="float32 or bfloat16, both ways."),
    as_json: bool = options.AS_JSON,
) -> None:
    """Answer the same questions through lm-eval's own hf model too, on the exported weights, and compare."""
    _check_folders(data_dir, include_path)
    options.check_choice("--dtype", dtype, ("float32", "bfloat16"))
    names = _names(tasks, "openbookqa,piqa")
    with quiet_transformers():
        log("loading")
        quiet_libraries(names, online=False)
        from tnllm.convert.quantize import quiet_import
        from tnllm.convert.run import Options, convert
        from tnllm.device import describe_device, pick_device
        from tnllm.evaluation.hf_check import check_against_hf, need_transformers
        from tnllm.evaluation.tasks import choose, load_each, log_data

        need_transformers()
        quiet_import()
        where = pick_device(device, "--device")
        sets = load_each(choose(names, num_fewshot, log, include_path), data_dir, False, log)
        for loaded in sets.values():
            log_data(loaded, log)
        options.log_default_model(model)

        def export(source: Path, target: Path) -> None:
            log("writing the weights for transformers to a temporary folder")
            # The comparison that follows is a stronger check than the conversion's own.
            convert(source, target, Options("hf", verify=False), lambda line: None, lambda stage, done, total: None)

        with Progress() as progress:
            result = check_against_hf(sets, export, model, device, dtype, batch_size, limit, seed, log, progress.update)
    result = {"environment": describe_device(where), "num_fewshot": num_fewshot, **result}
    if as_json:
        print_json(result)
    else:
        show_check(result)
    for row in result["tasks"]:
        # Written so that NaN fails.
        if not row["largest_difference"] <= result["tolerance"]:
            raise CheckFailed(
                f"{row['task']}: log-likelihoods differ by {row['largest_difference']:.3g} nats, above the tolerance of "
                f"{result['tolerance']:g} for {dtype}"
            )


@app.command(
    "requests", epilog=options.examples("tnllm eval requests mmlu.npz.xz --tasks mmlu --num-fewshot 5 --data-dir data")
)
def save_requests(
    out: Path = typer.Argument(..., help="File to write, for tnllm bench-eval."),
    tasks: str = typer.Option(..., "--tasks", "-t", help="Multiple-choice tasks, with commas."),
    num_fewshot: int | None = options.NUM_FEWSHOT,
    data_dir: Path | None = options.DATA_DIR,
    include_path: Path | None = options.INCLUDE_PATH,
    tokenizer: Path | None = typer.Option(None, help="tokenizer.model or its folder. [default: the demo model's]"),
    limit: int | None = options.LIMIT,
    seed: int = typer.Option(1234, min=0, help="For randomly chosen examples."),
) -> None:
    """Write the token requests of tasks to a file and count what sharing prefixes saves; needs no model."""
    check_output_file(out, "the output")
    _check_folders(data_dir, include_path)
    names = _names(tasks, "mmlu")
    quiet_libraries(names, online=False)
    from tnllm import assets
    from tnllm.evaluation.multiple_choice import build_bundle
    from tnllm.evaluation.request_file import count_tokens, save_bundle
    from tnllm.evaluation.tasks import choose, load_tasks
    from tnllm.tokenizer import Tokenizer

    loaded = load_tasks(choose(names, num_fewshot, log, include_path), data_dir, False, log)
    bundle = build_bundle(loaded, Tokenizer.load(tokenizer or assets.tokenizer_model()), limit, seed)
    save_bundle(out, bundle)
    counts = count_tokens(bundle.requests)
    print(f"{out}: {len(bundle.answers):,} questions, {counts['requests']:,} requests, {out.stat().st_size:,} bytes")
    for name in ("one_by_one", "equal_inputs_once", "shared"):
        ratio = counts["one_by_one"] / counts[name]
        print(f"{name.replace('_', ' '):20}{counts[name]:>14,} tokens  {ratio:6.1f} x fewer")


def _names(tasks: str | None, example: str) -> list[str]:
    if not (names := [name.strip() for name in (tasks or "").split(",") if name.strip()]):
        raise UserError(f"no tasks; give --tasks {example} or others of `tnllm eval ls`")
    return names


class _Texts:
    """The texts of a file, read anew by each loop. Raises UserError at once if it cannot be a corpus file."""

    def __init__(self, file: Path, field: str, progress: ScoringProgress | None = None) -> None:
        from tnllm.data.corpus import find_files

        self._files, self._field, self._progress = find_files([file]), field, progress

    def __iter__(self) -> Iterator[str]:
        from tnllm.data.remote import read_documents

        report = self._progress.on_read if self._progress else lambda status: None
        for document in read_documents(self._files, self._field, report=report, more=()):
            if self._progress:
                self._progress.on_text(document.text)
            yield document.text


def _check_folders(data_dir: Path | None, include_path: Path | None = None, online: bool = False) -> None:
    if data_dir is not None and not data_dir.is_dir():
        raise UserError(
            f"--data-dir {data_dir} is not a folder; `tnllm eval ls` says what it may hold and where to get it"
        )
    if data_dir is not None and online:
        raise UserError("--data-dir and --online were given; give one of them")
    if include_path is not None and not include_path.is_dir():
        raise UserError(f"--include-path {include_path} is not a folder; give the folder of your task's YAML")


def _gen_kwargs(text: str | None) -> dict[str, Any] | None:
    if not text:
        return None
    from lm_eval.utils import simple_parse_args_string

    if not all("=" in part for part in text.split(",")):
        raise UserError(
            f"--gen-kwargs is {text!r}; write name=value with commas, such as temperature=0.5,do_sample=True"
        )
    return dict(simple_parse_args_string(text))
