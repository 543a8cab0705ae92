"""What stdin, stdout and stderr may be: other encodings, closed, or a pipe whose reader has gone."""

import io
import json
import os
import subprocess
import sys

import pytest

TEXT = "今天 Ω café 👋"


def in_shell(command):
    """Run a bash command line in which $TNLLM is the command; returns the process."""
    line = command.replace("$TNLLM", f"{sys.executable} -m tnllm")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(["bash", "-c", line], env=environment, capture_output=True, check=False)


# Text that we print, help by rich, and text as it is generated.
@pytest.mark.slow
@pytest.mark.parametrize("command", ["recipes show tiny --doc", "--help", "generate --prompt Once --seed 1"])
def test_a_reader_may_leave(command):
    done = in_shell(f"$TNLLM {command} | head -c 1 > /dev/null; exit ${{PIPESTATUS[0]}}")
    assert (done.returncode, b"Traceback" in done.stderr, b"roken" in done.stderr) == (0, False, False)


@pytest.mark.slow
def test_a_reader_of_both_streams_may_leave():
    assert in_shell("$TNLLM recipes show tiny --doc 2>&1 | head -c 1; exit ${PIPESTATUS[0]}").returncode == 0


@pytest.mark.slow
def test_a_full_disk_is_an_error():
    done = in_shell("$TNLLM recipes show tiny > /dev/full")
    assert (done.returncode, done.stderr) == (1, b"tnllm: No space left on device; free some space and run it again\n")


@pytest.mark.slow
def test_streams_may_be_closed():
    done = in_shell("$TNLLM recipes show tiny <&- >&-")
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.fixture
def printed(run_generate, monkeypatch):
    """What `tnllm generate` writes to a stdout of some encoding."""

    def run(encoding, *args):
        stdout = io.BytesIO()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", io.TextIOWrapper(stdout, encoding=encoding))
            code, _, err = run_generate("--prompt", TEXT, "--echo", "--max-tokens", 2, "--seed", 1, *args)
            assert (code, "Traceback" in err) == (0, False)
            return stdout.getvalue().decode(encoding)

    return run


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "gbk"])
def test_text_gets_a_replacement_for_what_stdout_cannot_hold(printed, encoding):
    shown = TEXT.encode(encoding, "replace").decode(encoding)
    assert printed(encoding).startswith(shown)
    assert printed(encoding, "--no-stream").startswith(shown)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "gbk"])
def test_json_stays_the_same_value(printed, encoding):
    assert json.loads(printed(encoding, "--json")) == json.loads(printed("utf-8", "--json"))
