"""How long /health waits while the server works on a body: `python -m tests.serving.stalls --port 8000 --repeats 20`.

Needs a server (`tnllm serve --port 8000`) and a checkout. Prints the longest wait for each kind of body, and beside it the
longest of as long a time without one, which is the machine's own. The kinds are the worst that fit into `--mib`, and a
million token ids. `--json FILE` writes every trial.
"""

import argparse
import http.client
import json
import random
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path


def bodies(size: int) -> dict[str, bytes]:
    """Bodies of at most `size` bytes, by kind."""

    def filled(before: str, one: str, after: str, most: int = size) -> bytes:
        count = (most - len(before) - len(after)) // len(one)
        return (before + one * count).removesuffix(",").encode() + after.encode()

    ids = json.dumps([random.Random(1).randrange(3, 300) for _ in range(1_000_000)], separators=(",", ":"))
    return {
        "a million ids, accepted": f'{{"max_tokens":1,"prompt":{ids}}}'.encode(),
        "wrong ids, 2 MiB": filled('{"prompt":[', "1.5,", "]}", 2 << 20),
        "4 million numbers": filled('{"prompt":[5,"a",', "1,", "]}"),
        "2.8 million empty lists": filled('{"prompt":[', "[],", "]}"),
        "700,000 keys": b"{" + b",".join(b'"%x":0' % number for number in range(size // 12)) + b"}",
        "a long key": filled('{"', "a", '":1}'),
        "290,000 messages": filled('{"messages":[', '{"role":"user","content":""},', "]}"),
        "one text of sentences": filled('{"max_tokens":1,"prompt":"', "Once upon a time there was a king. ", '"}'),
        "one text of letters": filled('{"max_tokens":1,"prompt":"', "a", '"}'),
    }


# A body that is accepted takes minutes to prefill; the client leaves before.
PATIENCE_SECONDS = {"a million ids, accepted": 4.0}


def longest_wait(host: str, port: int, kind: str, body: bytes) -> tuple[float, str, float]:
    """Seconds of the longest wait, the body's answer, and the longest wait of as long a time after it."""
    outcome: list[str] = []

    def post() -> None:
        start = time.monotonic()
        connection = http.client.HTTPConnection(host, port, timeout=PATIENCE_SECONDS.get(kind))
        path = "/v1/chat/completions" if body.startswith(b'{"messages"') else "/v1/completions"
        try:
            connection.request("POST", path, body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            answer.read()
            outcome.append(f"{answer.status} after {time.monotonic() - start:.1f} s")
        except TimeoutError:
            outcome.append("accepted")
        connection.close()

    began = time.monotonic()
    thread = threading.Thread(target=post)
    thread.start()
    longest = _longest_probe(host, port, thread.is_alive)
    until = 2 * time.monotonic() - began
    return longest, outcome[0], _longest_probe(host, port, lambda: time.monotonic() < until)


def _longest_probe(host: str, port: int, is_on: Callable[[], bool]) -> float:
    longest = 0.0
    while is_on():
        start = time.monotonic()
        probe = http.client.HTTPConnection(host, port)
        probe.request("GET", "/health")
        probe.getresponse().read()
        longest = max(longest, time.monotonic() - start)
        time.sleep(0.01)
    return longest


def main() -> None:
    """Print the longest wait for each kind of body."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--mib", type=float, default=8)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", type=Path, help="write the seconds of every trial here")
    kinds = bodies(1 << 12)
    parser.add_argument("kinds", nargs="*", help=f"some of: {'; '.join(kinds)}. Default: all")
    options = parser.parse_args()
    if unknown := [kind for kind in options.kinds if kind not in kinds]:
        parser.error(f"{unknown[0]!r} is not a kind of body; they are: {'; '.join(kinds)}")
    try:
        socket.create_connection((options.host, options.port), timeout=60).close()
    except OSError as error:
        parser.error(
            f"no server on {options.host} port {options.port} ({error}); start one: tnllm serve --port {options.port}"
        )
    trials: dict[str, list[dict[str, float | str]]] = {}
    print(f"| body | longest wait of /health, worst of {options.repeats} | without a body | answer |")
    print("| --- | --- | --- | --- |")
    for kind, body in bodies(int(options.mib * 2**20)).items():
        if not options.kinds or kind in options.kinds:
            waits = [longest_wait(options.host, options.port, kind, body) for _ in range(options.repeats)]
            longest, answer, _ = max(waits)
            print(f"| {kind} | {longest:.2f} s | {max(alone for *_, alone in waits):.2f} s | {answer} |", flush=True)
            names = ("longest_s", "answer", "without_body_s")
            trials[kind] = [dict(zip(names, wait, strict=True)) for wait in waits]
            if options.json:
                options.json.write_text(json.dumps(trials, indent=1) + "\n")


if __name__ == "__main__":
    main()
