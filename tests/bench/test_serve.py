"""The load test's small form, and that it notices what it is there to notice."""

import json

import pytest

from tests.serving.serving import running
from tests.small_models import make_ready, small_model
from tnllm.cli.main import main
from tnllm.generation.samples import Row
from tnllm.serving.middleware import Settings
from tnllm.tokenizer import Tokenizer, train_tokenizer


@pytest.fixture(scope="module")
def ready(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(train_tokenizer(["Once upon a time there were 0 1 2 3 4 5 6 7 8 9.\n"] * 20, 320))
    return make_ready(small_model(), Tokenizer.load(path))


def run(capfd, *args):
    with pytest.raises(SystemExit) as stop:
        main(["bench-serve", *args])
    return stop.value.code, *capfd.readouterr()


@pytest.mark.slow
def test_more_streams_than_slots_are_all_complete_and_their_own(capfd, ready, tmp_path):
    file = tmp_path / "load.json"
    with running(ready, Settings(name="small", api_key="k"), num_slots=8) as (address, engine):
        args = ("--url", address, "--streams", "40", "--tokens", "8", "--check", "10")
        assert run(capfd, *args)[0] == 2  # no key
        code, out, _ = run(capfd, *args, "--api-key", "k", "--json", str(file))
        assert engine.slots.free == 8 and engine.num_active == 0
    assert code == 0, out
    assert "40 streams of 8 tokens at once: 40 complete, 0 failed" in out
    assert "10 requested again alone: 10 the same text" in out
    result = json.loads(file.read_text())
    assert result["whole"] == 40 and result["memory_mib"]["peak"] >= result["memory_mib"]["before"] > 10


def test_a_full_queue_is_reported(capfd, ready):
    with running(ready, Settings(name="small"), num_slots=1, queue_size=2) as (address, _):
        code, out, err = run(capfd, "--url", address, "--streams", "20", "--tokens", "40", "--check", "0")
    assert code == 1 and " failed" in out
    assert "streams failed; the first: status 429" in err.splitlines()[-1]


def test_texts_that_were_mixed_up_are_found(capfd, ready, monkeypatch):
    right, seen = Row.append, []

    def wrong(self, sampled, index, eos_ids, tokenizer):
        """While several are decoded, rows get their neighbours' tokens."""
        seen.append(len(sampled.tokens))
        return right(self, sampled, (index + 1) % len(sampled.tokens), eos_ids, tokenizer)

    monkeypatch.setattr(Row, "append", wrong)
    with running(ready, Settings(name="small"), num_slots=8) as (address, _):
        code, _, err = run(capfd, "--url", address, "--streams", "8", "--tokens", "8", "--check", "8")
    assert max(seen) > 1
    assert code == 1 and "have another text when requested alone" in err.splitlines()[-1]


def test_nobody_there(capfd):
    code, out, err = run(capfd, "--url", "http://127.0.0.1:9")
    assert code == 1 and out == "" and "no server answers at 127.0.0.1:9" in err.splitlines()[-1]
    assert run(capfd, "--url", "https://127.0.0.1:9")[0] == 2
