"""Load on a running server: is each of many streams answered completely and with its own text, and how fast?

    results = bench_serve("http://127.0.0.1:8000", [1, 32, 256], Load(tokens=128, prompt_tokens=128), check=20)

Every request has its own prompt and seed. Some of the last row's are sent again, one at a time: the same seed gives the
same text, so a text that differs belongs to another stream, or a step's last digits decided between two tokens.
"""

import asyncio
import json
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from os.path import commonprefix
from typing import Any
from urllib.parse import urlsplit

from tnllm.errors import RunError, UserError

# Seconds without a byte after which a stream counts as lost.
_PATIENCE_S = 300.0
# Texts may begin alike by chance; that so many more characters agree with another stream's text is none.
_OTHERS_CHARS = 16
# Random prompts are made of its ids, which are valid whatever the vocabulary.
_WORDS = """It was a bright cold day in the north, and seven old ships lay at the quay with their sails down. Who would have
thought that the youngest of us, a girl of nine, should be first to see smoke above the hill? (1066, 1492, 1789.)"""


@dataclass(frozen=True)
class Load:
    """What each client asks for, one request after another."""

    tokens: int = 64
    prompt_tokens: int | None = None  # None: a short sentence
    prefix_tokens: int = 0  # of every prompt, before its own prompt_tokens
    requests: int = 1


@dataclass
class _Stream:
    """What one request received."""

    text: str = ""
    tokens: int = 0
    finish_reason: str | None = None
    error: str | None = None
    first_s: float | None = None
    last_s: float = 0.0
    gaps: list[float] = field(default_factory=list)


def bench_serve(
    url: str,
    streams: list[int],
    load: Load,
    check: int = 0,
    seed: int = 0,
    api_key: str | None = None,
    log: Callable[[str], None] = lambda text: None,
    on_row: Callable[[dict[str, Any] | None], None] = lambda row: None,
) -> dict[str, Any]:
    """A row for each number of streams open at once; then the first `check` requests of the last row again.

    Two calls with one `seed` send the same prompts, which a server may have cached. on_row: gets None once the server has
    answered, then each row. Raises RunError without a server.
    """
    parts = urlsplit(url if "://" in url else f"http://{url}")
    if parts.scheme != "http" or not parts.hostname:
        raise UserError(f"the address is {url!r}; give one like http://127.0.0.1:8000 (plain HTTP)")
    server = _Server(parts.hostname, parts.port or 80, api_key)

    async def bench() -> dict[str, Any]:
        await server.memory()
        on_row(None)
        ids = await server.tokenize(_WORDS) if load.prompt_tokens is not None or load.prefix_tokens else []
        first, rows, failed = seed, [], []
        results: list[_Stream] = []
        bodies: list[bytes] = []
        for count in streams:
            bodies = [_body(load, ids, seed, number) for number in range(first, first + count * load.requests)]
            first += len(bodies)
            row, results = await _row(server, count, load, bodies, log)
            rows.append(row)
            failed += [stream.error for stream in results if stream.error is not None]
            on_row(row)
        answered = [index for index, stream in enumerate(results) if stream.error is None]
        if check:
            log(f"requesting {len(answered[:check])} again, one at a time")
        alone = {index: await server.stream(bodies[index]) for index in answered[:check]}
        different = [index for index, again in alone.items() if again.text != results[index].text]
        others = [index for index in different if _is_of_another(index, results[index].text, alone)]
        return {
            "rows": rows, "failed": failed, "checked": len(alone), "different": different, "of_another": others,
            "seed": seed, "date": time.strftime("%Y-%m-%d"),
        }  # fmt: skip

    return asyncio.run(bench())


def _body(load: Load, ids: list[int], seed: int, number: int) -> bytes:
    prompt: str | list[int] = f"Once upon a time there were {number}"
    if ids:
        own = random.Random(number).choices(ids, k=load.prompt_tokens or 1)
        prompt = random.Random(f"prefix {seed}").choices(ids, k=load.prefix_tokens) + own
    body = {
        "prompt": prompt, "max_tokens": load.tokens, "seed": number, "stream": True,
        "stream_options": {"include_usage": True}, "ignore_eos": True,
    }  # fmt: skip
    return json.dumps(body).encode()


def _is_of_another(own: int, text: str, alone: dict[int, _Stream]) -> bool:
    """Whether a text that differs from what its request gave alone begins as what another request gave."""
    same = {index: len(commonprefix((text, other.text))) for index, other in alone.items()}  # noqa: RUF071
    return max(same.values()) >= same[own] + _OTHERS_CHARS


