"""The page for people: its files at / and /page, and what it must know of the model at /page.json.

add_web_page(app, engine, settings)
"""

from dataclasses import asdict
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.responses import Response

from tnllm import assets
from tnllm.generation.sampler import MAX_SEED
from tnllm.serving.engine import Engine
from tnllm.serving.middleware import JSON, Settings

_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
# The page's own files, this server, and nothing else. Code from a model's text would be inline, so it never runs.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
# Not stored, so that a page never meets the files of another version.
_HEADERS = {"Content-Security-Policy": _POLICY, "Referrer-Policy": "no-referrer", "Cache-Control": "no-store"}


def add_web_page(app: FastAPI, engine: Engine, settings: Settings) -> None:
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

    @app.get("/page.json", include_in_schema=False)
    async def about() -> JSON:
        return JSON(_about(engine, settings))


def _about(engine: Engine, settings: Settings) -> dict[str, Any]:
    """What the page says of the model and its settings. Whole numbers beyond 2^53 are texts, as JavaScript rounds them."""
    loaded = engine.loaded
    defaults = {name: value for name, value in asdict(loaded.params()).items() if isinstance(value, int | float)}
    return {
        "model": settings.name,
        "is_demo": loaded.folder == assets.demo_weights(),
        "is_chat_tuned": loaded.is_chat_tuned,
        "defaults": defaults | {"max_tokens": min(loaded.params().max_tokens, engine.max_new_tokens)},
        "limits": {"max_tokens": engine.max_new_tokens, "seed": str(MAX_SEED)},
    }
