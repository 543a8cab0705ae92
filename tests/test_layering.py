"""Imports point down: the package's layers, checked on the source."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "tnllm"

# Every layer may use the ground floor, which imports only itself.
GROUND = {
    "errors",
    "files",
    "device",
    "interrupts",
    "progress",
    "tables",
    "tokenizer",
    "chat_template",
    "recipe",
    "assets",
    "hub",
    "__version__",
}
# Package → the packages above the ground floor that it imports; each is used, so the table is also the picture.
ALLOWED: dict[str, set[str]] = {
    "kernels": set(),
    "modeling": {"kernels"},
    "parallel": {"modeling", "kernels"},
    "data": set(),
    "generation": {"modeling"},
    "convert": {"modeling", "kernels"},
    "serving": {"generation", "modeling"},
    # Plug-ins of other programs; vLLM's shards the model as the trainer does and reads what is exported.
    "engines": {"parallel", "convert", "modeling", "kernels"},
    "training": {"parallel", "data", "generation", "modeling"},
    "evaluation": {"data", "generation", "modeling"},
    # Self-cleaning trains the model it scores with.
    "cleaning": {"training", "data", "generation", "modeling"},
    # It times the trainer's own step, so it stands on the trainer.
    "bench": {"training", "parallel", "data", "generation", "modeling", "kernels"},
    # It reads recipes and batches as the trainer does; the trainer itself runs in other processes.
    "sweep": {"training", "convert", "data", "modeling"},
    "cli": {
        "bench",
        "cleaning",
        "convert",
        "data",
        "evaluation",
        "generation",
        "kernels",
        "modeling",
        "parallel",
        "serving",
        "sweep",
        "training",
    },
    "__main__": {"cli"},
}
# Heavy packages a command must not import until it runs, so that `tnllm --help` answers at once.
HEAVY = {
    "torch",
    "numpy",
    "pydantic",
    "lm_eval",
    "matplotlib",
    "triton",
    "sentencepiece",
    "yaml",
    "transformers",
    "tiktoken",
    "fastapi",
    "uvicorn",
}

FILES = sorted(ROOT.rglob("*.py"))


def part(path: Path) -> str:
    first = path.relative_to(ROOT).parts[0]
    return first.removesuffix(".py")


def imported(tree: ast.AST) -> set[str]:
    """Dotted names imported anywhere in the tree."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def top_level(tree: ast.Module) -> ast.Module:
    """What runs when the module is imported: no function bodies, nothing for the type checker alone."""

    class Strip(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        visit_AsyncFunctionDef = visit_FunctionDef

        def visit_If(self, node: ast.If) -> ast.If | None:
            return None if ast.unparse(node.test) == "TYPE_CHECKING" else node

    return Strip().visit(tree)


def imported_packages(path: Path) -> set[str]:
    names = imported(ast.parse(path.read_text(encoding="utf-8")))
    return {name.split(".")[1] for name in names if name.startswith("tnllm.")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    own = part(path)
    allowed = GROUND if own in GROUND | {"__init__"} else GROUND | ALLOWED[own] | {own}
    above = imported_packages(path) - allowed
    assert not above, f"{own} must not import {sorted(above)}"


@pytest.mark.slow
def test_every_permission_is_used():
    used: dict[str, set[str]] = {}
    for path in FILES:
        used.setdefault(part(path), set()).update(imported_packages(path) - GROUND - {part(path)})
    unused = {own: allowed - used.get(own, set()) for own, allowed in ALLOWED.items()}
    assert not {own: names for own, names in unused.items() if names}


@pytest.mark.slow
def test_no_files_import_each_other():
    """Imports inside functions count too, except in cli, where every import is one."""
    modules = {dotted(path): path for path in FILES}
    arrows = {
        name: {owner(other, modules) for other in imported(ast.parse(path.read_text(encoding="utf-8")))} - {name, None}
        for name, path in modules.items()
        if part(path) != "cli"
    }
    # Take away files whose imports are all gone, until only circles (and what stands on them) are left.
    while leaves := {name for name, others in arrows.items() if not others & arrows.keys()}:
        arrows = {name: others for name, others in arrows.items() if name not in leaves}
    assert not arrows, {name: sorted(others & arrows.keys()) for name, others in arrows.items()}


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")


def owner(name: str, modules: dict[str, Path]) -> str | None:
    """The module of ours that an imported dotted name is, or lies in."""
    return next((module for module in (name, name.rpartition(".")[0]) if module in modules), None)


@pytest.mark.parametrize("path", sorted((ROOT / "cli").glob("*.py")), ids=lambda path: path.name)
def test_commands_import_late(path):
    for name in imported(top_level(ast.parse(path.read_text(encoding="utf-8")))):
        assert name.split(".")[0] not in HEAVY, f"{path.name} imports {name} at the top"
        if name.startswith("tnllm."):
            assert name.split(".")[1] in {
                "errors",
                "files",
                "interrupts",
                "progress",
                "tables",
                "hub",
                "cli",
                "__version__",
            }, f"{path.name}: {name}"


def test_cleaning_and_tokenizing_need_no_torch():
    needs_torch = {"loader.py", "instruct_loader.py", "score.py", "self_clean.py"}
    for path in [*(ROOT / "data").rglob("*.py"), *(ROOT / "cleaning").rglob("*.py")]:
        if path.name not in needs_torch:
            names = imported(ast.parse(path.read_text(encoding="utf-8")))
            assert not any(name.split(".")[0] == "torch" for name in names), path


def test_files_stay_short():
    long = {str(path.relative_to(ROOT)): n for path in FILES if (n := len(path.read_text().splitlines())) > 600}
    assert not long, f"each is two ideas in one room: {long}"
