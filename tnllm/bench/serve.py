"""Load on a running server: many streams at once; is each answered completely and with its own text?

    results = bench_serve("http://127.0.0.1:8000", streams=500, num_tokens=64, check=50)

Every stream has its own prompt and seed. Afterwards some are requested again, one at a time: the same seed gives the same
text, so a text that differs belongs to another stream, or a step's last digits decided between two tokens.
"""

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from tnllm.errors import RunError, UserError

# Seconds without a byte after which a stream counts as lost.
_PATIENCE_S = 300.0


@dataclass
class _Stream:
    """What one stream received."""

    number: int
    text: str = ""
    tokens: int = 0
    finish_reason: str | None = None
    error: str | None = None
    first_s: float | None = None
    seconds: float = 0.0
    gaps: list[float] = field(default_factory=list)


def bench_serve(
    url: str,
    streams: int,
    num_tokens: int,
    check: int,
    api_key: str | None = None,
    log: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Open `streams` at once, read all to their ends, request the first `check` again. Raises RunError without a server."""
    parts = urlsplit(url if "://" in url else f"http://{url}")
    if parts.scheme != "http" or not parts.hostname:
        raise UserError(f"the address is {url!r}; give one like http://127.0.0.1:8000 (plain HTTP)")
    server = _Server(parts.hostname, parts.port or 80, api_key)
    return asyncio.run(_bench(server, streams, num_tokens, check, log))


async def _bench(
    server: "_Server", streams: int, num_tokens: int, check: int, log: Callable[[str], None]
) -> dict[str, Any]:
    before = await server.memory()
    peak = before
    log(f"{streams} streams of {num_tokens} tokens")
    started = time.perf_counter()
    tasks = [asyncio.create_task(server.stream(number, num_tokens)) for number in range(streams)]
    while not all(task.done() for task in tasks):
        await asyncio.wait(tasks, timeout=2)
        peak = max(peak, await server.memory())
        log(f"{sum(task.done() for task in tasks)} of {streams} ended")
    seconds = time.perf_counter() - started
    results = [task.result() for task in tasks]
    after = await server.memory()
    answered = [stream for stream in results if stream.error is None]
    log(f"requesting {min(check, len(answered))} again, one at a time")
    different = []
    for stream in answered[:check]:
        again = await server.stream(stream.number, num_tokens)
        if again.text != stream.text:
            different.append(stream.number)
    tokens = sum(stream.tokens for stream in answered)
    return {
        "streams": streams,
        "tokens_each": num_tokens,
        "whole": sum(stream.tokens == num_tokens and stream.finish_reason == "length" for stream in answered),
        "failed": [{"stream": stream.number, "error": stream.error} for stream in results if stream.error is not None],
        "checked": min(check, len(answered)),
        "different": different,
        "seconds": seconds,
        "tokens_per_s": tokens / seconds,
        "first_token_s": _spread([stream.first_s for stream in answered if stream.first_s is not None]),
        "between_tokens_s": _spread([gap for stream in answered for gap in stream.gaps]),
        "stream_s": _spread([stream.seconds for stream in answered]),
        "memory_mib": {"before": before / 2**20, "peak": peak / 2**20, "after": after / 2**20},
        "date": time.strftime("%Y-%m-%d"),
    }


def _spread(values: list[float]) -> dict[str, float] | None:
    if not values:
        return None
    values = sorted(values)
    return {name: values[min(len(values) - 1, int(share * len(values)))] for name, share in _SHARES.items()}


_SHARES = {"median": 0.5, "p95": 0.95, "most": 1.0}


class _Server:
    """A small client. HTTP/1.0, so that a response ends with its connection."""

    def __init__(self, host: str, port: int, api_key: str | None) -> None:
        self._host, self._port = host, port
        self._headers = f"Host: {host}:{port}\r\n" + (f"Authorization: Bearer {api_key}\r\n" if api_key else "")

    async def _ask(
        self, method: str, path: str, body: bytes = b""
    ) -> tuple[int, asyncio.StreamReader, asyncio.StreamWriter]:
        try:
            reader, writer = await asyncio.open_connection(self._host, self._port, limit=1 << 20)
        except OSError as error:
            raise RunError(
                f"no server answers at {self._host}:{self._port} ({error.strerror or error}); start one: tnllm serve"
            ) from None
        head = f"{method} {path} HTTP/1.0\r\n{self._headers}Content-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        await writer.drain()
        status = (await asyncio.wait_for(reader.readline(), _PATIENCE_S)).split()
        while (await reader.readline()).strip():
            pass
        return int(status[1]) if len(status) > 1 else 0, reader, writer

    async def memory(self) -> float:
        """Resident bytes of the server."""
        status, reader, writer = await self._ask("GET", "/metrics")
        text = (await reader.read()).decode()
        writer.close()
        if status == 401:
            raise UserError("the server asks for an API key; give --api-key or TNLLM_API_KEY")
        for line in text.splitlines():
            if line.startswith("process_resident_memory_bytes "):
                return float(line.split()[1])
        raise RunError(f"/metrics of {self._host}:{self._port} (status {status}) is not that of tnllm serve")

    async def stream(self, number: int, num_tokens: int) -> _Stream:
        """Request one text and read it as it comes. A failure is kept in the result's `error`."""
        result = _Stream(number)
        body = {
            "prompt": f"Once upon a time there were {number}", "max_tokens": num_tokens, "seed": number,
            "stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True,
        }  # fmt: skip
        started = last = time.perf_counter()
        try:
            status, reader, writer = await self._ask("POST", "/v1/completions", json.dumps(body).encode())
            if status != 200:
                result.error = f"status {status}: {(await reader.read()).decode(errors='replace')[:200]}"
            ended = False
            while result.error is None and not ended:
                line = (await asyncio.wait_for(reader.readline(), _PATIENCE_S)).strip()
                now = time.perf_counter()
                if not line and reader.at_eof():
                    result.error = "the stream was interrupted"
                elif line == b"data: [DONE]":
                    ended = True
                elif line.startswith(b"data: "):
                    event = json.loads(line.removeprefix(b"data: "))
                    if "error" in event:
                        result.error = event["error"]["message"]
                        continue
                    if event["usage"]:
                        result.tokens = event["usage"]["completion_tokens"]
                    for choice in event["choices"]:
                        result.text += choice["text"]
                        result.finish_reason = choice["finish_reason"]
                        if choice["text"] and result.first_s is None:
                            result.first_s = now - started
                        elif choice["text"]:
                            result.gaps.append(now - last)
                    last = now
            writer.close()
        except (OSError, TimeoutError, RunError) as error:
            result.error = str(error) or type(error).__name__
        result.seconds = time.perf_counter() - started
        return result
