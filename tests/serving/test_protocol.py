"""Connections at the level of bytes: silent ones are in nobody's way, and what HTTP itself refuses has the error form."""

import json
import socket
import time
from contextlib import ExitStack

import httpx
import pytest

from tests.serving.serving import running
from tests.small_models import make_ready
from tnllm.serving import protocol
from tnllm.serving.middleware import Settings, is_loopback

LIMITS = {"num_slots": 2, "max_new_tokens": 50_000}


@pytest.fixture(scope="module")
def ready(model, tokenizer):
    return make_ready(model, tokenizer)


@pytest.fixture(scope="module")
def server(ready):
    settings = Settings(name="org/small", api_key="sesame", hosts=("box.example",))
    with running(ready, settings, max_requests=60, max_requests_per_address=4, **LIMITS) as (address, engine):
        yield address, engine


def connect(address, source="127.0.0.1", receive_bytes=None):
    host, port = address.removeprefix("http://").split(":")
    connection = socket.socket()
    if receive_bytes:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    connection.settimeout(20)
    connection.bind((source, 0))
    connection.connect((host, int(port)))
    return connection


def answer(connection):
    """(status, headers, body) of what comes until the connection is closed."""
    data = b""
    while part := connection.recv(65536):
        data += part
    head, _, body = data.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    return (
        int(status.split()[1]),
        {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)},
        body,
    )


def ask(address, text):
    with connect(address) as connection:
        connection.sendall(text.replace("\n", "\r\n").encode())
        return answer(connection)


@pytest.mark.parametrize(
    ("text", "status", "message"),
    [
        ("GET /health\n\n", 400, "this is not valid HTTP: illegal request line"),
        ("GET /health HTTP/1.1\n\n", 400, "this is not valid HTTP: Missing mandatory Host: header"),
        ("GET /health HTTP/1.1\nHost: localhost\nX: " + "a" * 70_000, 431, "this is not valid HTTP: "),
        ("POST / HTTP/1.1\nHost: localhost\nTransfer-Encoding: gzip\n\n", 501, "this is not valid HTTP: "),
        ("POST / HTTP/1.1\nHost: localhost\nContent-Length: x\n\n", 400, "this is not valid HTTP: "),
    ],
)
def test_what_is_not_http_is_told_in_our_form(server, text, status, message):
    code, headers, body = ask(server[0], text)
    assert code == status and headers["content-type"] == "application/json"
    error = json.loads(body)["error"]
    assert error["message"].startswith(message) and set(error) == {"message", "type", "param", "code"}


def test_a_fault_outside_of_any_route_is_told_in_our_form(ready, monkeypatch):
    with running(ready, Settings(name="small"), **LIMITS) as (address, _):
        monkeypatch.setattr("tnllm.serving.middleware.RequestChecks._host_allowed", lambda *_: 1 / 0)
        failed = httpx.get(f"{address}/health")
        assert failed.status_code == 500 and failed.json()["error"]["type"] == "server_error"


def test_old_clients_need_no_host(server):
    assert ask(server[0], "GET /health HTTP/1.0\n\n")[0] == 200
    assert ask(server[0], "GET /health HTTP/1.0\nHost: evil.example\n\n")[0] == 403


def test_head_is_get_without_the_body(server):
    address, _ = server
    for path in ("/", "/health"):
        got, head = httpx.get(address + path), httpx.head(address + path)
        assert head.status_code == 200 and head.content == b""
        assert head.headers["content-length"] == got.headers["content-length"] == str(len(got.content))
    headers = {"Authorization": "Bearer sesame"}
    assert httpx.head(f"{address}/v1/models", headers=headers).status_code == 200
    refused = httpx.head(f"{address}/v1/completions", headers=headers)
    assert refused.status_code == 405 and refused.headers["allow"] == "POST"


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "bearer "])
def test_the_scheme_of_a_key_has_no_case(server, scheme):
    assert httpx.get(f"{server[0]}/v1/models", headers={"Authorization": f"{scheme} sesame"}).status_code == 200
    for wrong in (f"{scheme} Sesame", scheme, f"{scheme} ", "sesame", "Basic sesame"):
        refused = httpx.get(f"{server[0]}/v1/models", headers={"Authorization": wrong.strip()})
        assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"


def test_names_of_models_may_hold_a_slash(server):
    headers = {"Authorization": "Bearer sesame"}
    for path in ("org/small", "org%2Fsmall"):
        assert httpx.get(f"{server[0]}/v1/models/{path}", headers=headers).json()["id"] == "org/small"
    body = {"model": "org/small", "prompt": "a", "max_tokens": 1}
    assert httpx.post(f"{server[0]}/v1/completions", headers=headers, json=body).json()["model"] == "org/small"
    for path in ("small", "org", "org/small/", ""):
        missing = httpx.get(f"{server[0]}/v1/models/{path}", headers=headers)
        assert missing.status_code == 404 and missing.json()["error"]["code"] == "model_not_found"


