"""The tests that others wrote for their servers and clients, run against this one: `python -m tests.serving.peer_suites`.

openai-python's tests of the resources that are served here, and the tests of llama.cpp's and vLLM's servers, come from
their source packages, pinned by hash, and are downloaded when this runs. Only fixtures (where the server is) and names of
models are adapted, so most failures ask for what is not served; the counts by class say how many. Exits with 3 where there
is no network or a package that those tests need, else with 0.

    pip install pytest-asyncio respx requests regex aiohttp inline-snapshot jsonschema pybase64
    python -m tests.serving.peer_suites [--keep FOLDER] [openai] [llama.cpp] [vllm]
"""

import argparse
import hashlib
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
import xml.etree.ElementTree as ET
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tnllm import assets

NEEDED = ("pytest_asyncio", "respx", "requests", "regex", "aiohttp", "inline_snapshot", "jsonschema", "pybase64")
MODEL = "tnllm-demo"
HERE = Path(__file__).parent


class Suite(NamedTuple):
    """A source package, what of it is unpacked, and which tests are run."""

    project: str
    file: str
    sha256: str
    folder: str  # of the tests, in the package
    run: tuple[str, ...]  # in that folder


SUITES = {
    "openai": Suite(
        "openai", "openai-3.57.0.tar.gz", "5a0a89d6a542efc85e2a8cec701ca9265b795d578c777828e10fafdf80e333b6",
        "openai-3.57.0/tests",
        ("tests/api_resources/test_completions.py", "tests/api_resources/test_models.py",
         "tests/api_resources/chat/test_completions.py"),
    ),
    "llama.cpp": Suite(
        "llama-cpp-python", "llama_cpp_python-0.3.36.tar.gz",
        "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e",
        "llama_cpp_python-0.3.36/vendor/llama.cpp/tools/server/tests",
        tuple(f"tests/unit/test_{name}.py" for name in (
            "basic", "chat_completion", "completion", "ctx_shift", "ignore_eos", "infill", "metrics", "security",
            "stream", "template", "tokenize")),
    ),
    "vllm": Suite(
        "vllm", "vllm-0.33.0.tar.gz", "f4c33c2503d52bb411146afa9618a4f48bed68912f617e6803ac8d76e4c74112",
        "vllm-0.33.0/tests",
        tuple(f"tests/entrypoints/{name}.py" for name in (
            "openai/chat_completion/test_chat", "openai/chat_completion/test_chat_completion",
            "openai/chat_completion/test_chat_echo", "openai/chat_completion/test_chat_logit_bias_validation",
            "openai/completion/test_completion", "openai/completion/test_prompt_validation",
            "openai/models/test_models", "openai/test_chunked_prompt", "openai/test_return_token_ids",
            "openai/test_stop_token_ids", "serve/instrumentator/test_basic", "serve/tokenize/test_tokenization")),
    ),
}  # fmt: skip

# Appended to the module in which llama.cpp's tests start their server.
_LLAMA = """

def _start(self, timeout_seconds=0):
    self.server_host, self.server_port = os.environ["PEER_HOST"], int(os.environ["PEER_PORT"])
    self.ready = True

ServerProcess.start, ServerProcess.stop = _start, lambda self: None
ServerPreset.load_all = staticmethod(lambda: None)
"""


class Unavailable(Exception):
    """What keeps the suites from running."""


def fetch(suite: Suite) -> bytes:
    """The source package, from the index that pip uses. Raises Unavailable."""
    asked = subprocess.run([sys.executable, "-m", "pip", "config", "get", "global.index-url"], capture_output=True)
    if asked.returncode == 0:
        index = asked.stdout.decode().strip()
    else:
        from pip._internal.models.index import PyPI

        index = PyPI.simple_url
    accept = {"Accept": "application/vnd.pypi.simple.v1+json"}
    try:
        request = urllib.request.Request(f"{index.rstrip('/')}/{suite.project}/", headers=accept)
        with urllib.request.urlopen(request, timeout=60) as answer:
            files = json.load(answer)["files"]
        [address] = [file["url"] for file in files if file["filename"] == suite.file]
        with urllib.request.urlopen(address, timeout=600) as answer:
            data = answer.read()
    except (OSError, urllib.error.URLError, ValueError, KeyError) as error:
        raise Unavailable(f"{suite.file} could not be downloaded: {error}") from None
    if hashlib.sha256(data).hexdigest() != suite.sha256:
        raise Unavailable(f"{suite.file} is not the file that was pinned")
    return data


