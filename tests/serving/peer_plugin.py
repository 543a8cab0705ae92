"""What other servers' tests import of their own package, where there is none of it: a pytest plugin of `peer_suites`.

It is copied beside those tests, since their package of tests has the same name as ours.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import types
from unittest.mock import MagicMock

_STUBS = {"vllm": ("vllm",), "llama.cpp": ("wget",)}.get(os.environ.get("PEER_SUITE", ""), ())


def stub(name):
    """Whatever is asked of a package that is not installed."""
    if name.startswith(("__", "pytest")):
        raise AttributeError(name)
    return MagicMock(name=name)


class _Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Any module of a package that is not installed, and anything in it."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in _STUBS:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__path__ = []
        module.__getattr__ = stub
        return module

    def exec_module(self, module):
        pass


if _STUBS:
    sys.meta_path.insert(0, _Stubs())


class RemoteOpenAIServer:
    """The server that runs, in place of one that a test starts."""

    DUMMY_API_KEY = "none"

    def __init__(self, model, arguments=(), **options):
        self.host, self.port = os.environ["PEER_HOST"], int(os.environ["PEER_PORT"])

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    @property
    def url_root(self):
        return f"http://{self.host}:{self.port}"

    def url_for(self, *parts):
        return "/".join([self.url_root, *parts])

    def get_client(self, **options):
        import openai

        options = {"api_key": self.DUMMY_API_KEY, "max_retries": 0, "base_url": self.url_for("v1"), **options}
        return openai.OpenAI(**options)

    def get_async_client(self, **options):
        import openai

        options = {"api_key": self.DUMMY_API_KEY, "max_retries": 0, "base_url": self.url_for("v1"), **options}
        return openai.AsyncOpenAI(**options)
