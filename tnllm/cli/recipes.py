"""`tnllm recipes list|show|check`: find a recipe, read all of it, check that it would start."""

import json
from dataclasses import asdict
from typing import Any

import typer

from tnllm.cli.options import AS_JSON, RECIPE, SETS, Group, examples

app = typer.Typer(
    help="Find recipes, read them, check them.",
    no_args_is_help=True,
    cls=Group,
    epilog=examples("tnllm recipes show 385m --doc"),
)


@app.command("list", epilog=examples("tnllm recipes list --json"))
def list_recipes(as_json: bool = AS_JSON) -> None:
    """List the recipes that ship, smallest first."""
    from tnllm.files import format_count
    from tnllm.modeling.flops import count_parameters
    from tnllm.progress import log
    from tnllm.recipe import packaged_recipes, read_header
    from tnllm.tables import print_table
    from tnllm.training.config import load_recipe

    items: list[dict[str, Any]] = []
    for path in packaged_recipes():
        config, header = load_recipe(str(path)), read_header(path)
        items.append(
            {
                "recipe": path.stem,
                "kind": config.model.kind,
                "parameters": count_parameters(config.model),
                "tokens": config.total_steps * config.train.global_batch_tokens,
                "ranks": config.parallel.num_ranks,
                "hardware": header.get("hardware", ""),
                "about": header["about"].split(". ")[0].split(": ")[0],
                "path": str(path),
            }
        )
    items.sort(key=lambda item: (item["parameters"], item["recipe"]))
    if as_json:
        print(json.dumps(items, indent=2))
        return
    rows = [
        [
            item["recipe"], format_count(item["parameters"]), format_count(item["tokens"]),
            item["hardware"], item["about"],
        ]
        for item in items
    ]  # fmt: skip
    columns = ["recipe", "parameters", "tokens", "hardware", "what"]
    print_table(columns, rows, right=["parameters", "tokens"])
    log("start one: tnllm train RECIPE; read one: tnllm recipes show RECIPE --doc")


@app.command("show", epilog=examples("tnllm recipes show 385m --doc > mine.yaml"))
def show(
    recipe: str = RECIPE,
    sets: list[str] = SETS,
    doc: bool = typer.Option(False, "--doc", help="Explain every key in a comment above it."),
    as_json: bool = AS_JSON,
) -> None:
    """Print every key of a recipe with its value. What is printed is a recipe itself."""
    from tnllm.recipe import find_recipe, read_comment
    from tnllm.training.config import load_recipe

    config = load_recipe(recipe, sets)
    if as_json:
        print(json.dumps(config.model_dump(mode="json"), indent=2))
        return
    print("\n".join(["# " + line if line else "#" for line in read_comment(find_recipe(recipe))]))
    print(config.to_yaml(doc=doc), end="")


@app.command("check", epilog=examples("tnllm recipes check recipes/385m.yaml mine.yaml"))
def check(
    recipes: list[str] = typer.Argument(help="Recipe files, or names of recipes that ship."),
    sets: list[str] = SETS,
    as_json: bool = typer.Option(False, "--json", help="Print JSON, one object for each recipe."),
) -> None:
    """Check that recipes would start: keys, values, model, adapter, tokenizer, template, data and tasks. Else exit 2."""
    import sys

    from tnllm.cli.train import scorer
    from tnllm.errors import UserError
    from tnllm.files import format_count
    from tnllm.training.config import load_recipe
    from tnllm.training.dry_run import check_recipe

    results = []
    for name in recipes:
        try:
            report = check_recipe(name, sets)
            config = load_recipe(name, sets)
            if config.eval.tasks:
                scorer(config.eval, config.prompt_template)
        except UserError as error:
            if len(recipes) == 1 and not as_json:
                # Of whatever kind it is, the answer is no: exit 2.
                raise UserError(str(error)) from None
            results.append({"recipe": name, "ok": False, "error": str(error)})
            if not as_json:
                print(f"{name}: {error}", file=sys.stderr)
            continue
        results.append({"ok": True, **asdict(report)})
        if not as_json:
            ranks = "1 rank" if report.ranks == 1 else f"{report.ranks} ranks"
            parameters, tokens = format_count(report.parameters), format_count(report.tokens)
            print(f"{name}: ok, {parameters} parameters, {report.steps} steps, {tokens} tokens, {ranks}")
    if as_json:
        print(json.dumps(results, indent=2))
    bad = [str(result["recipe"]) for result in results if not result["ok"]]
    if bad:
        raise UserError(f"{len(bad)} of {len(results)} recipes would not start: {', '.join(bad)}")
