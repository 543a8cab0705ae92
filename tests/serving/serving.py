"""A server on a port of its own, in this process, for tests that need real connections."""

import threading
import time
from contextlib import contextmanager

import uvicorn

from tnllm.serving.app import make_app
from tnllm.serving.engine import Engine
from tnllm.serving.protocol import server_config


def wait_for(condition, seconds=300):
    """Until it holds; the limit is there so that a fault ends the test, and no machine is as slow."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


@contextmanager
def served(engine, settings, max_requests=800, max_requests_per_address=600, **more):
    """Yield the address of a server of an engine that runs; `more` of `make_app`."""
    app = make_app(engine, settings, **more)
    server = uvicorn.Server(server_config(app, max_requests, max_requests_per_address, port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_for(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def running(ready, settings, max_requests=800, max_requests_per_address=600, **engine_options):
    """Yield (address, engine)."""
    with (
        Engine(ready, **engine_options) as engine,
        served(engine, settings, max_requests, max_requests_per_address) as address,
    ):
        yield address, engine
