"""`tnllm serve`: a model behind an OpenAI-compatible API, with a web page to try it."""

import os
import re
import socket
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import typer

from tnllm import hub
from tnllm.cli.options import DEVICE, DTYPE, MODEL, examples, log_default_model, panel
from tnllm.errors import RunError, UserError, optional_import
from tnllm.files import check_output_folder, only_writer
from tnllm.progress import log

EPILOG = examples("tnllm serve --model runs/first --port 8000")

KEY_VARIABLE = "TNLLM_API_KEY"
_limits = panel("Limits")


def command(
    model: str | None = MODEL,
    host: str = typer.Option("127.0.0.1", help="Address to listen on; 0.0.0.0 is every address of this machine."),
    port: int = typer.Option(8000, min=0, max=65535, help="Port; 0 takes a free one."),
    allowed_host: list[str] = typer.Option([], help="Another name for it in the Host header. Repeatable."),
    name: str | None = typer.Option(None, help="Name of the model in the API. Default: that of its folder."),
    adapter: list[str] = typer.Option([], help="NAME=FOLDER: a LoRA adapter, a model beside the base. Repeatable."),
    api_key: str | None = typer.Option(None, help=f"Key that clients must send; better the variable {KEY_VARIABLE}."),
    api_key_file: Path | None = typer.Option(
        None, help="File with more keys, one a line; # begins a comment. States belong to the key that made them."
    ),
    cors_origin: list[str] = typer.Option([], help="Origin of pages that may use it, https://app.example; * is any."),
    log_requests: bool = typer.Option(False, "--log-requests", help="Write a line on stderr for each request."),
    slots: int | None = _limits(None, min=1, help="Texts decoded together. Default 32 on CPU, 256 on a GPU."),
    queue: int = _limits(512, min=1, help="Prompts that may wait; more get 429."),
    max_prompt_tokens: int = _limits(1 << 20, min=1, help="Longest prompt."),
    max_tokens: int = _limits(1 << 16, min=1, help="Most tokens of one text."),
    max_body_mib: float = _limits(8, min=0.001, help="Largest request body."),
    cache_gib: float = _limits(0.25, min=0, help="For states of shared prefixes; 0 keeps none."),
    state_dir: Path | None = _limits(None, help="Folder in which states are kept across restarts. Default: in memory."),
    state_gib: float = _limits(1.0, min=0, help="For states that clients keep; 0 keeps none."),
    state_gib_per_key: float | None = _limits(None, min=0, help="The same for one API key. Default: all of it."),
    state_hours: float = _limits(24.0, min=0.001, help="A state that is not used for so long is deleted."),
    prompt_lookup: int = typer.Option(
        0, min=0, max=64, help="Most tokens proposed at once while one text runs; 0: none."
    ),
    drain_seconds: int = _limits(30, min=0, help="How long running requests may continue after SIGTERM or Ctrl-C."),
    device: str = DEVICE,
    dtype: str = DTYPE,
) -> None:
    """Serve a model over HTTP: /v1/completions, /v1/chat/completions, /v1/models, /health, /metrics and a page at /."""
    origins = tuple(_origin(one) for one in cors_origin)
    folders = _adapters(adapter)
    more_keys = _keys(api_key_file) if api_key_file is not None else ()
    key = api_key if api_key is not None else os.environ.get(KEY_VARIABLE)
    if key is not None and (not key or not key.isascii() or any(char.isspace() for char in key)):
        raise UserError(
            f"the API key ({'--api-key' if api_key is not None else KEY_VARIABLE}) must be ASCII, no spaces"
        )
    with optional_import("serve", "fastapi or uvicorn"):
        import fastapi  # noqa: F401
        import uvicorn

    from tnllm.generation.loading import load, with_adapter
    from tnllm.generation.slots import check_lookup
    from tnllm.serving.app import Settings, make_app
    from tnllm.serving.engine import Engine
    from tnllm.serving.middleware import is_loopback
    from tnllm.serving.protocol import server_config
    from tnllm.serving.server import FLUSH_SECONDS, catch_signals, run_until_signal
    from tnllm.serving.states import StateStore

    stack = ExitStack()
    if state_dir is not None:
        check_output_folder(state_dir, "--state-dir")
        stack.enter_context(only_writer(state_dir))
    log_default_model(model)
    ready = load(model, device, dtype)
    if prompt_lookup:
        check_lookup(ready.model)
        ready.sampling["prompt_lookup"] = prompt_lookup
    given_name = name or _name(model, ready.folder)
    if given_name in folders:
        raise UserError(f"--adapter {given_name}=... has the base model's name; give it another, or the model a --name")
    adapted = {one: with_adapter(ready, folder) for one, folder in folders.items()}
    on_gpu = ready.model.device.type == "cuda"
    limits: dict[str, Any] = {
        "num_slots": slots or (256 if on_gpu else 32),
        "queue_size": queue,
        "cache_bytes": int(cache_gib * 2**30),
        "max_prompt_tokens": max_prompt_tokens,
        "max_new_tokens": max_tokens,
    }
    engine = Engine(ready, **limits)
    others = {one: Engine(other, **limits, beside=engine) for one, other in adapted.items()}
    local = is_loopback(host)
    settings = Settings(
        name=given_name,
        cors_origins=origins,
        log_requests=log_requests,
        api_key=key,
        more_keys=more_keys,
        states_are_hidden=not local and key is None and not more_keys,
        max_body_bytes=int(max_body_mib * 2**20),
        # An open server is called by names that it does not know, unless it is told.
        hosts=tuple(name.lower() for name in allowed_host) if local or allowed_host else None,
    )
    if not local and key is None and not more_keys:
        log(f"no API key: anybody who can reach {host} may use this model; set {KEY_VARIABLE} to require one")
    # Those beyond slots and queue are pages, and clients about to be refused.
    most = (engine.num_slots + queue) * (1 + len(others))
    states = StateStore(
        ready,
        engine.weights,
        engine.metrics,
        max_bytes=int(state_gib * 2**30),
        max_bytes_of_owner=None if state_gib_per_key is None else int(state_gib_per_key * 2**30),
        seconds=max(1, int(state_hours * 3600)),
        folder=state_dir,
        more={one.weights: one.loaded for one in others.values()},
    )
    config = server_config(
        make_app(engine, settings, states, others),
        max_requests=most + 256,
        max_requests_per_address=most + 64,
        # Its warnings are of clients, who could fill a disk with them.
        log_level="error",
        timeout_graceful_shutdown=FLUSH_SECONDS,
    )
    listening = _bind(host, port)
    signals = catch_signals()
    address = f"http://{host if ':' not in host else f'[{host}]'}:{listening.getsockname()[1]}"
    log(
        f"serving {settings.name} on {address} ({engine.num_slots} slots, {engine.slots.nbytes / 2**20:.0f} MiB of states)"
    )
    if others:
        log(f"adapters, each with as many slots: {', '.join(others)}")
    log(f"try the page at {address}/ or: curl {address}/v1/completions -H 'Content-Type: application/json' "
         '-d \'{"prompt": "Once upon a time", "max_tokens": 20}\'')  # fmt: skip

    with stack:
        run_until_signal([engine, *others.values()], uvicorn.Server(config), listening, drain_seconds, signals)


