"""What a person sees of `tnllm generate`: text on stdout, one line per fault on stderr, and the exit code."""

import json
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from tnllm.cli.main import main
from tnllm.modeling.cpu_step import CpuStep


@pytest.fixture
def weights(small_weights):
    return small_weights


@pytest.fixture
def run(run_generate):
    return run_generate


def fails(outcome, *parts, code=2):
    """The run failed with `code`, no output and exactly one line that holds `parts`."""
    assert outcome[0] == code
    assert outcome[1] == ""
    assert len(outcome[2].splitlines()) == 1
    for part in parts:
        assert part in outcome[2]


def test_text_on_stdout_speed_on_stderr(run):
    code, out, err = run("--prompt", "The fox", "--max-tokens", 20, "--seed", 1)
    assert code == 0
    assert len(out) > 5
    assert out.endswith("\n")
    assert "20 tokens at " in err
    for part in "tokens/s, first after ", "; prompt 2 tokens", "; ended by length", "; seed 1":
        assert part in err
    again = run("--prompt", "The fox", "--max_tokens", 20, "--seed=1", "--no-stream")
    assert again[1] == out, "snake_case, and whole instead of streamed"
    assert run("--prompt", "The fox", "--max-tokens", 20, "--seed", 2)[1] != out


@pytest.mark.parametrize("way", ["--prompt", "--chat", "--input"])
def test_prompt_lookup_changes_no_text(run, tmp_path, way):
    """A text that only repeats itself, so that there are proposals: the small model does where the end token is ignored."""
    (tmp_path / "in.jsonl").write_text(json.dumps({"prompt": "fox fox " * 12}), encoding="utf-8")
    given = {
        "--prompt": ["--prompt", "fox fox " * 12],
        "--chat": ["--chat"],
        "--input": ["--input", tmp_path / "in.jsonl"],
    }
    options = [*given[way], "--max-tokens", 120, "--temperature", 0, "--seed", 1, "--ignore-eos", "--batch-size", 1]
    stdin = b"fox\nfox\n" if way == "--chat" else None
    plain = run(*options, stdin=stdin)
    looked = run(*options, "--prompt-lookup", 16, stdin=stdin)
    assert plain[0] == looked[0] == 0 and looked[1] == plain[1] != ""


def test_prompt_lookup_is_refused_where_it_gains_nothing(run):
    fails(run("--prompt", "x", "--prompt-lookup", 65), "prompt_lookup is 65; allowed: a whole number, 0 to 64")
    fails(
        run("--prompt", "x", "--prompt-lookup", 8, "--dtype", "int8"), "prompt_lookup gains nothing with int8 weights"
    )


def test_an_unseeded_run_names_its_seed(run):
    code, out, err = run("-p", "The", "--max-tokens", 15)
    assert code == 0
    seed = err.split("seed ")[1].split()[0]
    assert run("-p", "The", "--max-tokens", 15, "--seed", seed)[1] == out


def test_file_and_stdin_are_prompts(run, tmp_path):
    (tmp_path / "prompt.txt").write_text("今天天气\n", encoding="utf-8")
    options = "--max-tokens", 10, "--seed", 1, "--echo"
    wanted = run("--prompt", "今天天气", *options)[1]
    assert wanted.startswith("今天天气")
    assert run("--prompt-file", tmp_path / "prompt.txt", *options)[1] == wanted
    assert run("--prompt-file", "-", *options, stdin="今天天气".encode())[1] == wanted
    assert run("--prompt", "-", *options, stdin="今天天气\n".encode())[1] == wanted


def test_a_terminal_gets_no_control_characters(capsys, monkeypatch):
    from tnllm.cli.streaming import show

    show("a\x1b[2Jb\tc\nd\x0e")
    assert capsys.readouterr().out == "a\x1b[2Jb\tc\nd\x0e"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    show("a\x1b[2Jb\tc\nd\x0e今\r")
    assert capsys.readouterr().out == "a\ufffd[2Jb\tc\nd\ufffd今\ufffd"


