"""The model behind the harness: answers, caches, chats, generation, complete evaluations."""

import http.server
import json
import shutil
import socket
import threading
from types import SimpleNamespace

import datasets
import huggingface_hub
import lm_eval.api.registry
import pytest
import torch
import yaml

from tnllm import hub
from tnllm.errors import RunError, UserError
from tnllm.evaluation import tasks
from tnllm.evaluation.answer_cache import AnswerCache
from tnllm.evaluation.generate_until import sampling_params
from tnllm.evaluation.harness import TransNormerLM
from tnllm.evaluation.multiple_choice import build_bundle
from tnllm.evaluation.perplexity import perplexity
from tnllm.evaluation.prompt_encoding import encode_pairs
from tnllm.evaluation.request_file import load_bundle, save_bundle
from tnllm.evaluation.run import Settings, evaluate, write_results
from tnllm.evaluation.sharing_bench import bench_sharing
from tnllm.evaluation.tasks import choose, definition_files, load_tasks, search
from tnllm.generation.decoder import generate_text
from tnllm.modeling.weights import trained_length


def requests(*arguments):
    return [SimpleNamespace(args=each) for each in arguments]


PAIRS = requests(
    ("The capital of France is", " Paris"), ("The capital of France is", " Rome"), ("", "Once"), ("Once upon a ", "time"),
    ("答案：", " A"), ("a b", "c"), ("\n", "x"),
)  # fmt: skip


@pytest.fixture(scope="module")
def lm(folder):
    return TransNormerLM(folder, device="cpu")


def test_registered_under_its_name():
    assert lm_eval.api.registry.get_model("tnllm") is TransNormerLM


def test_loglikelihoods_are_the_models(lm):
    model, tokenizer = lm.ready.model, lm.ready.tokenizer
    for instance, (logprob, greedy) in zip(PAIRS, lm.loglikelihood(PAIRS), strict=True):
        context, continuation = instance.args
        before = tokenizer.encode(context.rstrip()) or [tokenizer.bos_id]
        ids_of_both = tokenizer.encode(context + continuation)
        after = ids_of_both[len(before) :] if context.rstrip() else ids_of_both
        ids = torch.tensor([before + after])
        logits = model(ids[:, :-1])[0][0, len(before) - 1 :]
        chosen = logits.log_softmax(-1).gather(-1, ids[0, len(before) :, None])
        assert logprob == pytest.approx(float(chosen.sum()), abs=1e-3)
        assert greedy == (logits.argmax(-1).tolist() == after)


