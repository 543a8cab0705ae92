"""Connections at the level of bytes: silent ones are in nobody's way, and what HTTP itself refuses has the error form."""

import json
import select
import socket
from contextlib import ExitStack, suppress

import httpx
import pytest

from tests.serving.serving import running, wait_for
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
    connection.settimeout(300)
    connection.bind((source, 0))
    connection.connect((host, int(port)))
    return connection


def answer(connection):
    """(status, headers, body) of what comes until the connection is closed."""
    data = b""
    # What was sent to a closed connection resets it, after the answer.
    with suppress(ConnectionError):
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
        failed = httpx.get(f"{address}/health", timeout=300)
        assert failed.status_code == 500 and failed.json()["error"]["type"] == "server_error"


def test_old_clients_need_no_host(server):
    assert ask(server[0], "GET /health HTTP/1.0\n\n")[0] == 200
    assert ask(server[0], "GET /health HTTP/1.0\nHost: evil.example\n\n")[0] == 403


def test_head_is_get_without_the_body(server):
    address, _ = server
    for path in ("/", "/health"):
        got, head = httpx.get(address + path, timeout=300), httpx.head(address + path, timeout=300)
        assert head.status_code == 200 and head.content == b""
        assert head.headers["content-length"] == got.headers["content-length"] == str(len(got.content))
    headers = {"Authorization": "Bearer sesame"}
    assert httpx.head(f"{address}/v1/models", headers=headers, timeout=300).status_code == 200
    refused = httpx.head(f"{address}/v1/completions", headers=headers, timeout=300)
    assert refused.status_code == 405 and refused.headers["allow"] == "POST"


@pytest.mark.parametrize("method", ["OPTIONS", "POST", "DELETE", "TRACE"])
def test_a_refused_method_is_told_all_that_are_allowed(server, method):
    headers = {"Authorization": "Bearer sesame"}
    for path in ("/", "/health", "/metrics", "/openapi.json", "/v1/models", "/v1/models/org/small"):
        refused = httpx.request(method, server[0] + path, headers=headers, timeout=300)
        assert refused.status_code == 405 and refused.json()["error"]["message"].startswith(f"{method} is not allowed")
        allowed = refused.headers["allow"].split(", ")
        assert sorted(allowed) == ["GET", "HEAD"]
        for other in allowed:
            assert httpx.request(other, server[0] + path, headers=headers, timeout=300).status_code == 200


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "bearer "])
def test_the_scheme_of_a_key_has_no_case(server, scheme):
    assert (
        httpx.get(f"{server[0]}/v1/models", headers={"Authorization": f"{scheme} sesame"}, timeout=300).status_code
        == 200
    )
    for wrong in (f"{scheme} Sesame", scheme, f"{scheme} ", "sesame", "Basic sesame"):
        refused = httpx.get(f"{server[0]}/v1/models", headers={"Authorization": wrong.strip()}, timeout=300)
        assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"


def test_names_of_models_may_hold_a_slash(server):
    headers = {"Authorization": "Bearer sesame"}
    for path in ("org/small", "org%2Fsmall"):
        assert httpx.get(f"{server[0]}/v1/models/{path}", headers=headers, timeout=300).json()["id"] == "org/small"
    body = {"model": "org/small", "prompt": "a", "max_tokens": 1}
    assert (
        httpx.post(f"{server[0]}/v1/completions", headers=headers, json=body, timeout=300).json()["model"]
        == "org/small"
    )
    for path in ("small", "org", "org/small/", ""):
        missing = httpx.get(f"{server[0]}/v1/models/{path}", headers=headers, timeout=300)
        assert missing.status_code == 404 and missing.json()["error"]["code"] == "model_not_found"