async def _row(
    server: "_Server", count: int, load: Load, bodies: list[bytes], log: Callable[[str], None]
) -> tuple[dict[str, Any], list[_Stream]]:
    before = peak = await server.memory()
    log(f"{count} streams of {load.tokens} tokens")
    results: list[_Stream] = [_Stream() for _ in bodies]

    async def client(first: int) -> None:
        for index in range(first, len(bodies), count):
            results[index] = await server.stream(bodies[index])

    started = time.perf_counter()
    tasks = [asyncio.create_task(client(number)) for number in range(count)]
    while not all(task.done() for task in tasks):
        await asyncio.wait(tasks, timeout=2)
        seconds = time.perf_counter() - started
        now = await server.memory()
        peak = max(peak[0], now[0]), max(peak[1], now[1])
        log(f"{sum(task.done() for task in tasks)} of {count} ended")
    for task in tasks:
        task.result()
    answered = [stream for stream in results if stream.error is None]
    after = await server.memory()
    tokens = sum(stream.tokens for stream in answered)
    row: dict[str, Any] = {
        "streams": count,
        **asdict(load),
        "requests": len(bodies),
        "whole": sum(stream.tokens == load.tokens and stream.finish_reason == "length" for stream in answered),
        "failed": len(bodies) - len(answered),
        "seconds": seconds,
        "requests_per_s": len(answered) / seconds,
        "tokens_per_s": tokens / seconds,
    }
    times = {
        "first": [stream.first_s for stream in answered if stream.first_s is not None],
        "gap": [gap for stream in answered for gap in stream.gaps],
        # Servers that send several tokens at a time have gaps of nothing beside long ones.
        "token": [sum(stream.gaps) / (stream.tokens - 1) for stream in answered if stream.tokens > 1],
    }
    for name, values in times.items():
        for share in (50, 99):
            index = min(len(values) - 1, share * len(values) // 100)
            row[f"{name}_p{share}_ms"] = 1e3 * sorted(values)[index] if values else None
    for name, (host, device) in (("before", before), ("peak", peak), ("after", after)):
        row[f"memory_{name}_mib"], row[f"device_{name}_mib"] = host / 2**20 or None, device / 2**20 or None
    return row, results


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

    async def _text(self, method: str, path: str, body: bytes = b"") -> tuple[int, str]:
        status, reader, writer = await self._ask(method, path, body)
        text = (await reader.read()).decode(errors="replace")
        writer.close()
        if status == 401:
            raise UserError("the server asks for an API key; give --api-key or TNLLM_API_KEY")
        return status, text

    async def memory(self) -> tuple[float, float]:
        """Resident bytes of the server, and the most that it has allocated on its device; 0 where it does not say."""
        lines = [line.split() for line in (await self._text("GET", "/metrics"))[1].splitlines()]
        values = {line[0]: line[1] for line in lines if len(line) == 2}
        names = ("process_resident_memory_bytes", "tnllm_device_memory_peak_bytes")
        return float(values.get(names[0], 0)), float(values.get(names[1], 0))

    async def tokenize(self, text: str) -> list[int]:
        # vLLM and tnllm; llama.cpp.
        for key in ("prompt", "content"):
            status, answer = await self._text("POST", "/tokenize", json.dumps({key: text}).encode())
            if status == 200 and (ids := json.loads(answer).get("tokens")):
                return list(ids)
        raise RunError("the server has no /tokenize, which prompts of a given length need; leave --prompt-tokens out")

    async def stream(self, body: bytes) -> _Stream:
        """Request one text and read it as it comes. A failure is kept in the result's `error`."""
        result = _Stream()
        started = time.perf_counter()
        try:
            status, reader, writer = await self._ask("POST", "/v1/completions", body)
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
                    _add(result, json.loads(line.removeprefix(b"data: ")), now, started)
            writer.close()
        except (OSError, TimeoutError, RunError) as error:
            result.error = str(error) or type(error).__name__
        return result


def _add(result: _Stream, event: dict[str, Any], now: float, started: float) -> None:
    """What an event of a stream says."""
    if "error" in event:
        result.error = event["error"]["message"]
        return
    if event.get("usage"):
        result.tokens = event["usage"]["completion_tokens"]
    for choice in event["choices"]:
        result.text += choice["text"]
        result.finish_reason = choice["finish_reason"] or result.finish_reason
        if choice["text"] and result.first_s is None:
            result.first_s = now - started
        elif choice["text"]:
            result.gaps.append(now - result.last_s)
        if choice["text"]:
            result.last_s = now