def test_json(run):
    options = "--prompt", "The", "--max-tokens", 6, "--seed", 5
    code, out, _ = run(*options, "--json", "--logprobs", 2, "--n", 2)
    assert code == 0
    first, second = map(json.loads, out.splitlines())
    assert (first["sample"], first["seed"], second["sample"], second["seed"]) == (0, 5, 1, 6)
    assert first["usage"] == {"prompt_tokens": 1, "completion_tokens": 6, "total_tokens": 7}
    assert first["finish_reason"] == "length"
    assert [entry["id"] for entry in first["logprobs"]] == first["tokens"]
    assert all(len(entry["top"]) == 2 and entry["logprob"] <= entry["top"][0]["logprob"] for entry in first["logprobs"])
    assert first["text"] + "\n" == run(*options)[1]
    echoed = json.loads(run(*options, "--json", "--echo")[1])
    assert echoed["text"] == "The" + first["text"]
    assert echoed["logprobs"] is None


def test_several_samples_as_text(run):
    code, out, err = run("-p", "The", "--max-tokens", 5, "--seed", 5, "--n", 2)
    assert code == 0
    assert "sample 1 of 2, seed 5:\nsample 2 of 2, seed 6:\n" in err
    assert out == "".join(run("-p", "The", "--max-tokens", 5, "--seed", seed)[1] for seed in (5, 6))


def test_stop_strings(run):
    options = "--prompt", "The", "--max-tokens", 30, "--seed", 1
    free = run(*options)[1]
    code, out, err = run(*options, "--stop", free[4:6], "--stop", "unseen")
    assert (code, out) == (0, free[: free.index(free[4:6])] + "\n")
    assert "ended by stop" in err
    line = run("--prompt", "The", "--max-tokens", 400, "--seed", 1, "--ignore-eos", "--stop", r"\n")[1]
    assert line.count("\n") == 1


def test_a_batch_comes_back_in_order(run, tmp_path):
    lines = [
        {"prompt": "The fox", "id": "a", "max_tokens": 20},
        {"prompt": "今天", "id": {"b": 2}, "temperature": 0, "max_tokens": 3},
        {"prompt": "", "seed": 9, "n": 2, "max_tokens": 8},
        {"prompt": "The dog", "max_tokens": 5, "logprobs": 1, "stop": ["x"]},
    ]
    text = "\n".join(json.dumps(line) for line in lines) + "\n\n"
    (tmp_path / "in.jsonl").write_text(text, encoding="utf-8")
    output = tmp_path / "out.jsonl"
    options = "--seed", 3, "--batch-size", 3
    code, out, err = run("--input", tmp_path / "in.jsonl", "--output", output, *options)
    assert (code, out) == (0, "")
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [(row["index"], row["sample"], row["seed"]) for row in rows] == [
        (0, 0, 3), (1, 0, 3), (2, 0, 9), (2, 1, 10), (3, 0, 3),
    ]  # fmt: skip
    assert [row.get("id") for row in rows] == ["a", {"b": 2}, None, None, None]
    assert rows[1]["usage"]["completion_tokens"] == 3
    alone = run("--prompt", "The fox", "--max-tokens", 20, "--seed", 3)[1]
    assert rows[0]["text"] + "\n" == alone
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == ["out.jsonl"]
    assert "tokens/s" in err
    piped = run("--input", "-", *options, "--echo", stdin=text.encode())
    assert json.loads(piped[1].splitlines()[0])["text"] == "The fox" + rows[0]["text"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "in.jsonl:3: not JSON (Expecting property name enclosed in double quotes at column 2)"),
        (b'"The"', 'in.jsonl:3: each line is a JSON object with a string "prompt"'),
        (b'{"prompt": 3}', 'in.jsonl:3: each line is a JSON object with a string "prompt"'),
        (b'{"prompt": "a", "temprature": 1}', "in.jsonl:3: 'temprature' is not a sampling option"),
        (b'{"prompt": "a", "top_p": 2}', "in.jsonl:3: top_p is 2; allowed: a number, above 0, up to 1"),
        (b'{"prompt": "a", "top_p": NaN}', "in.jsonl:3: not JSON (NaN is not a JSON number)"),
        (b'{"prompt": "a", "id": ' + b"9" * 5000 + b"}", "conversion: value has 5000 digits)"),
        (b'{"prompt": "a", "id": 1e999}', 'in.jsonl:3: "id" holds a number that is too large'),
        (b'{"prompt": "a", "id": ' + b"[" * 100_000, "in.jsonl:3: not JSON (it is nested too deep)"),
        (b'{"prompt": "\xff"}', "in.jsonl:3: byte 12 of the line is not UTF-8"),
        (b'{"prompt": "\\ud800"}', "in.jsonl:3: text holds a lone surrogate (U+D800)"),
        (b'{"prompt": "a", "id": "\\ud800"}', 'in.jsonl:3: "id" holds a lone surrogate'),
    ],
)
def test_a_bad_line_is_located_and_nothing_is_written(run, tmp_path, line, message):
    (tmp_path / "in.jsonl").write_bytes(b'{"prompt": "a"}\n\n' + line + b"\n")
    fails(run("--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl"), message)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_a_null_option_counts_as_not_given(run, tmp_path):
    for name, more in (("null", ', "temperature": null, "stop": null'), ("none", "")):
        (tmp_path / name).write_text('{"prompt": "The", "max_tokens": 3' + more + "}")
    null, none = (run("--input", tmp_path / name, "--seed", 1) for name in ("null", "none"))
    assert null[0] == 0 and null[1] == none[1]


