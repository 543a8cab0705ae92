"""Connections: how many one address may keep busy, how long a silent one stays, and errors of HTTP itself in our form.

uvicorn.Server(server_config(app, max_requests=800, max_requests_per_address=600)).run()

A connection is silent until the headers of its first request are complete, and while those of a later one are begun and
not complete. Silent connections are never in the way of others: they have little time, less where one address has many,
and the oldest makes room for a new connection. So only requests that are being answered can fill the server.
"""

import http
import sys
from asyncio import TimerHandle
from collections import Counter
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from tnllm.serving.bodies import error_body
from tnllm.serving.middleware import JSON, encode_json

# Of a request: from connection, or from its first byte if it is a later one, to the end of its headers.
HEADER_SECONDS = 10.0
# The same where an address has more silent connections than _FEW.
HURRIED_SECONDS, _FEW = 1.0, 64
# Between two requests of a connection.
IDLE_SECONDS = 5
# Until a client that does not read has to take what it was sent.
READ_SECONDS = 60.0
# Bytes of later requests that are read while one is answered.
MOST_AHEAD = 1 << 18
# Probes are answered under any load.
_EXEMPT = ("/health",)


class Connections:
    """What the connections of one server share."""

    def __init__(self, max_requests: int, max_requests_per_address: int) -> None:
        self.max_requests, self.max_per_address = max_requests, max_requests_per_address
        self.num_open = 0
        # Oldest first.
        self.silent: dict[Protocol, None] = {}
        self.num_silent: Counter[str] = Counter()
        self.busy: Counter[str] = Counter()

    def refusal(self, address: str) -> str | None:
        """Why one more request of `address` is refused, or None."""
        if self.busy[address] >= self.max_per_address:
            return f"{self.max_per_address} requests of your address are being answered"
        if self.busy.total() >= self.max_requests:
            return f"{self.max_requests} requests are being answered"
        return None


class Protocol(H11Protocol):
    """uvicorn's, with limits. `connections` is set by `server_config`."""

    limits: Connections

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._address = self.client[0] if self.client else ""
        self._header_timer: TimerHandle | None = None
        self._read_timer: TimerHandle | None = None
        self._has_begun = False
        # The name by which uvicorn's protocol calls the application.
        self._application, self.app = self.app, self._answer
        self.limits.num_open += 1
        if self.limits.num_open > self.limits.max_requests and self.limits.silent:
            next(iter(self.limits.silent)).transport.abort()
        self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self.limits.num_open -= 1
        self._stop_waiting()
        if self._read_timer is not None:
            self._read_timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._has_begun = True
        super().data_received(data)
        if self.transport.is_closing() or not (self.cycle is None or self.cycle.response_complete):
            self._stop_waiting()
        else:
            self._await_headers()
        if self.flow.read_paused and self.conn.their_state is h11.DONE and not self.transport.is_closing():
            # Only while it reads does the server notice that a client has left; uvicorn stops at a later request.
            if len(self.conn.trailing_data[0]) > MOST_AHEAD:
                self.transport.abort()
            else:
                self.flow.resume_reading()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._read_timer = self.loop.call_later(READ_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._read_timer is not None:
            self._read_timer.cancel()

    def _await_headers(self) -> None:
        """Start the clock, unless it runs: a client that sends a byte at a time does not stop it."""
        if self._header_timer is None:
            self.limits.silent[self] = None
            self.limits.num_silent[self._address] += 1
            hurried = self.limits.num_silent[self._address] > _FEW
            seconds = HURRIED_SECONDS if hurried else HEADER_SECONDS
            self._header_timer = self.loop.call_later(seconds, self._end_waiting, seconds)

    def _stop_waiting(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None
            del self.limits.silent[self]
            self.limits.num_silent[self._address] -= 1

    def _end_waiting(self, seconds: float) -> None:
        self._stop_waiting()
        if self._has_begun:
            self._refuse(408, f"the headers of the request did not arrive within {seconds:g} seconds")
        else:
            self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        # uvicorn calls this while it handles h11's error.
        error = sys.exc_info()[1]
        self._refuse(getattr(error, "error_status_hint", 400), f"this is not valid HTTP: {error or msg}")

    def _refuse(self, status: int, message: str) -> None:
        """Answer below the application, and close."""
        body = encode_json(error_body(message, "invalid_request_error"))
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            response = h11.Response(status_code=status, headers=headers, reason=http.HTTPStatus(status).phrase)
            for event in (response, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The application within the limits."""
        is_exempt = scope["path"] in _EXEMPT
        refusal = None if is_exempt else self.limits.refusal(self._address)
        if refusal is not None:
            body = error_body(f"{refusal}, the most this server allows; try again later", "server_overloaded")
            await JSON(body, 503, {"Retry-After": "1", "Connection": "close"})(scope, receive, send)
            return
        self.limits.busy[self._address] += not is_exempt
        try:
            await self._application(scope, receive, send)
        finally:
            self.limits.busy[self._address] -= not is_exempt
            self.limits.busy += Counter()  # forgets addresses without requests


def server_config(app: ASGIApp, max_requests: int, max_requests_per_address: int, **more: Any) -> uvicorn.Config:
    """uvicorn's configuration for a server with these limits; `more` of its options."""
    limits = Connections(max_requests, max_requests_per_address)
    return uvicorn.Config(
        app,
        http=type("Protocol", (Protocol,), {"limits": limits}),
        ws="none",
        access_log=False,
        server_header=False,
        headers=[("X-Content-Type-Options", "nosniff")],
        timeout_keep_alive=IDLE_SECONDS,
        **more,
    )
