"""The HTTP side of an engine: OpenAI's routes, health, metrics and a web page.

    app = make_app(engine, Settings(name="demo"))      # an ASGI application; the engine must be started
    uvicorn.run(app, host="127.0.0.1", port=8000)

Routes are fixed and nothing that a client sends becomes a path: the page's files are read once, when the app is made. The
middleware limits a request's body, the engine its tokens and the length of the queue.
"""

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Match, Route

from tnllm import __version__, assets
from tnllm.errors import UserError
from tnllm.serving.answers import ChatAnswer, TextAnswer
from tnllm.serving.api import ChatRequest, CompletionRequest
from tnllm.serving.bodies import error_body
from tnllm.serving.engine import Engine
from tnllm.serving.generating import Generator, error_answer
from tnllm.serving.llama_routes import add_llama_routes
from tnllm.serving.middleware import JSON, REQUEST_ID_HEADER, RequestChecks, Settings
from tnllm.serving.openapi import add_openapi, described
from tnllm.serving.schemas import ChatCompletion, Completion, Health, Model, ModelList
from tnllm.serving.served import Models, Served
from tnllm.serving.state_routes import add_state_routes
from tnllm.serving.states import StateStore
from tnllm.serving.text_routes import add_text_routes

_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
# The page's own files, this server, and nothing else. Code from a model's text would be inline, so it never runs.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
# Not stored, so that a page never meets the files of another version.
_HEADERS = {"Content-Security-Policy": _POLICY, "Referrer-Policy": "no-referrer", "Cache-Control": "no-store"}


def _add_error_handlers(app: FastAPI) -> None:
    """Every error in OpenAI's shape."""

    @app.exception_handler(UserError)
    async def _user_error(request: Request, error: UserError) -> JSON:
        status, body, headers = error_answer(error)
        return JSON(body, status, headers)

    @app.exception_handler(HTTPException)
    async def _http_error(request: Request, error: HTTPException) -> JSON:
        messages = {
            404: "there is no such route; see /openapi.json",
            405: f"{request.method} is not allowed here; see /openapi.json",
        }
        message = messages.get(error.status_code, str(error.detail))
        headers = dict(error.headers or {})
        if error.status_code == 405:
            # Starlette names the methods of the first route of this path alone.
            routes = [route for route in request.app.routes if isinstance(route, Route)]
            fitting = [route for route in routes if route.matches(request.scope)[0] is not Match.NONE]
            headers["Allow"] = ", ".join(sorted({name for route in fitting for name in route.methods or ()}))
        return JSON(error_body(message, "invalid_request_error"), error.status_code, headers)

    @app.exception_handler(Exception)
    async def _bug(request: Request, error: Exception) -> JSON:
        return JSON(error_body("the server has a bug; its log says more", "server_error"), 500)


def _add_web_page(app: FastAPI) -> None:
    """The page for people: its files at / and /page, read once, here."""
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


def make_app(
    engine: Engine, settings: Settings, states: StateStore | None = None, others: Mapping[str, Engine] | None = None
) -> FastAPI:
    """The application. The caller starts and stops the engines. Without `states`, they are kept in memory.

    others: engines of more models, by name, such as those of adapters.
    """
    more = {one.weights: one.loaded for one in (others or {}).values()}
    store = states or StateStore(engine.loaded, engine.weights, engine.metrics, more=more)
    app = FastAPI(
        title="tnllm", version=__version__, docs_url=None, redoc_url=None, default_response_class=JSON,
        redirect_slashes=False, description="TransNormerLLM behind OpenAI's API.",
    )  # fmt: skip

    _add_error_handlers(app)

    models = Models(settings.name, engine, others or {})
    generator = Generator(models, settings, store)

    @app.post("/v1/completions", **described(Completion, CompletionRequest))
    async def completions(request: Request) -> Response:
        """Continue one or several texts."""
        return await generator.respond(request, CompletionRequest, TextAnswer)

    @app.post("/v1/chat/completions", **described(ChatCompletion, ChatRequest))
    @app.post("/chat/completions", **described(ChatCompletion, ChatRequest))
    async def chat_completions(request: Request) -> Response:
        """Answer the last message of a conversation."""
        return await generator.respond(request, ChatRequest, ChatAnswer)

    def described_model(served: Served) -> dict[str, Any]:
        return {"id": served.name, "object": "model", "created": int(engine.metrics.started), "owned_by": "tnllm"}

    @app.get("/v1/models", **described(ModelList))
    @app.get("/models", **described(ModelList))
    async def list_models() -> JSON:
        """The models that are served."""
        return JSON({"object": "list", "data": [described_model(served) for served in models]})

    @app.get("/v1/models/{name:path}", **described(Model))
    async def model_named(name: str) -> JSON:
        """The model of this name."""
        return JSON(described_model(models.named(name)))

    @app.get("/health", **described(Health))
    async def health() -> JSON:
        """200 while requests are taken, 503 while the server shuts down."""
        if engine.stopping:
            return JSON({"status": "shutting down"}, 503)
        return JSON({"status": "ok", "version": __version__})

    @app.get("/metrics", response_class=PlainTextResponse, **described(None))
    async def metrics() -> PlainTextResponse:
        """Prometheus text."""
        return PlainTextResponse(engine.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    _add_web_page(app)
    add_state_routes(app, models, settings, store)
    add_text_routes(app, models, settings, generator)
    add_llama_routes(app, models, store, generator)
    add_openapi(app, engine, [served.name for served in models])
    for route in app.routes:
        if isinstance(route, Route) and "GET" in (route.methods or ()):
            # The server leaves the body out. Starlette's own routes do this, FastAPI's do not.
            route.methods = {"GET", "HEAD"}
    app.add_middleware(RequestChecks, settings=settings)
    if settings.cors_origins:
        # Outside the checks: a browser asks without the key, and reads refusals too.
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.cors_origins, allow_methods=["*"], allow_headers=["*"],
            expose_headers=[REQUEST_ID_HEADER, "Retry-After"],
        )  # fmt: skip
    return app