def test_rolling_reads_the_whole_text(lm):
    text = "Once upon a time there was a fox. " * 40
    [rolling, empty] = lm.loglikelihood_rolling(requests((text,), ("",)))
    [(in_one, _)] = lm.loglikelihood(requests(("", text)))
    assert rolling == pytest.approx(in_one, abs=1e-3) and empty == 0.0
    result = perplexity(lm.ready, [text], window=50)
    assert result["bits_per_byte"] == pytest.approx(-rolling / 0.6931471805599453 / len(text), abs=1e-6)
    assert sum(row["tokens"] for row in result["by_position"]) == result["tokens"]
    assert result["windows"]["pieces"] == -(-result["tokens"] // 50)
    with pytest.raises(UserError, match="no text to score"):
        perplexity(lm.ready, [""])


def test_generation_shares_prefixes_and_stops(folder, lm):
    header = "The quick brown fox jumps over the lazy dog. " * 4
    asked = requests(*((header + tail, {"until": ["\n"], "max_gen_toks": 6}) for tail in ("one", "two", "three")))
    plain = TransNormerLM(folder, device="cpu", share_prefix=False)
    assert lm.generate_until(asked) == plain.generate_until(asked)
    assert all("\n" not in text for text in lm.generate_until(asked))
    with pytest.raises(UserError, match="generation setting 'num_beams' is not known"):
        lm.generate_until(requests(("x", {"num_beams": 4})))
    drawn = lm.generate_until(requests(*[("x", {"do_sample": True, "temperature": 2.0, "max_gen_toks": 8})] * 2))
    assert drawn[0] != drawn[1]


def test_chats_use_the_models_turns(folder):
    lm = TransNormerLM(folder, device="cpu")
    history = [
        {"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "Who?"},
    ]  # fmt: skip
    text = lm.apply_chat_template(history)
    assert lm.shown(text) == "Be kind.\nHuman:\nHi\nAssistant:\nHello</s>Human:\nWho?\nAssistant:\n"
    assert lm.tok_encode(text).count(lm.ready.tokenizer.eos_id) == 1
    open_end = lm.apply_chat_template([*history, {"role": "assistant", "content": "I am"}], add_generation_prompt=False)
    assert lm.shown(open_end).endswith("Assistant:\nI am")
    # The prompt's newline is not scored with the answer.
    [pair] = encode_pairs([(text, "Me")], lm.tok_encode, lm.prefix_token_id)
    assert (pair.context, pair.continuation) == (lm.tok_encode(text), lm.tok_encode("Me"))


NAMES = "</s> <s> <unk> <pad> \ufdd0 \ufdd1 \ufdd2"


def test_names_of_control_tokens_in_a_text_are_text(folder):
    """In questions, answers and conversations, as in training and serving; a conversation's own end tokens are tokens."""
    lm = TransNormerLM(folder, device="cpu")
    tokenizer = lm.ready.tokenizer
    control = {tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id}
    assert not control & set(lm.tok_encode(NAMES)) and tokenizer.decode(lm.tok_encode(NAMES)) == NAMES
    history = [
        {"role": "user", "content": NAMES},
        {"role": "assistant", "content": NAMES},
        {"role": "user", "content": "Who?"},
    ]
    text = lm.apply_chat_template(history)
    # The harness appends what is scored as it is.
    [pair] = encode_pairs([(text, NAMES)], lm.tok_encode, lm.prefix_token_id)
    assert [token for token in pair.context if token in control] == [tokenizer.eos_id]
    assert list(pair.continuation) == tokenizer.encode(NAMES)
    assert lm.shown(text + NAMES) == f"Human:\n{NAMES}\nAssistant:\n{NAMES}</s>Human:\nWho?\nAssistant:\n{NAMES}"
    # A text that holds the marks of conversations before any conversation and after one.
    marks = "a\ufdd1b\ufdd0c"
    assert tokenizer.decode(lm.tok_encode(marks)) == marks
    [score] = lm.loglikelihood_rolling(requests((NAMES,)))
    assert score < 0


def test_greedy_texts_follow_the_generation_config(folder, tmp_path):
    """The folder's repetition penalty applies, as in `generate`; sampling values only if a task samples."""
    shutil.copytree(folder, tmp_path / "plain")
    settings = json.loads((folder / "generation_config.json").read_text())
    (tmp_path / "plain/generation_config.json").write_text(json.dumps(settings | {"repetition_penalty": 1.0}))
    shipped, plain = TransNormerLM(folder, device="cpu"), TransNormerLM(tmp_path / "plain", device="cpu")
    assert shipped.ready.sampling["repetition_penalty"] == 1.03 and shipped.identity() != plain.identity()
    asked = [("The quick brown fox", {"until": ["\n\n"], "max_gen_toks": 12})]
    ready = shipped.ready
    options = {"temperature": 0, "max_tokens": 12, "stop": ("\n\n",), "repetition_penalty": 1.03}
    expected = generate_text(ready.model, ready.tokenizer, asked[0][0], **options)
    assert shipped.generate_until(requests(*asked)) == [expected]
    off = [(text, {**settings, "repetition_penalty": 1.0}) for text, settings in asked]
    assert shipped.generate_until(requests(*off)) == plain.generate_until(requests(*asked))
    defaults = {"temperature": 0.8, "top_p": 0.95, "repetition_penalty": 1.03, "max_tokens": 5}
    greedy = sampling_params({"until": ["\n"], "temperature": 0.7, "do_sample": False}, defaults, "</s>")
    assert (greedy.temperature, greedy.repetition_penalty, greedy.max_tokens, greedy.stop) == (
        0,
        1.03,
        256,
        ("\n", "</s>"),
    )
    assert sampling_params({"until": "Q:"}, defaults).temperature == 0
    assert sampling_params({"do_sample": True}, defaults).temperature == 0.8
    assert sampling_params({"temperature": 0.3}, defaults).temperature == 0.3


def test_answers_are_kept_for_these_weights_and_settings_alone(folder, tmp_path):
    first = TransNormerLM(folder, device="cpu", cache_dir=tmp_path)
    answers = first.loglikelihood(PAIRS)
    notes = []
    again = TransNormerLM(folder, device="cpu", cache_dir=tmp_path, log=notes.append)
    again.scorer.score = None  # nothing is left to compute
    assert again.loglikelihood(PAIRS) == answers and again.num_cached == len(PAIRS)
    assert notes == [f"loglikelihood: {len(PAIRS)} of {len(PAIRS)} answers are in the cache, 0 are left"]
    for other in ({"share_prefix": False}, {"dtype": "bfloat16"}):
        assert TransNormerLM(folder, device="cpu", cache_dir=tmp_path, **other).cache.path != first.cache.path
    with torch.no_grad():
        changed = TransNormerLM(folder, device="cpu")
    changed.weights_sha256 = "0" * 64
    assert AnswerCache(tmp_path, changed.identity()).path != first.cache.path


def test_a_killed_run_keeps_what_it_had(folder, tmp_path):
    lm = TransNormerLM(folder, device="cpu", cache_dir=tmp_path, batch_tokens=8, batch_size=1)
    score, count = lm.scorer.score, 0

    def killed(*rest):
        nonlocal count
        for each in score(*rest):
            count += 1
            if count == 3:
                raise KeyboardInterrupt
            yield each

    lm.scorer.score = killed
    with pytest.raises(KeyboardInterrupt):
        lm.loglikelihood(PAIRS)
    again = TransNormerLM(folder, device="cpu", cache_dir=tmp_path)
    again.loglikelihood(PAIRS)
    assert again.num_cached == 2


def test_a_cache_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="give another --cache-dir"):
        AnswerCache(tmp_path / "file", {})


def test_whole_evaluation_in_the_harness_format(lm, tmp_path):
    notes = []
    loaded = load_tasks(choose(["mmlu", "ceval", "winogrande", "piqa"], 2, notes.append), None, False, notes.append)
    assert loaded.sampled == ["mmlu", "ceval-valid", "winogrande", "piqa"]
    assert "ceval is ceval-valid in lm-evaluation-harness" in notes
    results = evaluate(lm, loaded, Settings(limit=2))
    assert results["results"]["mmlu"]["sample_len"] == 10 and results["n-shot"]["mmlu_philosophy"] == 2
    assert 0 <= results["results"]["ceval-valid"]["acc,none"] <= 1
    assert results["tnllm"]["tokens_computed"] < 0.5 * results["tnllm"]["tokens_one_by_one"]
    path = write_results(tmp_path, results, log_samples=True)
    written = json.loads(path.read_text())
    keys = {
        "results",
        "groups",
        "group_subtasks",
        "configs",
        "versions",
        "n-shot",
        "higher_is_better",
        "n-samples",
        "config",
    }
    assert keys | {"task_hashes", "model_name_sanitized", "lm_eval_version", "date"} <= set(written)
    assert written["config"]["model_sha"] == lm.weights_sha256
    rows = [json.loads(line) for line in next(tmp_path.rglob("samples_piqa_*.jsonl")).read_text().splitlines()]
    assert len(rows) == 2 and {"doc", "arguments", "resps", "acc", "prompt_hash"} <= set(rows[0])


def test_counts_are_those_of_all_ranks(folder, monkeypatch):
    lm = TransNormerLM(folder, device="cpu")
    other = {
        "tokens_computed": 5,
        "tokens_one_by_one": 7,
        "longest_tokens": 9999,
        "requests": 3,
        "requests_from_cache": 1,
    }
    monkeypatch.setattr(lm, "gather_object", lambda mine: [mine, other])
    result = evaluate(lm, load_tasks(choose(["piqa"], None, print), None, False, print), Settings(limit=1))["tnllm"]
    own = lm.counts()
    assert own["requests"] == 2 and result["longest_tokens"] == 9999
    assert all(result[name] == own[name] + other[name] for name in own if name != "longest_tokens")


def test_request_files_give_the_same_scores(lm, tmp_path):
    loaded = load_tasks(choose(["mmlu", "winogrande"], None, print), None, False, print)
    bundle = build_bundle(loaded, lm.ready.tokenizer, 2, 1234)
    save_bundle(tmp_path / "requests.xz", bundle)
    again = load_bundle(tmp_path / "requests.xz")
    assert again.requests == bundle.requests and again.answers == bundle.answers and min(bundle.answers) >= 0
    results = bench_sharing(lm.ready.model, again)
    assert results["agreement"]["changed"] == [] and results["token_ratio"] > 2
    harness = evaluate(lm, load_tasks(choose(["mmlu"], None, print), None, False, print), Settings(limit=2))
    mmlu = bench_sharing(lm.ready.model, again, questions=10, plain=False)
    assert mmlu["ways"][0]["accuracy"] == pytest.approx(harness["results"]["mmlu"]["acc,none"])
    (tmp_path / "bad.xz").write_bytes(b"no")
    with pytest.raises(UserError, match="not a file of requests"):
        load_bundle(tmp_path / "bad.xz")


def test_names_of_the_harness_are_found_without_its_scan():
    known = definition_files()
    assert {"mmlu", "arc_easy", "ai2_arc", "gsm8k", "mmlu_stem_tasks", "lambada"} <= set(known)
    assert "arc_challenge" in search("arc_chal")
    assert [choice.name for choice in choose(["sst2"], None, print)] == ["sst2"]
    paper = {choice.name: choice.num_fewshot for choice in choose(["tnl-paper"], None, print)}
    assert len(paper) == 11 and paper["mmlu"] == 5 and paper["boolq"] == 0
    with pytest.raises(UserError, match="did you mean 'mmlu'"):
        choose(["mmul"], None, print)
    with pytest.raises(UserError, match="'mmlu_law' is not known"):
        choose(["mmlu_law"], None, print)


def test_a_pattern_leaves_out_what_has_no_local_data(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "answers", lambda url: pytest.fail("the network was used"))
    notes = []
    loaded = load_tasks(choose(["piq*", "ar*"], None, print), None, False, notes.append)
    assert list(loaded.tasks) == ["piqa"]
    assert notes[0].startswith("piq*: left out piqa_ar, ") and "--online downloads them" in notes[0]
    # ARC has a card and no sample.
    assert notes[1].startswith("ar*: left out ") and "arc_easy" not in loaded.tasks
    with pytest.raises(UserError, match=r"no task that matches arc\* has its data here; give --data-dir DIR"):
        load_tasks(choose(["arc*"], None, print), None, False, notes.append)
    row = {"goal": "g", "sol1": "x", "sol2": "y", "label": 0}
    (tmp_path / "piqa_plain_text_validation.jsonl").write_text(json.dumps(row) + "\n")
    loaded = load_tasks(choose(["piq*", "winogr*"], None, print), tmp_path, False, notes.append)
    assert list(loaded.tasks) == ["piqa"] and loaded.sampled == []
    # A name typed in full is wanted, whatever patterns match it; a broken file is told, not left out.
    with pytest.raises(UserError, match="no validation split of winogrande in"):
        load_tasks(choose(["winogr*", "winogrande"], None, print), tmp_path, False, notes.append)
    (tmp_path / "piqa_plain_text_validation.jsonl").write_text("{\n")
    with pytest.raises(UserError, match="jsonl:1: not JSON"):
        load_tasks(choose(["piq*"], None, print), tmp_path, False, notes.append)


def test_a_real_task_that_looks_like_a_typo_gets_a_hint(monkeypatch):
    notes = []
    [choice] = choose(["mmmlu"], None, notes.append)
    assert choice.name == "mmmlu" and notes == [
        "mmmlu is a task of its own in lm-evaluation-harness, without offline data; did you mean 'mmlu'?"
    ]
    monkeypatch.setattr(hub, "answers", lambda url: False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"data of mmmlu come from .*; did you mean 'mmlu'"):
        load_tasks([choice], None, False, print)
    choose(["piqa_ca", "mmlu_stem", "sst2"], None, notes.append)
    assert len(notes) == 1
    # Its name begins like a subject of MMLU, and it is none.
    assert choose(["mmlu_pro"], None, print)[0].card is None
    assert choose(["mmlu_virology"], None, print)[0].card.name == "mmlu"


@pytest.fixture
def own_tasks(tmp_path):
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [
        {"question": "1+1?", "choices": ["2", "3"], "answer": 0},
        {"question": "2+1?", "choices": ["2", "3"], "answer": 1},
    ]
    (folder / "quiz.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    quiz = {
        "task": "my_quiz", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice",
        "dataset_kwargs": {"data_files": {"test": str(folder / "quiz.jsonl")}}, "doc_to_text": "Q: {{question}}\nA:",
        "doc_to_choice": "{{choices}}", "doc_to_target": "answer", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    (folder / "quiz.yaml").write_text(yaml.safe_dump(quiz))
    (folder / "group.yaml").write_text("group: my_group\ntask: [my_quiz]\naggregate_metric_list: [{metric: acc}]\n")
    return folder


def test_own_tasks_are_found_offline_beside_those_of_the_harness(lm, own_tasks, monkeypatch):
    monkeypatch.setattr(hub, "answers", lambda url: pytest.fail("the network was used"))
    choices = choose(["my_*", "piqa"], None, print, own_tasks)
    assert {choice.name for choice in choices} == {"my_quiz", "my_group", "piqa"}
    results = evaluate(lm, load_tasks(choices, None, False, print), Settings(limit=2))["results"]
    assert results["my_group"]["acc,none"] == results["my_quiz"]["acc,none"] and "acc,none" in results["piqa"]
    assert search("my_q", own_tasks) == ["my_quiz"]
    with pytest.raises(UserError, match="'my_quiz' is not known"):
        choose(["my_quiz"], None, print)
    (own_tasks / "quiz.jsonl").unlink()
    with pytest.raises(
        UserError, match=r"task my_quiz of .*/tasks could not be loaded \(FileNotFoundError: .*quiz.jsonl"
    ):
        load_tasks(choose(["my_quiz"], None, print, own_tasks), None, False, print)
    (own_tasks / "quiz.yaml").unlink()
    (own_tasks / "group.yaml").unlink()
    tasks._defined_in.cache_clear()
    with pytest.raises(UserError, match="holds no YAML that defines a task"):
        choose(["piqa"], None, print, own_tasks)


def test_without_a_network_the_hub_is_not_waited_for(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert not hub.answers(url, wait_s=0.2)
    assert not hub.answers(url, wait_s=5)  # nobody listens there any more
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        # It refuses every request, which is an answer.
        assert hub.answers(f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
    notes = []
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "answers", lambda url: False)
    with pytest.raises(UserError, match=r"data of gsm8k come from the Hugging Face hub.*\(offline, and they are not"):
        load_tasks(choose(["gsm8k"], None, print), None, False, notes.append)
    assert "does not answer: reading its cache" in notes[0]


def test_the_trained_length_is_read_from_the_run(tmp_path):
    (tmp_path / "weights").mkdir()
    assert trained_length(tmp_path / "weights") is None
    (tmp_path / "config.resolved.yaml").write_text("data:\n  seq_len: 512\n")
    assert trained_length(tmp_path / "weights") == 512
