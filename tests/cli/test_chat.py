"""`tnllm generate --chat`: the prompt, Ctrl-C, messages of several lines, and talks saved by name."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tnllm.generation.context import read, read_metadata, save_context, weights_hash
from tnllm.generation.loading import load

OPTIONS = "--chat", "--max-tokens", "8", "--seed", "1", "--device", "cpu"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Talks and history of these tests are theirs."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path


@pytest.fixture
def typed(run_generate, monkeypatch):
    """Run a chat on a terminal where a person types `lines`; an exception among them happens at the prompt."""

    def outcome(*lines, options=()):
        left = iter(lines)

        def line(prompt=""):
            item = next(left, EOFError)
            if isinstance(item, str):
                return item
            raise item

        monkeypatch.setattr("builtins.input", line)
        return run_generate(*OPTIONS, *options, terminal=True)

    return outcome


def test_ctrl_c_clears_the_line_and_the_second_one_leaves_with_the_state(typed, tmp_path):
    state = tmp_path / "s"
    save = "--state-out", state
    code, out, err = typed(
        "Hello", KeyboardInterrupt, "Again", KeyboardInterrupt, KeyboardInterrupt, "no", options=save
    )
    assert code == 130
    assert out == typed("Hello", "Again")[1], "a cleared line changes nothing"
    assert err.count("Ctrl-C again ends the chat") == 2
    assert f"saved to {state}" in err
    assert err.endswith("tnllm: stopped by Ctrl-C\n")
    finished = tmp_path / "t"
    typed("Hello", "Again", "/exit", options=("--state-out", finished))
    assert read_metadata(state) == read_metadata(finished), "with the digest of its tensors"


def test_ctrl_c_in_a_block_of_lines_drops_the_block(typed):
    out = typed("Hello", '"""one', KeyboardInterrupt, "Again")[1]
    assert out == typed("Hello", "Again")[1]


def test_a_message_of_several_lines(run_generate):
    stdin = '"""one\n\n  two"""\n/reset\n"""\none\n\n  two\n"""\n'
    first, second = run_generate(*OPTIONS, stdin=stdin.encode())[1].splitlines()[:2]
    alone = run_generate("--prompt", "Human:\none\n\n  two\nAssistant:\n", *OPTIONS[1:], "--stop", r"\nHuman:")[1]
    assert first == second == alone.removesuffix("\n")
    assert "is not a command" not in run_generate(*OPTIONS, stdin=b'"""/never"""\n')[2]
    assert run_generate(*OPTIONS, stdin=b'"""one\n\n  two')[1] == alone, "the end of stdin ends the block"


def test_a_talk_is_saved_and_continued_by_name(run_generate, home):
    code, out, err = run_generate(*OPTIONS, stdin="Hello\n/save 假期-1\nAgain\n".encode())
    assert code == 0
    assert (home / "data/tnllm/chats/假期-1.state").is_file()
    code, later, err = run_generate(*OPTIONS, stdin="Other\n/load 假期-1\nAgain\n".encode())
    assert code == 0
    assert later.splitlines()[-1] == out.splitlines()[-1], "it goes on where it was saved"
    first = out.splitlines()[0]
    assert f"loaded 假期-1: 1 turns, the last one is\nuser: Hello\nassistant: {first}" in err
    assert oct((home / "data/tnllm/chats").stat().st_mode)[-3:] == "700"


def test_messages_are_kept_with_a_talk_over_several_loads(run_generate, home):
    run_generate(*OPTIONS, stdin=b"One\n/save a\n")
    run_generate(*OPTIONS, stdin=b"/load a\nTwo\n/save a\n")
    messages = json.loads(read_metadata(home / "data/tnllm/chats/a.state")["messages"])
    assert [text for role, text in messages if role == "user"] == ["One", "Two"]
    assert [role for role, _ in messages] == ["user", "assistant"] * 2


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["/save a"], "there is nothing to save yet"),
        (["Hello", "/save ../a"], "a talk's name is letters, digits, - and _, at most 60, not '../a'"),
        (["Hello", "/save"], "at most 60, not ''"),
        (["Hello", f"/save {'日' * 61}"], "at most 60, not"),
        (["/load other"], "there is no talk named other; none is saved yet"),
        (["Hello", "/save holidays", "/load holiday"], "there are holidays; did you mean 'holidays'?"),
        (["a\udcff"], "stdin holds bytes that are not UTF-8 (character 1)"),
    ],
)
def test_a_mistake_costs_one_line_on_a_terminal(typed, lines, message):
    code, out, err = typed(*lines, "Still here")
    assert code == 0
    assert f"tnllm: {message}" in err or message in err
    assert out.splitlines()[-1].strip()


