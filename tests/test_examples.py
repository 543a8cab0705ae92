"""Examples and file names in prose are true: prose is not executed, so these tests look at it.

A module opens with an example of its use. Each call in it must name something that exists, with arguments it takes.
"""

import ast
import builtins
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "tnllm"
FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def definitions(tree: ast.Module) -> dict[str, Definition]:
    return {node.name: node for node in tree.body if isinstance(node, Definition)}


def imports(tree: ast.Module) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    return names


# What a reader takes for granted: a model and a tokenizer made before, any function, the standard library's Path.
ASSUMED = {"model", "tokenizer", "f", "Path"}
# Names that examples of one module may take from others, with what defines them.
DEFINED: dict[str, list[Definition]] = {}
for module in TREES.values():
    for name, node in definitions(module).items():
        DEFINED.setdefault(name, []).append(node)


def example(docstring: str) -> list[ast.AST]:
    """The lines of a docstring after the first that parse as Python, each by itself."""
    trees: list[ast.AST] = []
    for line in docstring.splitlines()[1:]:
        code = line.split("  #")[0].strip()
        try:
            trees.append(ast.parse(f"{code} ..." if code.endswith(":") else code))
        except SyntaxError:
            continue
    return trees


def problems(path: Path) -> list[str]:
    """What is wrong with the calls of the opening example of the module at `path`."""
    tree = TREES[path]
    own = definitions(tree)
    trees = example(ast.get_docstring(tree) or "")
    stored = {
        node.id
        for line in trees
        for node in ast.walk(line)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }
    known = {*own, *imports(tree), *DEFINED, *stored, *ASSUMED, *dir(builtins)}
    wrong = []
    for call in [node for line in trees for node in ast.walk(line) if isinstance(node, ast.Call)]:
        text = ast.unparse(call)
        if isinstance(call.func, ast.Name):
            name = call.func.id
            if name not in known:
                wrong.append(f"{text}: no {name} in the package")
            elif name not in stored:
                # Of several functions of that name one must take the arguments.
                meant = [own[name]] if name in own else DEFINED.get(name, [])
                wrong += min((wrong_arguments(call, node, text) for node in meant), key=len, default=[])
        elif isinstance(call.func, ast.Attribute) and isinstance(call.func.value, ast.Name):
            owner = own.get(call.func.value.id) or DEFINED.get(call.func.value.id, [None])[0]
            if isinstance(owner, ast.ClassDef) and not owner.bases:
                methods = {node.name: node for node in owner.body if isinstance(node, Definition)}
                if call.func.attr not in methods:
                    wrong.append(f"{text}: {owner.name} has no {call.func.attr}")
    return wrong


def wrong_arguments(call: ast.Call, node: Definition | None, text: str) -> list[str]:
    """Arguments of `call` that the function at `node` does not take; classes count by their own __init__."""
    offset = 0
    if isinstance(node, ast.ClassDef):
        methods = {method.name: method for method in node.body if isinstance(method, ast.FunctionDef)}
        node, offset = methods.get("__init__"), 1
    if node is None or isinstance(node, ast.ClassDef):
        return []
    takes = node.args
    positional = [argument.arg for argument in (*takes.posonlyargs, *takes.args)][offset:]
    names = {*positional, *(argument.arg for argument in takes.kwonlyargs)}
    wrong = [
        f"{text}: takes no {keyword.arg}"
        for keyword in call.keywords
        if keyword.arg and keyword.arg not in names and takes.kwarg is None
    ]
    starred = any(isinstance(argument, ast.Starred) for argument in call.args)
    if takes.vararg is None and not starred and len(call.args) > len(positional):
        wrong.append(f"{text}: takes at most {len(positional)} arguments")
    given = {*positional[: len(call.args)], *(keyword.arg for keyword in call.keywords)}
    needed = positional[: len(positional) - len(takes.defaults)] if takes.defaults else positional
    ellipsis = any(isinstance(argument, ast.Constant) and argument.value is ... for argument in call.args)
    missing = [name for name in needed if name not in given]
    if missing and not starred and not ellipsis and None not in given:
        wrong.append(f"{text}: lacks {', '.join(missing)}")
    return wrong


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_opening_examples_can_be_typed(path):
    assert not problems(path)


def test_a_wrong_example_is_noticed(tmp_path, monkeypatch):
    """The check itself: a name that does not exist, a keyword and an argument too many."""
    path = tmp_path / "module.py"
    text = '"""What it is for.\n\nx = gone(1)\ny = there(1, wide=2)\nthere(1, 2)\n"""\n\ndef there(x, *, deep=0): ...\n'
    monkeypatch.setitem(TREES, path, ast.parse(text))
    assert len(problems(path)) == 3


def mentioned_files() -> list[tuple[Path, str]]:
    """Python files that docstrings, comments, docs and README name in backticks, with where."""
    texts = [*FILES, *sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    return [(path, name) for path in texts for name in re.findall(r"`([\w./]+\.py)`", path.read_text("utf-8"))]


def test_files_that_prose_names_exist():
    existing = [
        str(path.relative_to(ROOT)) for path in [*FILES, *ROOT.glob("tests/**/*.py"), *ROOT.glob("scripts/*.py")]
    ]
    missing = [
        f"{path.relative_to(ROOT)} names {name}"
        for path, name in mentioned_files()
        if not any(f"/{file}".endswith(f"/{name}") for file in existing)
    ]
    assert not missing


PROSE = [*sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("*.md"))]


@pytest.mark.parametrize("path", PROSE, ids=lambda path: path.name)
def test_prose_lines_fit_a_window(path):
    long, in_code = [], False
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        in_code ^= line.lstrip().startswith("```")
        if len(line) > 124 and not in_code and not line.lstrip().startswith("|"):
            long.append(number)
    assert not long, f"lines of over 124 characters: {long}"


def test_links_between_pages_lead_somewhere():
    broken = []
    for path in PROSE:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text(encoding="utf-8")):
            if "://" not in target and not (path.parent / target).exists():
                broken.append(f"{path.name}: {target}")
    assert not broken


def test_troubleshooting_quotes_messages_that_exist():
    """Each quoted line, without its placeholders, is in the code: a message that changes is changed there too."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    # What Python and f-strings put between the words of a message, taken away on both sides.
    code = re.sub(r"""\bf(?=["'])|["'\s]|\{[^{}]*\}""", "", "".join(path.read_text(encoding="utf-8") for path in FILES))
    missing = []
    for quoted in re.findall(r"^\| `([^`]+)`", page, re.M):
        fragments = re.split(r"\b(?:X|N|M|KEY)\b|'X'|\.\.\.", quoted)
        missing += [text for text in fragments if len(text) > 6 and re.sub(r"""["'\s]+""", "", text) not in code]
    assert not missing
