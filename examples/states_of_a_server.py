"""Have a server read a text once, then ask many questions of it: python examples/states_of_a_server.py [URL] [FILE]

Start one before: tnllm serve. If TNLLM_API_KEY is set, it is sent, and the states are that key's.
"""

import json
import os
import sys
from pathlib import Path
from urllib.request import Request, urlopen

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
text = (
    Path(sys.argv[2]).read_text(encoding="utf-8") if len(sys.argv) > 2 else "The old house stood by the river. " * 200
)


def call(method: str, path: str, body: bytes | None = None, kind: str = "application/json") -> bytes:
    headers = {"Content-Type": kind}
    if key := os.environ.get("TNLLM_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    with urlopen(Request(URL + path, body, headers, method=method)) as answer:
        return answer.read()


def post(path: str, **body: object) -> dict:
    return json.loads(call("POST", path, json.dumps(body).encode()))


book = post("/v1/states", prompt=text)
print(f"{book['tokens']} tokens became {book['bytes'] / 1024:.0f} KiB: {book['id']}")

# No question reads the text again, and none sees another.
for question in ("In the morning", "At night", "The river"):
    answer = post("/v1/completions", state=book["id"], prompt=question, max_tokens=20, seed=1)
    print(f"{question}{answer['choices'][0]['text']!r}")
    print(f"  {answer['usage']['prompt_tokens_details']['cached_tokens']} tokens were not read again")

# A fork is a state of its own, which may read on.
fork = post(f"/v1/states/{book['id']}/fork", prompt="Then the flood came.")
print(f"the fork has {fork['tokens']} tokens")

# A state moves as a file: to another server of this model, or to `tnllm generate --state-in book.state`.
Path("book.state").write_bytes(call("GET", f"/v1/states/{book['id']}/content"))
moved = json.loads(call("POST", "/v1/states", Path("book.state").read_bytes(), "application/octet-stream"))
print(f"uploaded: {moved['tokens']} tokens")

for state in (book, fork, moved):
    call("DELETE", f"/v1/states/{state['id']}")