@pytest.mark.parametrize(("flag", "content"), [("--prompt-file", "The"), ("--input", '{"prompt": "The"}')])
def test_a_prompt_may_come_from_a_pipe(run, tmp_path, flag, content):
    """As a shell's <(command) does."""
    (tmp_path / "file").write_text(content)
    os.mkfifo(tmp_path / "pipe")
    options = "--max-tokens", 3, "--seed", 1
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit((tmp_path / "pipe").write_text, content)
        piped = run(flag, tmp_path / "pipe", *options)
        writing.result()
    assert piped[0] == 0 and piped[1] == run(flag, tmp_path / "file", *options)[1]


@pytest.mark.parametrize("flag", ["--prompt-file", "--input"])
@pytest.mark.parametrize("name", ["", "x" * 300, "."])
def test_an_unreadable_prompt_is_one_line(run, flag, name):
    fails(run(flag, name), f"{name!r} cannot be read (")


def test_an_empty_chat_template_is_refused(run):
    fails(run("--chat", "--chat-template", "", stdin=b"Hi\n"), "the chat template is ''; it must hold {prompt} once")


def interrupt_after(monkeypatch, steps):
    """The model's `steps`-th step is a Ctrl-C."""
    step, count = CpuStep.__call__, iter(range(10**6))

    def interrupted(self, tokens):
        if next(count) == steps:
            raise KeyboardInterrupt
        return step(self, tokens)

    monkeypatch.setattr(CpuStep, "__call__", interrupted)


def test_ctrl_c_keeps_the_text_so_far(run, monkeypatch):
    options = "--prompt", "The", "--seed", 1, "--max-tokens"
    wanted = run(*options, 8)[1]
    interrupt_after(monkeypatch, 7)
    code, out, err = run(*options, 100)
    assert code == 130
    assert out == wanted
    assert err == "tnllm: stopped by Ctrl-C\n"


def test_ctrl_c_keeps_the_finished_part_of_a_batch(run, monkeypatch, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"prompt": "The", "max_tokens": 4}\n' * 4)
    (tmp_path / "out.jsonl").write_text("an older result\n")
    interrupt_after(monkeypatch, 8)
    # A seed under which no text ends early: how many results eight steps make is then fixed.
    options = "--batch-size", 1, "--seed", 1
    code, _, err = run("--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl", *options)
    assert code == 130
    assert "stopped after 2 of 4 results; run the same command again to resume" in err
    assert len((tmp_path / "out.jsonl.part").read_text().splitlines()) == 2
    assert (tmp_path / "out.jsonl").read_text() == "an older result\n"


