"""Imports point down: the package's layers, checked on the source."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "tnllm"

# Part → the parts of ours it may import. Siblings never import each other; nobody imports cli.
BASE = {"errors", "files", "assets", "tokenizer", "tiktoken_model"}
MODEL = BASE | {"kernels", "modeling"}
ALLOWED = {
    "errors": set(),
    "files": {"errors"},
    "assets": {"errors"},
    "tiktoken_model": {"errors"},
    "tokenizer": {"errors", "files", "tiktoken_model"},
    "kernels": {"errors"},
    "modeling": BASE | {"kernels"},
    "parallel": MODEL,
    "data": MODEL,
    "generation": MODEL,
    "training": MODEL | {"parallel", "data", "generation"},
    "evaluation": MODEL | {"parallel", "data", "generation"},
    # It times the trainer's own step, so it stands on the trainer.
    "bench": MODEL | {"parallel", "data", "generation", "training"},
    "convert": MODEL,
    # Self-cleaning trains the model it scores with.
    "cleaning": MODEL | {"data", "generation", "training"},
    # It reads recipes as the trainer does; the trainer itself runs in other processes.
    "sweep": MODEL | {"training"},
    "cli": MODEL
    | {"parallel", "data", "generation", "training", "evaluation", "bench", "convert", "cleaning", "sweep"},
    "__main__": {"cli"},
    "__init__": set(),
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


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    own = part(path)
    for name in imported(ast.parse(path.read_text(encoding="utf-8"))):
        if name.startswith("tnllm."):
            other = name.split(".")[1]
            assert other in ALLOWED[own] | {own, "__version__"}, f"{own} must not import {name}"


@pytest.mark.parametrize("path", sorted((ROOT / "cli").glob("*.py")), ids=lambda path: path.name)
def test_commands_import_late(path):
    for name in imported(top_level(ast.parse(path.read_text(encoding="utf-8")))):
        assert name.split(".")[0] not in HEAVY, f"{path.name} imports {name} at the top"
        if name.startswith("tnllm."):
            assert name.split(".")[1] in {"errors", "files", "cli", "__version__"}, f"{path.name}: {name}"


def test_cleaning_and_tokenizing_need_no_torch():
    for path in (ROOT / "data").rglob("*.py"):
        if path.name not in ("loader.py", "instruct_loader.py"):
            names = imported(ast.parse(path.read_text(encoding="utf-8")))
            assert not any(name.split(".")[0] == "torch" for name in names), path


def test_files_stay_short():
    long = {str(path.relative_to(ROOT)): n for path in FILES if (n := len(path.read_text().splitlines())) > 600}
    assert not long, f"each is two ideas in one room: {long}"