@pytest.mark.parametrize("messages", ["5", "{}", "[[1, 2]]", '[["user"]]', '[["evil", "x"]]', '["ab"]'])
def test_the_messages_of_a_talk_are_checked(typed, home, small_weights, messages):
    file = home / "data/tnllm/chats/a.state"
    file.parent.mkdir(parents=True)
    loaded = load(small_weights, "cpu")
    [context] = read(loaded.model, [loaded.encode("Hello")])
    save_context(file, context, weights_hash(loaded.model), messages=messages)
    code, out, err = typed("/load a", "Still here")
    assert code == 0 and "a.state is damaged: its messages cannot be read; remove it" in err
    assert out.splitlines()[-1].strip()


def test_files_that_cannot_be_read_or_written_cost_one_line(typed, home, monkeypatch):
    chats = home / "data/tnllm/chats"
    chats.mkdir(parents=True)
    (chats / "bad.state").write_bytes(b"PK\3\4")
    code, out, err = typed("Hello", "/load bad", "Still here")
    assert code == 0 and "bad.state is damaged or not a state file" in err
    assert out == typed("Hello", "Still here")[1]
    (home / "file").touch()
    monkeypatch.setenv("XDG_DATA_HOME", str(home / "file"))
    code, out, err = typed("Hello", "/save a", "Still here")
    assert code == 0 and "tnllm: /save: Not a directory: " in err
    assert out == typed("Hello", "Still here")[1]


def test_a_mistake_ends_a_script(run_generate):
    code, out, err = run_generate(*OPTIONS, stdin=b"Hello\n/load other\nnever\n")
    assert code == 2
    assert err.endswith("tnllm: there is no talk named other; none is saved yet\n")
    assert len(out.splitlines()) == 1


def test_another_talk_is_not_replaced(typed):
    assert typed("Hello", "/save a", "More", "/save a")[0] == 0
    assert "there is a talk named a already; choose another name" in typed("New", "/save a")[2]


def test_a_talk_of_another_model_is_refused(typed):
    typed("Hello", "/save a")
    err = typed("/load a", options=("--dtype", "bfloat16"))[2]
    assert "a.state was written with other weights" in err


@pytest.mark.slow
def test_on_a_real_terminal(small_weights, home):
    """Line editing, history and Ctrl-C as a terminal gives them."""
    leader, follower = pty.openpty()
    state = home / "s"
    command = [sys.executable, "-m", "tnllm", "generate", "--model", str(small_weights), *OPTIONS]
    chat = subprocess.Popen(
        [*command, "--state-out", str(state)], stdin=follower, stdout=follower, stderr=subprocess.PIPE,
        start_new_session=True, preexec_fn=_take_terminal,
    )  # fmt: skip
    os.close(follower)
    assert chat.stderr is not None
    _until(leader, b"> ")
    # Ctrl-A goes to the start of the line, Ctrl-K deletes to its end: with line editing "Hello" is what is sent.
    os.write(leader, b"typo\x01\x0bHello\n")
    _until(leader, b"\n> ")
    for typed in (b"thrown away", b"x"):
        os.write(leader, typed)
        _until(leader, typed)
        _until_asleep(chat.pid)
        os.write(leader, b"\x03")
        if typed != b"x":
            _until(leader, b"> ")
    assert chat.wait(timeout=60) == 130
    err = chat.stderr.read().decode()
    assert "Ctrl-C again ends the chat" in err
    assert f"saved to {state}" in err
    assert state.is_file()
    assert (home / "state/tnllm/chat_history").read_text().splitlines()[-1] == "Hello"
    assert oct((home / "state/tnllm/chat_history").stat().st_mode)[-3:] == "600"
    os.close(leader)


def _take_terminal():
    """Make the pseudo-terminal on stdin the controlling one, so that Ctrl-C typed there is a signal."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _until(descriptor, end, timeout_s=60.0):
    """What the terminal shows up to `end`."""
    shown, limit = b"", time.monotonic() + timeout_s
    while not shown.endswith(end):
        assert time.monotonic() < limit, shown
        if select.select([descriptor], [], [], 0.2)[0]:
            shown += os.read(descriptor, 4096)
    return shown


def _until_asleep(pid, timeout_s=60.0):
    """Wait until readline waits for a key: a signal between its echo and that wait is only seen at the next key."""
    limit = time.monotonic() + timeout_s
    while psutil.Process(pid).status() != psutil.STATUS_SLEEPING:
        assert time.monotonic() < limit
        time.sleep(0.01)