def test_ctrl_c_that_python_drops_stops_a_batch(run, monkeypatch, tmp_path):
    """As it does what a finaliser or a callback raises."""

    class Finaliser:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    step, count = CpuStep.__call__, iter(range(10**6))

    def step_with_finaliser(self, tokens):
        if next(count) == 8:
            Finaliser()
        return step(self, tokens)

    monkeypatch.setattr(CpuStep, "__call__", step_with_finaliser)
    (tmp_path / "in.jsonl").write_text('{"prompt": "The", "max_tokens": 4}\n' * 40)
    options = "--batch-size", 1, "--seed", 1
    code, _, err = run("--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl", *options)
    assert (code, err.splitlines()[-1]) == (130, "tnllm: stopped by Ctrl-C")
    assert "stopped after 2 of 40 results; run the same command again to resume" in err
    assert len((tmp_path / "out.jsonl.part").read_text().splitlines()) == 2


LINES = "".join(json.dumps({"prompt": "The", "max_tokens": 4, "n": n, "id": n}) + "\n" for n in (1, 2, 1, 1))


@pytest.mark.parametrize("tail", [b"", b'{"index": 1, "sa', b"\0" * 40])
def test_a_stopped_batch_resumes_where_it_was(run, monkeypatch, tmp_path, tail):
    (tmp_path / "in.jsonl").write_text(LINES)
    command = "--input", tmp_path / "in.jsonl", "--batch-size", 1, "--seed", 1, "--output"
    assert run(*command, tmp_path / "unbroken.jsonl")[0] == 0
    output = tmp_path / "out.jsonl"
    with monkeypatch.context() as patch:
        interrupt_after(patch, 8)
        assert run(*command, output)[0] == 130
    with open(f"{output}.part", "ab") as part:
        part.write(tail)
    code, _, err = run(*command, output)
    assert code == 0
    assert "resuming: 3 of 5 results are there" in err
    assert "8 tokens at " in err, "only the rest is generated"
    assert output.read_bytes() == (tmp_path / "unbroken.jsonl").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl", "unbroken.jsonl"]


def test_the_part_of_another_batch_is_not_continued_and_not_lost(run, monkeypatch, tmp_path):
    (tmp_path / "in.jsonl").write_text(LINES)
    output = tmp_path / "out.jsonl"
    command = "--input", tmp_path / "in.jsonl", "--output", output, "--batch-size", 1
    with monkeypatch.context() as patch:
        interrupt_after(patch, 8)
        run(*command, "--seed", 1)
    part = (tmp_path / "out.jsonl.part").read_bytes()
    assert part.count(b"\n") == 3
    refusal = "out.jsonl.part holds results of another batch (requests differ); repeat the command that was stopped"
    assert refusal in run(*command, "--seed", 2)[2]
    assert "another batch (model differ)" in run(*command, "--seed", 1, "--dtype", "bfloat16")[2]
    assert "another batch (--echo differ)" in run(*command, "--seed", 1, "--echo")[2]
    assert (tmp_path / "out.jsonl.part").read_bytes() == part
    (tmp_path / "out.jsonl.part.json").unlink()
    assert "is not known to hold results of this batch" in run(*command, "--seed", 1)[2]


def test_results_are_written_where_a_link_leads(run, tmp_path):
    lines, target, link = tmp_path / "in.jsonl", tmp_path / "elsewhere/out.jsonl", tmp_path / "link.jsonl"
    lines.write_text(LINES)
    target.parent.mkdir()
    link.symlink_to(target)
    assert run("--input", lines, "--output", link, "--max-new-tokens", 2)[0] == 0
    assert link.is_symlink() and target.read_text().startswith("{")
    assert list(target.parent.iterdir()) == [target]


