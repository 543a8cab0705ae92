"""`tnllm serve` as typed: starts, serves, drains, explains."""

import builtins
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request

import pytest


def start(*args, **environment):
    process = subprocess.Popen(
        [sys.executable, "-m", "tnllm", "serve", "--port", "0", "--slots", "2", *args],
        stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip
    lines = []
    for line in process.stderr:
        lines.append(line)
        if match := re.search(r"try the page at (http://\S+)/ or", line):
            return process, match[1], lines
    raise AssertionError("".join(lines))


def post(address, **body):
    request = urllib.request.Request(
        f"{address}/v1/completions", json.dumps(body).encode(),
        {"Content-Type": "application/json", "Authorization": "Bearer sesame"},
    )  # fmt: skip
    return urllib.request.urlopen(request, timeout=60)


@pytest.mark.slow
def test_it_serves_and_sigterm_lets_running_requests_end(tnllm):
    process, address, lines = start("--max-tokens", "200", TNLLM_API_KEY="sesame")
    try:
        assert "using the demo model" in lines[0] and "serving tnllm-demo on http://127.0.0.1:" in lines[1]
        answer = json.load(post(address, prompt="Once upon a time", max_tokens=10, seed=1))
        _, expected, _ = tnllm(
            "generate", "--prompt", "Once upon a time", "--max-tokens", "10", "--seed", "1", "--json", "--device", "cpu"
        )
        assert answer["choices"][0]["text"] == json.loads(expected)["text"]
        stream = post(address, prompt="Once", max_tokens=40, seed=1, stream=True, ignore_eos=True)
        first = stream.readline()
        process.send_signal(signal.SIGTERM)
        rest = stream.read().decode()
        assert first.startswith(b"data: {") and rest.endswith("data: [DONE]\n\n")
        assert '"finish_reason":"length"' in rest
        assert process.wait(60) == 143
        assert process.stderr.read().strip() == "tnllm: stopped by SIGTERM; running requests were finished"
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_ctrl_c_is_130_and_ends_what_takes_too_long():
    process, address, _ = start("--drain-seconds", "0")
    try:
        stream = post(address, prompt="Once", max_tokens=60_000, stream=True, ignore_eos=True)
        stream.readline()
        reader = threading.Thread(target=lambda: [None for _ in stream])
        reader.start()
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        reader.join(10)
        assert not reader.is_alive()
        assert process.stderr.read().strip().splitlines()[-1] == "tnllm: stopped by Ctrl-C"
    finally:
        process.kill()
        process.wait()


def test_without_the_extra(tnllm, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **more):
        if name.split(".")[0] == "fastapi":
            raise ImportError(name)
        return real(name, *args, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    code, out, err = tnllm("serve")
    assert code == 3 and out == "" and "pip install 'tnllm[serve]'" in err


def test_a_taken_port(tnllm):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, _, err = tnllm("serve", "--port", port, "--slots", 1)
    assert code == 1 and f"cannot listen on 127.0.0.1 port {port} (Address already in use)" in err


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["--model", "nowhere"], 2, "nowhere"),
        (["--api-key", ""], 2, "the API key (--api-key) must be ASCII, no spaces"),
        (["--port", "70000"], 2, "--port"),
        (["--host", "not.a.host.invalid"], 1, "cannot listen on not.a.host.invalid"),
        (["--device", "tpu"], 2, "device is 'tpu'"),
    ],
)
def test_bad_input(tnllm, args, code, message):
    exit_code, out, err = tnllm("serve", *args)
    assert exit_code == code and out == ""
    assert message in err.splitlines()[-1] and err.splitlines()[-1].startswith("tnllm: ")