def _origin(given: str) -> str:
    """An origin as browsers send it."""
    if given != "*" and not re.fullmatch(r"https?://[^/\s?#@]+", given):
        raise UserError(f"--cors-origin is {given!r}; allowed: *, or scheme and host, such as https://app.example")
    return given.lower()


def _adapters(given: list[str]) -> dict[str, Path]:
    """Name → folder."""
    folders: dict[str, Path] = {}
    for one in given:
        name, separator, folder = one.partition("=")
        if not separator or not name or not folder:
            raise UserError(f"--adapter is {one!r}; allowed: NAME=FOLDER, such as legal=runs/legal/adapter")
        if name in folders:
            raise UserError(f"--adapter names {name!r} twice; give each adapter a name of its own")
        folders[name] = Path(folder)
    return folders


def _keys(path: Path) -> tuple[str, ...]:
    """The keys of a file. Errors name lines, never a key."""
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not ASCII text"
        raise UserError(f"--api-key-file is {path}, which cannot be read ({reason}); give a file of keys") from None
    keys: list[str] = []
    for number, line in enumerate(lines, 1):
        key = line.split("#")[0].strip()
        if any(char.isspace() for char in key):
            raise UserError(f"{path}, line {number}: a key has no spaces; give one a line")
        keys += [key] if key else []
    if not keys:
        raise UserError(f"{path} holds no key; give one a line")
    return tuple(keys)


def _bind(host: str, port: int) -> socket.socket:
    """The listening socket, bound before its address is logged."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        # From here on clients wait instead of being refused.
        listening.listen(2048)
    except OSError as error:
        raise RunError(
            f"cannot listen on {host} port {port} ({error.strerror}); give another --port, 0 takes a free one"
        ) from None
    return listening


def _name(model: str | None, folder: Path) -> str:
    if model is None:
        return "tnllm-demo"
    if hub.is_hub_name(model):
        return hub.repo_name(model)
    # runs/first/weights is known as first.
    path = Path(model).resolve()
    return (path.parent if path.name == "weights" else path).name or folder.name
