"""Write the project's public address into the files that name it; a release does this before it builds.

    python scripts/address.py https://github.com/ORG/NAME v1.2.3

README's links to files become addresses of that tag, as the package index shows README without the files beside it;
pyproject.toml gets `[project.urls]`, CITATION.cff `repository-code`. A checkout can go back with `git checkout .`.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!\w+:|#)([^)\s]+)\)")


def absolute_links(text: str, address: str, tag: str) -> str:
    """`text` with every link to a file of the repository as an address: of the page, or of an image's bytes."""

    def link(match: re.Match[str]) -> str:
        mark, label, path = match.groups()
        return f"{mark}[{label}]({address}/{'raw' if mark else 'blob'}/{tag}/{path})"

    return _LINK.sub(link, text)


def write_address(root: Path, address: str, tag: str) -> None:
    """Change README.md, pyproject.toml and CITATION.cff in `root`."""
    readme = root / "README.md"
    readme.write_text(absolute_links(readme.read_text(encoding="utf-8"), address, tag), encoding="utf-8")
    places = {
        "Homepage": "",
        "Documentation": f"/tree/{tag}/docs",
        "Changelog": f"/blob/{tag}/CHANGELOG.md",
        "Issues": "/issues",
    }
    urls = [f'{name} = "{address}{path}"' for name, path in places.items()]
    project = root / "pyproject.toml"
    text = project.read_text(encoding="utf-8")
    project.write_text("\n".join([text.rstrip(), "", "[project.urls]", *urls, ""]), encoding="utf-8")
    with (root / "CITATION.cff").open("a", encoding="utf-8") as file:
        file.write(f"repository-code: {address}\n")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python scripts/address.py https://github.com/ORG/NAME TAG")
    write_address(ROOT, sys.argv[1].rstrip("/"), sys.argv[2])