def test_outputs_are_checked_before_the_work(run, tmp_path, monkeypatch):
    """Before the model is loaded, too: there is none here."""
    lines, prompt, folder = tmp_path / "in.jsonl", tmp_path / "prompt.txt", tmp_path / "folder"
    lines.write_text(LINES)
    prompt.write_text("Once")
    folder.mkdir()
    (tmp_path / "linked").symlink_to(lines)
    monkeypatch.chdir(tmp_path)
    no_model = "--model", tmp_path / "none"
    outputs = {"--output": ("--input", lines), "--state-out": ("--prompt-file", prompt)}
    for flag, given in outputs.items():
        for path, message in {
            "no/such/x": f"{flag} is no/such/x: there is no folder no/such; make it first",
            "folder": f"{flag} is folder, a folder; give the name of a file to write",
            ".": f"{flag} is ., a folder",
            "": f"{flag} is ., a folder",
            "..": f"{flag} is .., a folder",
            "prompt.txt/x": "there is no folder prompt.txt",
            "/proc/x": f"{flag} is /proc/x, which cannot be written (",
            "x" * 300: "which cannot be written (File name too long)",
            str(given[1]): "which is also the input",
        }.items():
            fails(run(*given, *no_model, flag, path, model=False), message)
    fails(run("--input", lines, *no_model, "--output", "linked", model=False), "linked, which is also the input")
    lines.rename("out.part")
    fails(run("--input", "out.part", *no_model, "--output", "out", model=False), "out.part, which is also the input")
    assert sorted(os.listdir()) == ["folder", "linked", "out.part", "prompt.txt"]
    assert (tmp_path / "out.part").read_text() == LINES


def test_a_weight_file_is_not_replaced_by_a_state(run, weights):
    before = (weights / "model.safetensors").read_bytes()
    fails(run("-p", "a", "--state-out", weights / "model.safetensors"), "which is also the input")
    assert (weights / "model.safetensors").read_bytes() == before


def test_a_state_is_continued_in_place_but_not_replaced_by_results(run, tmp_path):
    state, lines = tmp_path / "s", tmp_path / "in.jsonl"
    lines.write_text(LINES)
    for given in ("-p", "a"), ("--state-in", state):
        assert run(*given, "--max-tokens", "1", "--state-out", state)[0] == 0
    before = state.read_bytes()
    fails(run("--state-in", state, "--input", lines, "--output", state), "which is also the input")
    assert state.read_bytes() == before


def test_a_batch_can_go_to_a_pipe(run, tmp_path):
    (tmp_path / "in.jsonl").write_text(LINES)
    os.mkfifo(tmp_path / "pipe")
    rows = []

    def read():
        rows.extend((tmp_path / "pipe").read_text().splitlines())

    with ThreadPoolExecutor() as pool:
        reading = pool.submit(read)
        assert run("--input", tmp_path / "in.jsonl", "--output", tmp_path / "pipe")[0] == 0
        reading.result(timeout=300)
    assert len(rows) == 5


def test_max_new_tokens_is_another_name(run):
    wanted = run("-p", "The", "--max-tokens", 5, "--seed", 1)[1]
    assert run("-p", "The", "--max-new-tokens", 5, "--seed", 1)[1] == wanted
    assert run("-p", "The", "--max_new_tokens=5", "--seed", 1)[1] == wanted
    row = json.loads(run("--input", "-", stdin=b'{"prompt": "The", "max_new_tokens": 5, "seed": 1}')[1])
    assert row["text"] + "\n" == wanted
    both = b'{"prompt": "The", "max_new_tokens": 5, "max_tokens": 5}'
    fails(run("--input", "-", stdin=both), "-:1: max_tokens and max_new_tokens are the same option")


def test_chat_takes_turns(run, weights):
    options = "--max-tokens", 12, "--seed", 1
    code, out, err = run("--chat", *options, stdin="Hello\n你好\n/reset\nHello\n/help\n\n/exit\nnever read\n".encode())
    assert code == 0
    answers = out.removesuffix("\n").split("\n")
    assert answers[0] == answers[2] != answers[1], "a reset forgets"
    assert "conversation cleared" in err
    assert "/help is not a command; the commands are /save NAME, /load NAME, /reset and /exit" in err
    turn = "Human:\nHello\nAssistant:\n"
    single = run("--prompt", turn, *options, "--stop", r"\nHuman:")[1]
    assert single == answers[0] + "\n"


