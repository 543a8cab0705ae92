"""A web server of files that fails as asked.

with serving({"a.jsonl": b"..."}) as server:
    server.url                      # "http://127.0.0.1:PORT/", a page of links
    server.faults += [500, "cut"]   # what the next requests of files get
"""

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class _Handler(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def answer(self, with_body):
        server, name = self.server, self.path.removeprefix("/moved").lstrip("/")
        if name and name not in server.files:
            self.send_error(404)
            return
        # A transfer can only be cut where there is one.
        fault = server.faults[0] if name and server.faults else None
        if fault == "cut" and not with_body:
            fault = None
        elif fault is not None:
            server.faults.pop(0)
            server.failed.append(fault)
        if fault == "drop":
            self.close_connection = True
            return
        if isinstance(fault, int):
            self.send_error(fault)
            return
        if fault == "redirect":
            self.send_response(302)
            self.send_header("Location", f"/moved/{name}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        links = "".join(f'<a href="{name}">{name}</a>' for name in server.files)
        data = server.files[name] if name else links.encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        if server.etags:
            self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()[:12]}"')
        if server.dates:
            self.send_header("Last-Modified", formatdate(server.dates, usegmt=True))
        self.end_headers()
        if with_body and fault == "cut":
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
        elif with_body:
            server.requests.append(self.path)
            self.wfile.write(data)

    def log_message(self, *_):
        pass


@contextmanager
def serving(files: dict[str, bytes]) -> Iterator[ThreadingHTTPServer]:
    """`faults`: statuses, "cut" (in the middle), "drop" (no answer), "redirect"; `failed`: those given.

    The server knows no ranges; it gives ETags unless `etags` is False, and the date `dates` if it is set.
    """
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        server.files, server.etags, server.dates = dict(files), True, 0
        server.faults, server.failed, server.requests = [], [], []
        server.url = f"http://127.0.0.1:{server.server_port}/"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