def unpack(name: str, suite: Suite, folder: Path) -> None:
    """The tests as folder/tests, adapted."""
    with tarfile.open(fileobj=io.BytesIO(fetch(suite))) as archive:
        members = [member for member in archive if member.name.startswith(suite.folder + "/") and member.isfile()]
        archive.extractall(folder / "package", members, filter="data")
    shutil.move(folder / "package" / suite.folder, folder / "tests")
    for path in (folder / "tests").rglob("test_*.py"):
        text = path.read_text(encoding="utf-8")
        text = re.sub(r'(\bmodel"?(?:=|: ))"[^"]*"', rf'\1"{MODEL}"', text)
        text = re.sub(r'^(MODEL_NAME\w* = )"[^"]*"', rf'\1"{MODEL}"', text, flags=re.MULTILINE)
        path.write_text(text, encoding="utf-8")
    if name == "llama.cpp":
        utils = folder / "tests/utils.py"
        utils.write_text(utils.read_text(encoding="utf-8") + _LLAMA, encoding="utf-8")
    if name == "vllm":
        for conftest in (folder / "tests/conftest.py", folder / "tests/entrypoints/conftest.py"):
            conftest.unlink(missing_ok=True)
        (folder / "tests/utils.py").write_text("from peer_plugin import RemoteOpenAIServer, stub as __getattr__\n")
    shutil.copy(HERE / "peer_plugin.py", folder)


@contextmanager
def serving(folder: Path):
    """A server of the demo model, whose answers are short unless a test says how long; yields its host and port."""
    weights, log = folder / "weights", folder / "server.txt"
    shutil.copytree(assets.demo_weights(), weights)
    (weights / "generation_config.json").write_text(json.dumps({"max_new_tokens": 24}), encoding="utf-8")
    command = [sys.executable, "-m", "tnllm", "serve", "--model", str(weights), "--port", "0", "--name", MODEL]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stderr=file, stdout=file)
    try:
        found = None
        while found is None:
            if process.poll() is not None:
                raise Unavailable(f"the server did not start: {log.read_text()}")
            found = re.search(r"on http://([\d.]+):(\d+)", log.read_text())
        yield found.group(1), found.group(2)
    finally:
        process.terminate()
        process.wait()


def run(name: str, suite: Suite, folder: Path, host: str, port: str) -> Counter[str]:
    """Outcomes by class."""
    root = str(Path(__file__).parents[2])
    environment = os.environ | {
        "PEER_SUITE": name, "PEER_HOST": host, "PEER_PORT": port, "PEER_MODEL": MODEL, "OMP_NUM_THREADS": "1",
        "TEST_API_BASE_URL": f"http://{host}:{port}/v1",
        # Not this repository's own `tests`.
        "PYTHONPATH": os.pathsep.join([str(folder), str(folder / "tests")]),
    }  # fmt: skip
    assert root not in environment["PYTHONPATH"].split(os.pathsep)
    report = folder / "report.xml"
    options = ["-p", "peer_plugin", "-q", "--tb=native", f"--junitxml={report}", "-o", "addopts=",
               "-o", "asyncio_mode=auto", "-o", "xfail_strict=false", "-W", "ignore", "--rootdir", str(folder),
               "--continue-on-collection-errors", "-p", "no:cacheprovider"]  # fmt: skip
    with (folder / "output.txt").open("wb") as output:
        subprocess.run([sys.executable, "-m", "pytest", *options, *suite.run], cwd=folder, env=environment,
                       stdout=output, stderr=output, timeout=3600)  # fmt: skip
    return Counter(map(classify, ET.parse(report).iter("testcase")))


PASSED, SKIPPED, MISSING, OWN, OTHER = (
    "passed", "skipped by itself", "asks for what is not served, refused by name", "needs the peer's own code or model",
    "expects something else",
)  # fmt: skip
_REFUSALS = re.compile(
    r"not supported|no such route|is not allowed here|allowed: (system|text)|there is no model|error code: 40[45]"
    r"|assert 40[45] ==|== 40[45]|NotFoundError|501|this server has", re.IGNORECASE)  # fmt: skip
_OWN = re.compile(r"Mock|peer_plugin|No module named|fixture '|ImportError|FileNotFoundError|tokenizer", re.IGNORECASE)


def classify(case: ET.Element) -> str:
    """The class of a test's outcome, by the text of its failure."""
    failures = [child for child in case if child.tag in ("failure", "error")]
    if not failures:
        return SKIPPED if case.find("skipped") is not None else PASSED
    text = "".join(f"{child.get('message')}\n{child.text}" for child in failures)
    if _REFUSALS.search(text):
        return MISSING
    return OWN if _OWN.search(text) else OTHER


def main() -> int:
    """Run the suites and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("suites", nargs="*", choices=[[], *SUITES], default=[])
    parser.add_argument("--keep", type=Path, help="keep the tests and their output here")
    options = parser.parse_args()
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(f"these tests need {', '.join(missing)}; run: pip install {' '.join(missing).replace('_', '-')}",
              file=sys.stderr)  # fmt: skip
        return 3
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.keep or Path(temporary)).resolve()
        try:
            for name in options.suites or SUITES:
                (folder / name).mkdir(parents=True)
                unpack(name, SUITES[name], folder / name)
            print(f"| suite | {' | '.join((PASSED, MISSING, OWN, OTHER, SKIPPED))} |")
            for name in options.suites or SUITES:
                with serving(folder / name) as (host, port):
                    counts = run(name, SUITES[name], folder / name, host, port)
                row = " | ".join(str(counts[kind]) for kind in (PASSED, MISSING, OWN, OTHER, SKIPPED))
                print(f"| {SUITES[name].file.removesuffix('.tar.gz')} | {row} |", flush=True)
        except Unavailable as error:
            print(error, file=sys.stderr)
            return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
