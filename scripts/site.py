"""Build the site: docs/, README and its neighbours, and a reference of the commands made from the Typer app itself.

    python scripts/site.py          # build/site, links and anchors checked; no network is needed

Pages are gathered in build/docs first. Links to files of the repository that are not pages become their names, as the
site does not carry those files.
"""

import html
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
PAGES_FOLDER = ROOT / "build" / "docs"
# Pages at the repository's root, and their names in the site.
AT_ROOT = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
}
# Code with a bar in a table, which GitHub shows as one and Python's Markdown with the backslash before it.
_ESCAPED_BAR = re.compile(r"(?<!`)`([^`\n]*\\\|[^`\n]*)`(?!`)")
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]*)(#[^)\s]*)?\)")


def gather() -> None:
    """Write every page into build/docs."""
    shutil.rmtree(PAGES_FOLDER, ignore_errors=True)
    shutil.copytree(ROOT / "docs", PAGES_FOLDER)
    for source, page in AT_ROOT.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        (PAGES_FOLDER / page).write_text(_with_site_links(text, Path(".")), encoding="utf-8")
    for path in (ROOT / "docs").rglob("*.md"):
        inside = path.relative_to(ROOT / "docs")
        text = _with_site_links(path.read_text(encoding="utf-8"), Path("docs") / inside.parent)
        (PAGES_FOLDER / inside).write_text(text, encoding="utf-8")
    (PAGES_FOLDER / "commands.md").write_text(commands_page(), encoding="utf-8")


def _with_site_links(text: str, folder: Path) -> str:
    """Links of a page in `folder` of the repository, as the site has them."""

    def link(match: re.Match[str]) -> str:
        mark, label, path, anchor = match[1], match[2], match[3], match[4] or ""
        if not path or "://" in path:
            return match[0]
        target = (ROOT / folder / path).resolve().relative_to(ROOT)
        if target.as_posix() in AT_ROOT:
            target = Path("docs", AT_ROOT[target.as_posix()])
        if target.parts[0] != "docs":
            return f"{label} (`{target}`)"
        here = Path("docs") if folder == Path(".") else folder
        return f"{mark}[{label}]({'../' * (len(here.parts) - 1)}{target.relative_to('docs')}{anchor})"

    return _ESCAPED_BAR.sub(_as_html, _LINK.sub(link, text))


def _as_html(match: re.Match[str]) -> str:
    return f"<code>{html.escape(match[1]).replace(chr(92) + '|', '&#124;')}</code>"


def commands_page() -> str:
    """Every command with its options, from the Typer app: what `--help` says, as one page."""
    import typer

    from tnllm.cli.main import app

    group: Any = typer.main.get_command(app)
    lines = ["# Commands", "", "What `tnllm COMMAND --help` says, on one page.", ""]
    for name in group.list_commands(None):
        command = group.commands[name]
        lines += _command(command, f"tnllm {name}", "##")
        for inner, below in getattr(command, "commands", {}).items():
            lines += _command(below, f"tnllm {name} {inner}", "###")
    return "\n".join(lines)


def _command(command: Any, name: str, heading: str) -> list[str]:
    lines = [f"{heading} {name}", "", _plain(command.help or ""), ""]
    rows = [_parameter(parameter) for parameter in command.params if not getattr(parameter, "hidden", False)]
    if rows:
        lines += ["| | meaning | default |", "| --- | --- | --- |", *rows, ""]
    examples = [line for line in (command.epilog or "").splitlines() if line.startswith(("tnllm ", "torchrun "))]
    if examples:
        lines += ["```", *examples, "```", ""]
    return lines


def _parameter(parameter: Any) -> str:
    names = (
        [*parameter.opts, *parameter.secondary_opts]
        if parameter.param_type_name == "option"
        else [parameter.name.upper()]
    )
    default = parameter.default
    shown = "" if default in (None, False, (), [], "") or callable(default) or parameter.required else f"`{default}`"
    if parameter.required:
        shown = "required"
    return f"| {', '.join(f'`{name}`' for name in names)} | {_plain(parameter.help or '')} | {shown} |"


def _plain(text: str) -> str:
    """Help text in a table's cell."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def main() -> int:
    gather()
    zensical = Path(sys.executable).with_name("zensical")
    return subprocess.run([zensical, "build", "--strict", "--config-file", ROOT / "mkdocs.yml"], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
