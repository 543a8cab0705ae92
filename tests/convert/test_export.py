"""Hugging Face folders, loaded by transformers in a process where tnllm cannot be imported."""

import json
import math
import os
import re
import subprocess
import sys

import pytest
import sentencepiece
import torch

from tests.convert import official_files
from tnllm import assets
from tnllm.chat_template import BOUNDARY
from tnllm.convert import hf_folder
from tnllm.convert.fast_tokenizer import CHECK_TEXTS, tokenizer_files
from tnllm.convert.run import Options, convert
from tnllm.generation.decoder import generate_text
from tnllm.generation.loading import load
from tnllm.modeling.config import get_preset
from tnllm.modeling.hf_names import to_hf_config
from tnllm.modeling.model import build_model
from tnllm.modeling.weights import save_model
from tnllm.tokenizer import Tokenizer

pytestmark = pytest.mark.slow

SMALL = {"vocab_size": 97, "model_dim": 32, "num_heads": 2, "num_layers": 3, "glu_dim": 48}
PROMPTS = ["Once upon a time", "The river", "In the year of our Lord 1066 the men of"]

# Runs without tnllm: generation alone and in padded batches, then lm-eval's hf model on a local task.
SCRIPT = """
import json, sys
sys.modules["tnllm"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
folder, task_folder = sys.argv[1:]
prompts = json.loads(sys.stdin.read())
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
half = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16)
theta = half.model.layers[0].token_mixer.lrpe.theta
settings = {"do_sample": False, "max_new_tokens": 24}
def new_text(inputs, **more):
    rows = model.generate(**inputs, **settings, **more)
    return tokenizer.batch_decode(rows[:, inputs.input_ids.shape[1]:], skip_special_tokens=True)
alone = [new_text(tokenizer([prompt], return_tensors="pt"))[0] for prompt in prompts]
batch = tokenizer(prompts, return_tensors="pt", padding=True)
river = tokenizer(prompts[1:2], return_tensors="pt")
embedded = model.get_input_embeddings()(river.input_ids)
plain = {"repetition_penalty": 1.0, "do_sample": False, "max_new_tokens": 8}
answer = {
    "alone": alone,
    "batch": new_text(batch),
    "padding": int((batch.attention_mask == 0).sum()),
    "no_cache": new_text(river, use_cache=False),
    "beams": [new_text(river, num_beams=3), new_text(river, num_beams=3, use_cache=False)],
    "stopped": new_text(river, stop_strings=[alone[1][8:12]], tokenizer=tokenizer)[0],
    "pipeline": pipeline("text-generation", model=model, tokenizer=tokenizer)(prompts, batch_size=3, **settings),
    "from_embeddings": model.generate(inputs_embeds=embedded, attention_mask=river.attention_mask, **plain).tolist(),
    "from_ids": model.generate(**river, **plain)[:, river.input_ids.shape[1]:].tolist(),
    "theta": [str(theta.dtype), bool(torch.equal(theta, model.model.layers[0].token_mixer.lrpe.theta))],
    "tied": model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr(),
}
import lm_eval
from lm_eval.tasks import TaskManager
results = lm_eval.simple_evaluate(
    model="hf", model_args={"pretrained": folder, "trust_remote_code": True, "dtype": "float32"}, tasks=["local_rolls"],
    task_manager=TaskManager(include_path=task_folder, include_defaults=False), device="cpu",
    batch_size=2, bootstrap_iters=0,
)
answer["lm_eval"] = results["results"]["local_rolls"]
answer["logged"] = [sample["filtered_resps"] for sample in results["samples"]["local_rolls"]]
model.save_pretrained("saved")
tokenizer.save_pretrained("saved")
again = AutoModelForCausalLM.from_pretrained("saved", trust_remote_code=True, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained("saved", trust_remote_code=True)
tokenizer.save_pretrained("saved")
row = again.generate(**river, **settings)[0, river.input_ids.shape[1]:]
answer["saved"] = tokenizer.decode(row, skip_special_tokens=True)
print("ANSWER" + json.dumps(answer))
"""
TASK = """
task: local_rolls
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list:
  - metric: acc
metadata:
  version: 1
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The demo model's folder and what the script said of it."""
    root = tmp_path_factory.mktemp("export")
    convert(assets.demo_weights(), root / "hf", Options(to="hf", verify=False), lambda _: None, lambda *_: None)
    rows = [
        {"text": "Once upon a", "choices": ["time", "zebra"], "label": 0},
        {"text": "The king and the", "choices": ["queen", "queue"], "label": 0},
        {"text": "He went to the", "choices": ["xylem", "house"], "label": 1},
    ]
    (root / "task").mkdir()
    data = root / "task/data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "task/rolls.yaml").write_text(TASK.format(data=data))
    env = {
        **os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(root / "home"),
        "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, root / "hf", root / "task"],
        input=json.dumps(PROMPTS), capture_output=True, text=True, cwd=root, env=env, timeout=600,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    return root / "hf", rows, json.loads(re.search(r"^ANSWER(.*)$", result.stdout, re.M)[1])


def test_greedy_text_is_that_of_tnllm_generate(exported):
    folder, _, answer = exported
    ready = load(folder, device="cpu")
    params = {"temperature": 0, "max_tokens": 24, "repetition_penalty": ready.sampling["repetition_penalty"]}
    ours = [generate_text(ready.model, ready.tokenizer, prompt, **params) for prompt in PROMPTS]
    assert answer["alone"] == ours


def test_what_transformers_saved_is_a_folder_for_our_commands(exported):
    folder, _, answer = exported
    saved = folder.parent / "saved"
    assert (saved / "tokenizer.model").read_bytes() == assets.tokenizer_model().read_bytes()
    ready = load(saved, device="cpu")
    params = {"temperature": 0, "max_tokens": 24, "repetition_penalty": ready.sampling["repetition_penalty"]}
    ours = generate_text(ready.model, ready.tokenizer, PROMPTS[1], **params)
    assert ours == answer["saved"] == answer["alone"][1]


def test_padding_caching_and_beams_change_nothing(exported):
    _, _, answer = exported
    assert answer["padding"] > 10 and answer["batch"] == answer["alone"]
    assert answer["no_cache"] == answer["alone"][1:2]
    assert answer["beams"][0] == answer["beams"][1]
    assert answer["from_embeddings"] == answer["from_ids"]


def test_stop_strings_and_the_pipeline(exported):
    _, _, answer = exported
    text, stop = answer["alone"][1], answer["alone"][1][8:12]
    assert text.startswith(answer["stopped"]) and stop in answer["stopped"] and len(answer["stopped"]) < len(text)
    assert [row[0]["generated_text"] for row in answer["pipeline"]] == [
        prompt + text for prompt, text in zip(PROMPTS, answer["alone"], strict=True)
    ]


def test_theta_stays_exact_and_the_head_is_tied(exported):
    _, _, answer = exported
    assert answer["theta"] == ["torch.float32", True] and answer["tied"]


def test_lm_eval_scores_a_local_task_as_our_model_does(exported):
    folder, rows, answer = exported
    assert answer["lm_eval"]["acc,none"] >= 2 / 3
    ready = load(folder, device="cpu")
    logged = iter(answer["logged"])
    for row in rows:
        for choice, (score, _) in zip(row["choices"], next(logged), strict=True):
            context, ids = ready.encode(row["text"]), ready.encode(row["text"] + " " + choice)
            logits, _ = ready.model(torch.tensor([ids]))
            logs = logits[0].log_softmax(-1)
            ours = sum(float(logs[i - 1, ids[i]]) for i in range(len(context), len(ids)))
            assert math.isclose(score, ours, abs_tol=1e-3)


def hub_pair(hf_code, **changes):
    """One of our models, and the exported class with its weights."""
    config = get_preset("tiny", **{**SMALL, **changes})
    ours = build_model(config, seed=0)
    theirs = hf_code.TnllmForCausalLM(hf_code.TnllmConfig(**to_hf_config(config))).eval()
    state = theirs.state_dict()
    for name, value in ours.state_dict().items():
        state[name if name.startswith("lm_head") else f"model.{name}"].copy_(value)
    return ours.eval().requires_grad_(False), theirs


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"scale_embedding": False, "position": "lrpe-d"},
        {"gate": "low-rank", "norm_position": "gate", "value_activation": "silu"},
        {"gate": "none", "norm": "rmsnorm", "norm_position": "output", "activation": "1+elu"},
        {"norm": "layernorm", "position": "lrpe", "activation": "relu"},
        {"decay_slopes": "linear", "position": "decay", "tie_embeddings": False, "num_heads": 4},
        {"position": "ape", "max_position": 64, "glu_activation": "silu", "decay_temperature": False},
        {"softmax_every": 2},
        {"softmax_every": 3, "qk_norm": True, "norm": "rmsnorm", "rope_base": 500.0},
        {"softmax_every": 1, "qk_norm": True},
    ],
    ids=str,
)
def test_the_exported_class_is_our_model(hf_code, changes):
    ours, theirs = hub_pair(hf_code, **changes)
    tokens = torch.randint(97, (2, 21))
    logits, state = ours(tokens)
    with torch.no_grad():
        output = theirs(tokens, use_cache=True)
        more = theirs(tokens[:, :1], past_key_values=output.past_key_values)
    assert torch.allclose(output.logits, logits, atol=1e-5, rtol=1e-5)
    assert isinstance(output.past_key_values, hf_code.TnllmState) and output.past_key_values.get_seq_length() == 22
    assert torch.allclose(more.logits[:, 0], ours.step(tokens[:, 0], state), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("every", [0, 2])
def test_padding_on_either_side_and_in_between(hf_code, every):
    _, model = hub_pair(hf_code, softmax_every=every)
    tokens = torch.randint(1, 97, (3, 9))
    masks = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0, 0, 0], [1, 0, 1, 1, 0, 1, 1, 1, 1]])
    more = torch.randint(1, 97, (3, 4))
    with torch.no_grad():
        output = model(tokens, attention_mask=masks, use_cache=True)
        first = output.logits
        later = model(
            more, attention_mask=torch.cat([masks, torch.ones(3, 4)], 1), past_key_values=output.past_key_values
        )
        for row in range(3):
            keep = masks[row].bool()
            alone = model(torch.cat([tokens[row][keep], more[row]])[None]).logits[0]
            assert torch.allclose(first[row][keep], alone[:-4], atol=1e-5)
            assert torch.allclose(later.logits[row], alone[-4:], atol=1e-5)
        with pytest.raises(ValueError, match="attention_mask must end in"):
            model(tokens, attention_mask=masks[:, :5])


