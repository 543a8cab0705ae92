"""Checks in front of every route, Host and API key, and of every body: its type, size and time.

app.add_middleware(RequestChecks, settings=Settings(name="demo", api_key="secret"))

Refusals have OpenAI's error shape.
"""

import asyncio
import hashlib
import hmac
import ipaddress
import json
import re
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tnllm.progress import log
from tnllm.serving.bodies import REQUEST_ID, RequestError, error_body, shown

# Served without a key, as is what begins with the second: the files of the page, which asks for the key.
_OPEN_PATHS, _OPEN_FOLDER = ("/", "/health"), "/page/"
# Keys of a request's scope: whose states it may use, and the answer whose tokens are counted.
OWNER, TOKENS = "tnllm.owner", "tnllm.tokens"
REQUEST_ID_HEADER = "X-Request-Id"
_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")
_BODY_SECONDS = 30.0


@dataclass(frozen=True)
class Settings:
    """Settings of the server.

    api_key: what clients must send as a bearer token; more_keys: others that will do too. hosts: names that are served
    besides those of the loopback; None serves every name. A server on the loopback serves no others, so that a web page
    elsewhere cannot reach it by DNS rebinding. states_are_hidden: none are listed; for a server that others reach and
    that has no keys. cors_origins: pages of these origins may read answers; "*" is every page. log_requests: write a line
    for each request.
    """

    name: str
    api_key: str | None = None
    more_keys: tuple[str, ...] = ()
    max_body_bytes: int = 8 << 20
    hosts: tuple[str, ...] | None = ()
    states_are_hidden: bool = False
    cors_origins: tuple[str, ...] = ()
    log_requests: bool = False

    @property
    def keys(self) -> tuple[str, ...]:
        return self.more_keys if self.api_key is None else (self.api_key, *self.more_keys)