def test_hosts_of_this_machine_and_those_that_were_allowed_are_served(server):
    for host, status in (
        ("127.0.0.2:1", 200), ("127.255.0.1", 200), ("[::1]:8000", 200), ("[0:0:0:0:0:0:0:1]", 200), ("LOCALHOST", 200),
        ("app.localhost", 200), ("localhost.", 200), ("[::ffff:127.0.0.1]", 200), ("box.example:80", 200),
        ("Box.Example.", 200), ("box.example.evil", 403), ("128.0.0.1", 403), ("[::2]", 403), ("127.0.0.1.evil", 403),
        ("localhost.evil", 403),
    ):  # fmt: skip
        refused = httpx.get(f"{server[0]}/health", headers={"Host": host}, timeout=300)
        assert refused.status_code == status, host
    assert (
        "--allowed-host NAME"
        in httpx.get(f"{server[0]}/health", headers={"Host": "x"}, timeout=300).json()["error"]["message"]
    )
    assert is_loopback("::1") and is_loopback("127.0.0.2") and not is_loopback("0.0.0.0")


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("ahead", [b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n", b"what", b"x" * 1_000_000])
def test_a_client_that_sends_more_while_it_waits_is_noticed_when_it_leaves(server, stream, ahead):
    """A later request, or what is none: the server goes on reading. Of a lot it takes that the client has no interest."""
    address, engine = server
    wait_for(lambda: not engine.num_active)
    with connect(address) as connection:
        body = {"prompt": "The", "max_tokens": 50_000, "ignore_eos": True, "stream": stream}
        connection.sendall(request("/v1/completions", body))
        wait_for(lambda: engine.num_active)
        try:
            connection.sendall(ahead)
        except ConnectionError:
            assert len(ahead) > protocol.MOST_AHEAD
        if len(ahead) <= protocol.MOST_AHEAD:
            assert engine.num_active, "it is still served"
    wait_for(lambda: not engine.num_active)


def test_requests_may_be_sent_ahead_of_answers(server):
    address, _ = server
    texts = []
    with connect(address) as connection:
        bodies = [{"prompt": "The", "max_tokens": number, "ignore_eos": True, "seed": 1} for number in (4, 3, 2)]
        connection.sendall(b"".join(request("/v1/completions", body) for body in bodies) + request("/health", None))
        data = b""
        while data.count(b"HTTP/1.1 200") < 4 or not data.endswith(b"}"):
            data += connection.recv(65536)
    for part in data.split(b"HTTP/1.1 200")[1:4]:
        texts.append(json.loads(part.partition(b"\r\n\r\n")[2])["usage"]["completion_tokens"])
    assert texts == [4, 3, 2] and data.endswith(b'"}')


def request(path, body):
    head = "Host: localhost\r\nAuthorization: Bearer sesame\r\n"
    if body is None:
        return f"GET {path} HTTP/1.1\r\n{head}\r\n".encode()
    content = json.dumps(body)
    head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n"
    return f"POST {path} HTTP/1.1\r\n{head}\r\n{content}".encode()


def test_the_target_may_be_a_complete_address(server):
    """As a client writes it that takes the server for a proxy; its host is the one that counts."""
    address, _ = server
    get = "GET {} HTTP/1.1\nHost: {}\nAuthorization: Bearer sesame\nConnection: close\n\n"
    for target in ("http://localhost/health", "HTTP://127.0.0.1:80/v1/models?x=1", "http://localhost"):
        assert ask(address, get.format(target, "evil.example"))[0] == 200
    assert ask(address, get.format("http://evil.example/health", "localhost"))[0] == 403
    assert ask(address, "GET http://localhost/v1/models HTTP/1.1\nHost: localhost\nConnection: close\n\n")[0] == 401
    assert ask(address, get.format("http://localhost/no", "localhost"))[0] == 404


@pytest.mark.parametrize(
    ("headers", "content", "status", "message"),
    [
        ({"Content-Encoding": "gzip"}, b"\x1f\x8b", 415, "Content-Encoding is 'gzip'; send the body as it is"),
        ({"Content-Encoding": "br, gzip"}, b"x", 415, "Content-Encoding is 'br, gzip'"),
        ({"Content-Encoding": "Identity"}, b'{"prompt": "a", "max_tokens": 1}', 200, ""),
        ({"Content-Type": "text/json"}, b"{}", 415, "the body must be JSON"),
        ({}, b'\xef\xbb\xbf{"prompt": "a", "max_tokens": 1}', 200, ""),
        ({}, '{"prompt": "a"}'.encode("utf-16"), 400, "the body is UTF-16 or UTF-32; send it in UTF-8"),
        ({}, '{"prompt": "a"}'.encode("utf-16-be"), 400, "the body is UTF-16 or UTF-32"),
        ({}, '{"prompt": "a"}'.encode("utf-32-le"), 400, "the body is UTF-16 or UTF-32"),
        ({}, b"", 400, "the body is not valid JSON"),
    ],
)
def test_encodings_of_bodies(server, headers, content, status, message):
    headers = {"Authorization": "Bearer sesame", "Content-Type": "application/json", **headers}
    got = httpx.post(f"{server[0]}/v1/completions", content=content, headers=headers, timeout=300)
    assert got.status_code == status and message in got.json().get("error", {"message": ""})["message"]


def test_silent_connections_lock_nobody_out(server, monkeypatch):
    """More than the server has room for, from one address; then they are gone."""
    monkeypatch.setattr(protocol, "HURRIED_SECONDS", 0.3)
    monkeypatch.setattr(protocol, "_FEW", 5)
    address, _ = server
    with ExitStack() as stack:
        silent = [stack.enter_context(connect(address)) for _ in range(100)]
        assert httpx.get(f"{address}/health", timeout=300).status_code == 200
        headers = {"Authorization": "Bearer sesame"}
        assert httpx.get(f"{address}/v1/models", headers=headers, timeout=300).status_code == 200
        # The oldest made room at once, others had little time, and the few that any address may have stay.
        closed = set()
        wait_for(lambda: closed.update(filter(is_closed, silent)) or len(closed) >= 95)


def is_closed(connection):
    connection.setblocking(False)
    try:
        return connection.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True


@pytest.mark.parametrize("is_first", [True, False])
def test_headers_that_come_slowly_are_ended(server, monkeypatch, is_first):
    monkeypatch.setattr(protocol, "HEADER_SECONDS", 0.5)
    with connect(server[0]) as connection:
        if not is_first:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        connection.sendall(b"GET /health HTTP/1.1\r\n")

        def is_answered():
            # A byte now and then does not stop the clock.
            with suppress(ConnectionError):
                connection.sendall(b"X")
            return select.select([connection], [], [], 0)[0]

        wait_for(is_answered)
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
        wait_for(lambda: engine.num_active == 4)
        with connect(address) as connection:
            connection.sendall(probe)
            status, headers, refused = answer(connection)
        assert status == 503 and headers["retry-after"] == "1"
        assert json.loads(refused)["error"]["message"].startswith("4 requests of your address are being answered")
        assert httpx.get(f"{address}/health", timeout=300).status_code == 200
        with connect(address, source="127.0.0.2") as other:
            other.sendall(probe)
            assert answer(other)[0] == 200
    wait_for(lambda: not engine.num_active)


@pytest.mark.slow
def test_a_client_that_does_not_read_is_ended(ready, monkeypatch):
    monkeypatch.setattr(protocol, "READ_SECONDS", 0.3)
    with running(ready, Settings(name="small"), prefill_tokens=4096, **LIMITS) as (address, engine):
        # More MB at once than the system holds for a client.
        prompt = "The quick brown fox jumps over the lazy dog. " * 300
        body = {"prompt": prompt, "echo": True, "logprobs": 0, "n": 16, "max_tokens": 50_000, "stream": True}
        body = json.dumps(body | {"ignore_eos": True})
        with connect(address, receive_bytes=4096) as connection:
            connection.sendall(
                f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
            )
            wait_for(lambda: engine.num_active)
            wait_for(lambda: not engine.num_active)