def test_hosts_of_this_machine_and_those_that_were_allowed_are_served(server):
    for host, status in (
        ("127.0.0.2:1", 200), ("127.255.0.1", 200), ("[::1]:8000", 200), ("[0:0:0:0:0:0:0:1]", 200), ("LOCALHOST", 200),
        ("app.localhost", 200), ("localhost.", 200), ("[::ffff:127.0.0.1]", 200), ("box.example:80", 200),
        ("Box.Example.", 200), ("box.example.evil", 403), ("128.0.0.1", 403), ("[::2]", 403), ("127.0.0.1.evil", 403),
        ("localhost.evil", 403),
    ):  # fmt: skip
        refused = httpx.get(f"{server[0]}/health", headers={"Host": host})
        assert refused.status_code == status, host
    assert "--allowed-host NAME" in httpx.get(f"{server[0]}/health", headers={"Host": "x"}).json()["error"]["message"]
    assert is_loopback("::1") and is_loopback("127.0.0.2") and not is_loopback("0.0.0.0")


def test_silent_connections_lock_nobody_out(server, monkeypatch):
    """More than the server has room for, from one address; then they are gone."""
    monkeypatch.setattr(protocol, "HURRIED_SECONDS", 0.3)
    monkeypatch.setattr(protocol, "_FEW", 5)
    address, _ = server
    with ExitStack() as stack:
        silent = [stack.enter_context(connect(address)) for _ in range(100)]
        assert httpx.get(f"{address}/health").status_code == 200
        headers = {"Authorization": "Bearer sesame"}
        assert httpx.get(f"{address}/v1/models", headers=headers).status_code == 200
        # The oldest made room at once, others had little time, and the few that any address may have stay.
        end = time.monotonic() + 10
        left = silent
        while len(left) > 5:
            assert time.monotonic() < end, f"{len(left)} are open"
            time.sleep(0.05)
            left = [connection for connection in left if not is_closed(connection)]


def is_closed(connection):
    connection.setblocking(False)
    try:
        return connection.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True


def test_headers_that_come_slowly_are_ended(server, monkeypatch):
    monkeypatch.setattr(protocol, "HEADER_SECONDS", 0.5)
    with connect(server[0]) as first, connect(server[0]) as later:
        later.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert later.recv(65536).startswith(b"HTTP/1.1 200")
        for connection in (first, later):
            connection.sendall(b"GET /health HTTP/1.1\r\n")
            # A byte now and then does not stop the clock.
            for _ in range(4):
                time.sleep(0.1)
                connection.sendall(b"X")
            status, _, body = answer(connection)
            assert status == 408 and "did not arrive within 0.5 seconds" in json.loads(body)["error"]["message"]


def test_one_address_cannot_keep_every_request_busy(server):
    address, engine = server
    body = json.dumps({"prompt": "The", "max_tokens": 50_000, "ignore_eos": True, "stream": True})
    request = (
        f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer sesame\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}"
    ).encode()
    probe = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer sesame\r\nConnection: close\r\n\r\n"
    with ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(connect(address)).sendall(request)
        end = time.monotonic() + 10
        status = 200
        while status == 200 and time.monotonic() < end:
            with connect(address) as connection:
                connection.sendall(probe)
                status, headers, refused = answer(connection)
        assert status == 503 and headers["retry-after"] == "1"
        assert json.loads(refused)["error"]["message"].startswith("4 requests of your address are being answered")
        assert httpx.get(f"{address}/health").status_code == 200
        with connect(address, source="127.0.0.2") as other:
            other.sendall(probe)
            assert answer(other)[0] == 200
    end = time.monotonic() + 10
    while engine.num_active:
        assert time.monotonic() < end, "the slots are not free"
        time.sleep(0.01)


@pytest.mark.slow
def test_a_client_that_does_not_read_is_ended(ready, monkeypatch):
    monkeypatch.setattr(protocol, "READ_SECONDS", 0.3)
    with running(ready, Settings(name="small"), prefill_tokens=4096, **LIMITS) as (address, engine):
        # Five MB at once, more than the system holds for a client.
        prompt = "The quick brown fox jumps over the lazy dog. " * 900
        body = json.dumps({"prompt": prompt, "echo": True, "n": 128, "max_tokens": 50_000, "stream": True})
        with connect(address, receive_bytes=4096) as connection:
            connection.sendall(
                f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
            )
            end = time.monotonic() + 60
            while not engine.num_active:
                time.sleep(0.01)
            while engine.num_active:
                assert time.monotonic() < end, "it is still served"
                time.sleep(0.05)