def test_chat_remembers_as_if_the_talk_were_one_prompt(run, weights):
    """Later turns follow the earlier ones and their answers, each closed by the end token."""
    from tnllm.generation.decoder import Result, generate
    from tnllm.generation.loading import load

    options = "--max-tokens", 12, "--seed", 1, "--temperature", 0.7
    out = run("--chat", *options, stdin=b"Hello\nAgain\n")[1]
    ready = load(weights)
    params = ready.params(max_tokens=12, seed=1, temperature=0.7, stop=("\nHuman:",))

    def answer(ids):
        return next(e for e in generate(ready.model, ready.tokenizer, [ids], params) if isinstance(e, Result))

    first_turn = ready.encode("Human:\nHello\nAssistant:\n")
    first = answer(first_turn)
    assert first.finish_reason == "length"
    second_turn = ready.encode("Human:\nAgain\nAssistant:\n")
    second = answer([*first_turn, *first.tokens, ready.tokenizer.eos_id, *second_turn])
    assert out == f"{first.text}\n{second.text}\n"


def test_ctrl_c_in_a_chat_breaks_the_answer_off(run, monkeypatch):
    interrupt_after(monkeypatch, 5)
    code, out, err = run("--chat", "--seed", 1, "--max-tokens", 12, stdin=b"Hello\nAgain\n")
    assert code == 0
    assert [line.split(" at ")[0] for line in err.splitlines()] == ["answer interrupted", "12 tokens"]
    assert out.count("\n") >= 2


@pytest.mark.slow
def test_a_document_is_read_once_and_asked_many_times(run, tmp_path):
    book, state = "The quick brown fox jumps over the lazy dog. " * 20, tmp_path / "book.state"
    options = "--max-tokens", 15, "--seed", 1
    (tmp_path / "book.txt").write_text(book)
    code, out, err = run("--prompt-file", tmp_path / "book.txt", "--max-tokens", 0, "--state-out", state)
    assert (code, out) == (0, "\n")
    assert f"tokens saved to {state}" in err
    for question in "The cat", "今天":
        asked = run("--state-in", state, "--prompt", question, *options)
        assert asked[0] == 0
        assert asked[1] == run("--prompt", book + question, *options)[1]
    assert run("--state-in", state, *options)[1] == run("--prompt", book, *options)[1], "going on without a prompt"
    (tmp_path / "in.jsonl").write_text('{"prompt": "The cat"}\n{"prompt": ""}\n')
    batch = run("--state-in", state, "--input", tmp_path / "in.jsonl", *options)[1]
    assert json.loads(batch.splitlines()[1])["text"] + "\n" == run("--state-in", state, *options)[1]


def test_stopping_and_going_on_equals_never_stopping(run, tmp_path):
    options = "--seed", 4, "--ignore-eos"
    unsplit = run("--prompt", "今天", "--max-tokens", 30, *options, "--json")[1]
    first = run("--prompt", "今天", "--max-tokens", 11, *options, "--json", "--state-out", tmp_path / "s")[1]
    second = run("--state-in", tmp_path / "s", "--max-tokens", 19, *options, "--json")[1]
    first, second, unsplit = map(json.loads, (first, second, unsplit))
    assert first["tokens"] + second["tokens"] == unsplit["tokens"]
    assert first["text"] + second["text"] == unsplit["text"]


def test_a_state_of_another_model_is_refused(run, tmp_path):
    state = tmp_path / "s"
    assert run("-p", "The", "--max-tokens", 1, "--state-out", state)[0] == 0
    fails(run("--state-in", state, "--dtype", "bfloat16"), "was written with other weights", "--dtype it was written")
    fails(run("--state-in", tmp_path / "none"), "does not exist; write one with --state-out")


def test_an_empty_prompt_starts_from_nothing_only_when_typed(run, tmp_path):
    code, _, err = run("--prompt", "", "--max-tokens", 5, "--seed", 1)
    assert code == 0
    assert "the prompt is empty: starting from the begin token" in err
    (tmp_path / "empty.txt").write_text("\n")
    fails(run("--prompt-file", tmp_path / "empty.txt"), 'empty.txt is empty; to start from nothing give --prompt ""')
    fails(run("--prompt-file", "-"), "stdin is empty")
    fails(run("--input", "-"), "- holds no request; write one JSON object per line")


