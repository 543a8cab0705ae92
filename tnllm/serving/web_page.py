"""The page for people: its files at / and /page."""

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.responses import Response

from tnllm import assets

_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
# The page's own files, this server, and nothing else. Code from a model's text would be inline, so it never runs.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
# Not stored, so that a page never meets the files of another version.
_HEADERS = {"Content-Security-Policy": _POLICY, "Referrer-Policy": "no-referrer", "Cache-Control": "no-store"}


def add_web_page(app: FastAPI) -> None:
    """Add its routes. The files are read once, here."""
    folder = assets.folder() / "web"
    files = {path.name: (path.read_bytes(), _TYPES[path.suffix]) for path in folder.iterdir() if path.suffix in _TYPES}

    def sent(name: str) -> Response:
        content, media_type = files[name]
        return Response(content, headers=_HEADERS, media_type=media_type)

    @app.get("/", include_in_schema=False)
    async def web_page() -> Response:
        return sent("index.html")

    @app.get("/page/{name}", include_in_schema=False)
    async def file_of_the_page(name: str) -> Response:
        if name not in files:
            raise HTTPException(404)
        return sent(name)