@pytest.mark.parametrize("every", [0, 2])
def test_training_gives_our_gradients(hf_code, every):
    ours, theirs = hub_pair(hf_code, softmax_every=every)
    ours.requires_grad_(True)
    tokens = torch.randint(97, (2, 17))
    labels = torch.cat([tokens[:, 1:], torch.full((2, 1), -100)], 1)
    (ours.loss(tokens, labels) / 32).backward()
    theirs.train()
    theirs.gradient_checkpointing_enable()
    loss = theirs(tokens, labels=tokens).loss
    loss.backward()
    wanted = dict(ours.named_parameters())
    for name, parameter in theirs.model.named_parameters():
        assert torch.allclose(parameter.grad, wanted[name].grad, atol=1e-6, rtol=1e-4), name


def test_the_code_needs_no_tnllm():
    for name, text in hf_folder.code_files().items():
        assert not re.search(r"^\s*(from|import) (tnllm|pydantic)|torch\.library", text, re.M), name
        compile(text, name, "exec")


def test_a_folder_without_a_fast_tokenizer_says_how_to_read(tmp_path):
    """A Unigram model has no exact tokenizer.json: its card shows SentencePiece, and the example runs."""
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("the king and the queen of the river\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(tmp_path / "unigram"), vocab_size=24, model_type="unigram",
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    tokenizer = Tokenizer.load(tmp_path / "unigram.model")
    config = get_preset("tiny", **{**SMALL, "vocab_size": tokenizer.vocab_size})
    save_model(build_model(config, seed=0), tmp_path / "weights", tokenizer=tokenizer.path)
    report = convert(tmp_path / "weights", tmp_path / "hf", Options(to="hf", verify=False), print, lambda *_: None)
    assert any("no tokenizer.json" in note for note in report.notes) and not (tmp_path / "hf/tokenizer.json").exists()
    card = (tmp_path / "hf/README.md").read_text()
    assert "AutoTokenizer.from_pretrained" not in card and "SentencePieceProcessor" in card
    example = card.split("```python\n")[1].split("```")[0]
    result = subprocess.run([sys.executable, "-c", example], cwd=tmp_path / "hf", capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    (tmp_path / "weights/tokenizer.model").unlink()
    convert(tmp_path / "weights", tmp_path / "bare", Options(to="hf", verify=False), print, lambda *_: None)
    assert "This folder has no tokenizer" in (tmp_path / "bare/README.md").read_text()


def test_fast_tokenizers_read_as_their_originals(tmp_path):
    from tokenizers import Tokenizer as Fast

    official_files.write_tiktoken(tmp_path / "v3.tiktoken")
    for tokenizer in (Tokenizer.load(assets.tokenizer_model()), Tokenizer.load(tmp_path / "v3.tiktoken")):
        files, notes = tokenizer_files(tokenizer, {"add_bos_token": True})
        assert not notes
        fast = Fast.from_str(files["tokenizer.json"])
        for text in CHECK_TEXTS:
            ids = tokenizer.encode(text)
            assert fast.encode(text).ids == [tokenizer.bos_id, *ids]
            assert fast.decode(ids) == text
        config = json.loads(files["tokenizer_config.json"])
        assert fast.token_to_id(config["eos_token"]) == tokenizer.eos_id
        assert fast.token_to_id(config["pad_token"]) == tokenizer.pad_id


def test_chat_template(tmp_path):
    import jinja2

    files, _ = tokenizer_files(Tokenizer.load(assets.tokenizer_model()), {"chat_template": "It's {prompt}\n=> "})
    template = jinja2.Template(json.loads(files["tokenizer_config.json"])["chat_template"])
    talk = [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}, {"role": "user", "content": "C"}]
    text = template.render(messages=talk, eos_token="</s>")
    assert text.replace(BOUNDARY, "") == "It's A\n=> B</s>It's C\n=> "
    assert text.count(BOUNDARY) == 1 and f"=> {BOUNDARY}B" in text