def test_text_that_is_not_utf8(run, tmp_path):
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    fails(run("--prompt-file", tmp_path / "latin.txt"), "latin.txt is not UTF-8 (byte 3); convert it")
    fails(run("--chat", stdin=b"\xff\n"), "stdin is not UTF-8 (byte 0)")
    for encoding in "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be":
        (tmp_path / "wide.txt").write_text("café", encoding)
        fails(run("--prompt-file", tmp_path / "wide.txt"), "wide.txt is UTF-16 or UTF-32, not UTF-8")
    for flag in "--prompt", "--stop":
        # What Python makes of bytes on the command line that are not in the terminal's encoding.
        fails(
            run("--prompt", "a", flag, "a\udcff"),
            f"{flag} holds bytes that are not UTF-8 (character 1)",
            "--prompt-file",
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "no prompt; give --prompt TEXT, --prompt-file FILE"),
        (["--prompt", "a", "--chat"], "--prompt and --chat were given; give one of them"),
        (["--prompt", "a", "--temperature", "-1"], "temperature is -1.0; allowed: a number, 0 to 100"),
        (["--prompt", "a", "--temperature", "hot"], "Invalid value for '--temperature'"),
        (["--prompt", "a", "--top-p", "0"], "top_p is 0.0; allowed: a number, above 0, up to 1"),
        (["--prompt", "a", "--temprature", "1"], "No such option: --temprature"),
        (["--prompt", "a", "--stop", ""], "stop is ['']; allowed: strings that are not empty"),
        (["--prompt", "a", "--output", "x"], "--output is for --input"),
        (["--prompt", "a", "--logprobs", "2"], "--logprobs needs --json or --input"),
        (["--prompt", "a", "--n", "2", "--state-out", "x"], "--state-out saves the state of one text"),
        (["--chat", "--json"], "--chat cannot be combined with --json"),
        (["--chat", "--chat-template", "Q:"], "the chat template is 'Q:'; it must hold {prompt} once"),
        (["--prompt", "a", "--chat-template", "{prompt}"], "--chat-template is for --chat"),
        (["--prompt", "a", "--device", "tpu"], "device is 'tpu'; allowed: auto, cpu, cuda, cuda:N"),
        (["--prompt", "a", "--device", "cuda:99"], "device is 'cuda:99', but torch sees"),
        (["--prompt", "a", "--dtype", "float16"], "dtype is 'float16'; allowed: auto, float32, bfloat16"),
        (
            ["--prompt-file", "nowhere.txt"],
            "'nowhere.txt' cannot be read (No such file or directory); give a UTF-8 text file",
        ),
    ],
)
def test_one_line_for_each_mistake(run, args, message):
    fails(run(*args), message)


def test_a_folder_that_is_no_model(run, tmp_path):
    fails(run("--model", tmp_path / "none", "-p", "a", model=False), "is not a folder; give a run folder")
    fails(run("--model", tmp_path, "-p", "a", model=False), "holds neither config.json nor weights/config.json")


def test_defaults_come_from_the_model(run, weights, tmp_path):
    import shutil

    folder = tmp_path / "w"
    shutil.copytree(weights, folder)
    settings = {"do_sample": False, "max_new_tokens": 7, "eos_token_id": [2], "chat_template": "Q: {prompt}\nA:"}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    code, out, err = run("--model", folder, "-p", "The", model=False)
    assert code == 0
    assert "7 tokens" in err
    assert out == run("-p", "The", "--temperature", 0, "--max-tokens", 7, "--repetition-penalty", 1)[1]
    (folder / "generation_config.json").write_text('{"temperature": -2}')
    fails(run("--model", folder, "-p", "The", model=False), "generation_config.json: temperature is -2")
    (folder / "generation_config.json").write_text("{")
    fails(run("--model", folder, "-p", "The", model=False), "generation_config.json is not JSON")


def test_without_a_model_the_packaged_one_is_used_and_named(run, weights, monkeypatch):
    from tnllm import assets

    monkeypatch.setattr(assets, "demo_weights", lambda: weights, raising=False)
    code, out, err = run("-p", "The", "--max-tokens", 5, "--seed", 1, model=False)
    assert code == 0
    assert err.startswith("no --model given: using the demo model that ships with tnllm\n")
    assert out == run("-p", "The", "--max-tokens", 5, "--seed", 1)[1]


def test_help_shows_examples(capsys):
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    out = capsys.readouterr().out
    assert 'tnllm generate --prompt "Once upon a time"' in out
    assert "--state-out" in out
