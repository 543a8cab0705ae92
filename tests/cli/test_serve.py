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
import time
import urllib.error
import urllib.request

import pytest

from tnllm.cli.serve import _keys
from tnllm.files import only_writer


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
    return urllib.request.urlopen(request, timeout=300)


@pytest.mark.slow
def test_it_serves_and_sigterm_lets_running_requests_end(tnllm):
    process, address, lines = start("--max-tokens", "200", "--allowed-host", "Box.example", TNLLM_API_KEY="sesame")
    try:
        assert "using the demo model" in lines[0] and "serving tnllm-demo on http://127.0.0.1:" in lines[1]
        answer = json.load(post(address, prompt="Once upon a time", max_tokens=10, seed=1))
        _, expected, _ = tnllm(
            "generate", "--prompt", "Once upon a time", "--max-tokens", "10", "--seed", "1", "--json", "--device", "cpu"
        )
        assert answer["choices"][0]["text"] == json.loads(expected)["text"]
        # The default of 256 gives way to the limit.
        assert 0 < json.load(post(address, prompt="Once"))["usage"]["completion_tokens"] <= 200
        urllib.request.urlopen(urllib.request.Request(f"{address}/health", headers={"Host": "box.example"})).close()
        stream = post(address, prompt="Once", max_tokens=40, seed=1, stream=True, ignore_eos=True)
        first = stream.readline()
        process.send_signal(signal.SIGTERM)
        rest = stream.read().decode()
        assert first.startswith(b"data: {") and rest.endswith("data: [DONE]\n\n")
        assert '"finish_reason":"length"' in rest
        assert process.wait(300) == 143
        assert process.stderr.read().strip().endswith("tnllm: stopped by SIGTERM; running requests: 1 finished, 0 cut")
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_a_signal_is_heeded_at_once_even_while_a_text_is_tokenized():
    """The tokenizer's C++ code cannot be interrupted; the first signal comes as soon as the address is printed."""
    process, address, _ = start("--drain-seconds", "0")
    try:
        body = json.dumps({"prompt": "the sea " * 900_000, "max_tokens": 1}).encode()
        head = f"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        with socket.create_connection(address.removeprefix("http://").split(":")) as connection:
            connection.sendall(f"POST /v1/completions HTTP/1.1\r\n{head}\r\n".encode() + body)
            process.send_signal(signal.SIGTERM)
            errors = process.communicate(timeout=300)[1]
        assert process.returncode == 143, errors
        assert errors.splitlines()[-1].startswith("tnllm: stopped by SIGTERM")
    finally:
        process.kill()
        process.wait()
    process, _, _ = start()
    try:
        process.send_signal(signal.SIGTERM)
        assert process.wait(300) == 143 and process.stderr.read().endswith("tnllm: stopped by SIGTERM\n")
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_what_takes_too_long_is_told_and_counted():
    """A second signal ends the time to drain, which is otherwise tested in test_engine."""
    process, address, _ = start("--drain-seconds", "600")
    endless = {"prompt": "Once", "max_tokens": 60_000, "ignore_eos": True}
    told = {}

    def plain():
        try:
            post(address, **endless)
        except urllib.error.HTTPError as error:
            told["plain"] = error.code, error.headers["Retry-After"], json.load(error)["error"]

    def refusal(path, body=None):
        request = urllib.request.Request(address + path, body, {"Content-Type": "application/json"})
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request, timeout=300)
        return caught.value.code, json.load(caught.value)

    try:
        stream = post(address, **endless, stream=True)
        stream.readline()
        waiting = threading.Thread(target=plain)
        waiting.start()
        half = socket.create_connection(address.removeprefix("http://").split(":"))
        half.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
        half.sendall(b"Content-Length: 100\r\n\r\n{")
        while "tnllm_requests_active 2" not in urllib.request.urlopen(f"{address}/metrics").read().decode():
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline().startswith(
            "stopping: running requests (2) have 600 s, or until a second signal"
        )
        assert refusal("/health") == (503, {"status": "shutting down"})
        status, new = refusal("/v1/completions", b'{"prompt": "a"}')
        assert status == 503 and new["error"]["code"] == "shutting_down"
        process.send_signal(signal.SIGINT)
        *_, last, blank = stream.read().decode().split("\n\n")
        assert (
            blank == ""
            and "shut down before the text was finished" in json.loads(last.removeprefix("data: "))["error"]["message"]
        )
        waiting.join()
        assert told["plain"][:2] == (503, "10") and told["plain"][2]["code"] == "shutting_down"
        assert half.recv(1 << 16).startswith(b"HTTP/1.1 503 ")
        assert process.wait(300) == 130
        errors = process.stderr.read()
        assert errors.splitlines()[-1] == "tnllm: stopped by Ctrl-C; running requests: 0 finished, 2 cut"
        assert "Traceback" not in errors
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
    ("content", "message"),
    [
        (b"", "holds no key; give one a line"),
        (b"# only a comment\n\n", "holds no key; give one a line"),
        (b"one\ntwo words\n", "line 2: a key has no spaces; give one a line"),
        ("schl\u00fcssel".encode(), "which cannot be read (it is not ASCII text)"),
    ],
)
def test_files_of_keys_that_are_none(tnllm, tmp_path, content, message):
    path = tmp_path / "keys"
    path.write_bytes(content)
    code, out, err = tnllm("serve", "--api-key-file", path)
    assert code == 2 and out == "" and message in err
    assert "words" not in err and "schl" not in err, "a message never shows a key"


