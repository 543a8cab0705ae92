"""The load test's small form, and that it notices what it is there to notice."""

import json
from functools import partial

import httpx
import pytest

from tests.serving.serving import running
from tests.small_models import make_ready, small_model
from tnllm.cli.main import main
from tnllm.generation.samples import Row
from tnllm.generation.slots import Slots
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
    assert "40 of 40" in out
    assert "10 requested again alone: 10 the same text, 0 the text of another stream" in out
    [row] = json.loads(file.read_text())["rows"]
    assert row["whole"] == 40 and row["memory_peak_mib"] >= row["memory_before_mib"] > 10
    assert row["first_p50_ms"] <= row["first_p99_ms"] and row["token_p50_ms"] > 0


def test_rows_have_prompts_of_the_given_lengths(capfd, ready, tmp_path):
    files = tmp_path / "load.json", tmp_path / "load.csv"
    with running(ready, Settings(name="small"), num_slots=8) as (address, engine):
        code, out, _ = run(
            capfd, "--url", address, "--streams", "1,3", "--requests", "2", "--prompt-tokens", "5", "--prefix-tokens", "40",
            "--tokens", "4", "--check", "3", "--json", str(files[0]), "--csv", str(files[1]),
        )  # fmt: skip
        counted = engine.metrics
        # 2 + 6 requests, and 3 of them again; a prefix that was read twice is not read a third time.
        assert counted.prompt_tokens + counted.cached_tokens == 11 * 45 and counted.cached_tokens >= 6 * 40
        assert counted.generated_tokens == 11 * 4
    assert code == 0, out
    assert [line.split()[:8] for line in out.splitlines()[1:3]] == [
        [streams, "40", "+", "5", "4", count, "of", count] for streams, count in (("1", "2"), ("3", "6"))
    ]
    rows = json.loads(files[0].read_text())["rows"]
    assert [(row["streams"], row["requests"], row["whole"]) for row in rows] == [(1, 2, 2), (3, 6, 6)]
    assert len(files[1].read_text().splitlines()) == 3
    assert run(capfd, "--streams", "4,no")[0] == 2


def test_an_event_that_holds_several_tokens_counts_them_all(capfd, ready, monkeypatch):
    """As on a GPU, where eight tokens are decoded between two synchronisations."""
    monkeypatch.setattr("tnllm.serving.engine.Slots", partial(Slots, sync_every=4))
    body = {"prompt": "Once", "max_tokens": 10, "ignore_eos": True, "seed": 1}
    with running(ready, Settings(name="small"), num_slots=2) as (address, _):
        plain, native = httpx.post(f"{address}/v1/completions", json=body).json(), {**body, "return_tokens": True}
        events = streamed(
            f"{address}/v1/completions", {**body, "stream_options": {"include_usage": True}, "logprobs": 0}
        )
        natives = streamed(f"{address}/completion", {**native, "prompt": "Once"})
        assert run(capfd, "--url", address, "--streams", "2", "--tokens", "10")[0] == 0
    assert "".join(event["choices"][0]["text"] for event in events[:-1]) == plain["choices"][0]["text"]
    counts = [len(event["choices"][0]["logprobs"]["tokens"]) for event in events[:-2]]
    assert sum(counts) == 10 and max(counts) > 1
    assert events[-1]["usage"]["completion_tokens"] == 10
    assert [len(event["tokens"]) for event in natives] == [4, 4, 2, 0]
    assert [event["tokens_predicted"] for event in natives] == [4, 8, 10, 10]


def streamed(url, body):
    lines = httpx.post(url, json={**body, "stream": True}).text.splitlines()
    return [json.loads(line[6:]) for line in lines if line.startswith("data: {")]


def test_a_full_queue_is_reported(capfd, ready):
    with running(ready, Settings(name="small"), num_slots=1, queue_size=2) as (address, _):
        code, out, err = run(capfd, "--url", address, "--streams", "20", "--tokens", "40", "--check", "0")
    assert code == 1 and " of 20" in out
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