class JSON(Response):
    """JSON in ASCII, so that an answer may quote any text that a client sent, lone surrogates included."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return encode_json(content)


_ENCODER = json.JSONEncoder(separators=(",", ":"))


def encode_json(content: Any, yielding: bool = False) -> bytes:
    """JSON in ASCII; `yielding` takes longer and lets other threads run meanwhile."""
    return ("".join(_ENCODER.iterencode(content)) if yielding else _ENCODER.encode(content)).encode("ascii")


class RequestChecks:
    """The application behind the checks."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        """A fault here or behind it is answered by the application that it is added to."""
        self._app, self._settings = app, settings
        self._keys = [hashlib.sha256(key.encode()).hexdigest() for key in settings.keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            # The lifespan protocol; websockets have no route.
            await self._app(scope, receive, send)
            return
        begun, status = time.monotonic(), 0
        given = dict(scope["headers"]).get(REQUEST_ID_HEADER.lower().encode(), b"")
        id = given if _REQUEST_ID.fullmatch(given) else f"req-{uuid.uuid4().hex}".encode()
        REQUEST_ID.set(id.decode())
        scope = {**scope, TOKENS: None}

        async def watched_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], (REQUEST_ID_HEADER.lower().encode(), id)]}
            await send(message)

        try:
            await self._checked(scope, receive, watched_send)
        except asyncio.CancelledError:
            # The server has ended, and this request's body or a client that reads slowly keeps it waiting.
            if not status:
                body = error_body(
                    "the server is shutting down; try another one", "service_unavailable", "shutting_down"
                )
                await JSON(body, 503, {"Retry-After": "10"})(scope, receive, watched_send)
        finally:
            if self._settings.log_requests:
                log(_request_line(scope, status, time.monotonic() - begun))

    async def _checked(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        host, path = headers.get(b"host"), scope["path"]
        if absolute := re.match(r"https?://([^/]*)", path, re.IGNORECASE):
            # As to a proxy; what it names precedes the Host header (RFC 9112, 3.2.2).
            host, path = absolute[1].encode(), path[absolute.end() :] or "/"
        if not self._host_allowed(host, scope["http_version"]):
            message = "this Host is not served here; open the server by the address it printed, or start it with "
            refusal = JSON(error_body(message + "--allowed-host NAME", "invalid_request_error"), 403)
            await refusal(scope, receive, send)
            return
        owner = self._owner(headers.get(b"authorization", b""))
        if owner is None and path not in _OPEN_PATHS and not path.startswith(_OPEN_FOLDER):
            message = "a wrong or missing API key; send it as 'Authorization: Bearer KEY'"
            body = error_body(message, "authentication_error", "invalid_api_key")
            await JSON(body, 401, {"WWW-Authenticate": "Bearer"})(scope, receive, send)
            return
        scope.update({"path": path, OWNER: owner})
        await self._app(scope, receive, send)

    def _host_allowed(self, host: bytes | None, http_version: str) -> bool:
        hosts = self._settings.hosts
        if hosts is None:
            return True
        if host is None:
            # Older than the header, so sent by no browser.
            return http_version == "1.0"
        name = re.sub(r":\d*$", "", host.decode("latin-1")).lower()
        return is_loopback(name) or name.removesuffix(".") in hosts

    def _owner(self, authorization: bytes) -> str | None:
        """Whose states the key of a request opens: a digest of it, empty if no key is needed. None: the key is wrong."""
        if not self._keys:
            return ""
        scheme, _, key = authorization.partition(b" ")
        digest = hashlib.sha256(key.strip()).hexdigest()
        # Every key is compared, so that the time tells nothing.
        is_right = any([hmac.compare_digest(digest, one) for one in self._keys])
        return digest if is_right and scheme.lower() == b"bearer" else None


def _request_line(scope: Scope, status: int, seconds: float) -> str:
    """id, address, method, path, status (0: the client left before), seconds, and tokens if there are any."""
    address = scope["client"][0] if scope.get("client") else "-"
    # A path may hold what a terminal would obey.
    path = quote(scope["path"], safe="/:@!$&'()*+,;=~")[:200]
    usage = scope[TOKENS].usage() if scope[TOKENS] is not None else {}
    tokens = f", {usage['prompt_tokens']} + {usage['completion_tokens']} tokens" if usage else ""
    return f"{REQUEST_ID.get()} {address} {scope['method']} {path} {status} in {seconds:.3f} s{tokens}"


def is_loopback(name: str) -> bool:
    """Whether a host name or an address, in brackets or not, is this machine's own."""
    name = name.removesuffix(".")
    if name == "localhost" or name.endswith(".localhost"):
        # Reserved by RFC 6761: no name server is asked.
        return True
    try:
        address = ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


async def read_json_body(request: Request, limit: int) -> bytes:
    """The complete body of a request that declares it as JSON. Raises RequestError."""
    # A web page elsewhere may send any other type without a CORS preflight.
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        raise RequestError("the body must be JSON; send it with 'Content-Type: application/json'", status=415)
    return await read_body(request, limit)


async def read_body(request: Request, limit: int) -> bytes:
    """The complete body of a request. Raises RequestError."""
    encoding = request.headers.get("content-encoding", "")
    if encoding.lower() not in ("", "identity"):
        message = f"Content-Encoding is {shown(encoding)}; send the body as it is, without one"
        raise RequestError(message, status=415, headers={"Accept-Encoding": "identity"})
    declared = request.headers.get("content-length", "0")
    body = None
    if not declared.isdigit() or (len(declared) < 19 and int(declared) <= limit):
        try:
            body = await asyncio.wait_for(_read_body(request, limit), _BODY_SECONDS)
        except TimeoutError:
            message = f"the body did not arrive within {_BODY_SECONDS:g} seconds"
            raise RequestError(message, status=408, headers={"Connection": "close"}) from None
    if body is None:
        message = f"the body is larger than {limit} bytes, the most this server takes"
        raise RequestError(message, code="body_too_large", status=413, headers={"Connection": "close"})
    return body


async def _read_body(request: Request, limit: int) -> bytes | None:
    """The complete body; None if it is larger than `limit`."""
    body = bytearray()
    with suppress(ClientDisconnect):
        async for part in request.stream():
            body += part
            if len(body) > limit:
                return None
        return bytes(body)
    return b""