def test_a_file_of_keys(tmp_path):
    path = tmp_path / "keys"
    path.write_text("# of two people\none   # the first\n\ntwo\none\n")
    assert _keys(path) == ("one", "two", "one")


def test_a_folder_of_states_that_another_server_uses(tnllm, tmp_path):
    with only_writer(tmp_path):
        code, _, err = tnllm("serve", "--state-dir", tmp_path)
    assert code == 2 and str(tmp_path) in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["--model", "nowhere"], 2, "nowhere"),
        (["--api-key", ""], 2, "the API key (--api-key) must be ASCII, no spaces"),
        (["--port", "70000"], 2, "--port"),
        (["--host", "not.a.host.invalid"], 1, "cannot listen on not.a.host.invalid"),
        (["--device", "tpu"], 2, "device is 'tpu'"),
        (["--cors-origin", "app.example"], 2, "--cors-origin is 'app.example'; allowed: *, or scheme and host"),
        (["--cors-origin", "https://app.example/"], 2, "--cors-origin is 'https://app.example/'; allowed: *"),
        (["--adapter", "legal"], 2, "--adapter is 'legal'; allowed: NAME=FOLDER"),
        (["--adapter", "=x"], 2, "--adapter is '=x'; allowed: NAME=FOLDER"),
        (["--adapter", "a=x", "--adapter", "a=y"], 2, "--adapter names 'a' twice"),
        (["--adapter", "a=nowhere"], 2, "nowhere is not a folder; give an adapter's folder"),
        (["--adapter", f"a={__file__}"], 2, "is not a folder; give an adapter's folder"),
        (["--adapter", "tnllm-demo=x"], 2, "has the base model's name"),
        (["--api-key-file", "nowhere"], 2, "nowhere, which cannot be read (No such file or directory)"),
        (["--api-key-file", "."], 2, "which cannot be read (Is a directory); give a file of keys"),
        (["--state-dir", __file__], 2, "--state-dir"),
        (["--state-gib", "-1"], 2, "--state-gib"),
        (["--state-gib-per-key", "-1"], 2, "--state-gib-per-key"),
        (["--state-hours", "0"], 2, "--state-hours"),
        (["--prompt-lookup", "8", "--dtype", "int8"], 2, "prompt_lookup gains nothing with int8 weights"),
    ],
)
def test_bad_input(tnllm, args, code, message):
    exit_code, out, err = tnllm("serve", *args)
    assert exit_code == code and out == ""
    assert message in err.splitlines()[-1] and err.splitlines()[-1].startswith("tnllm: ")
