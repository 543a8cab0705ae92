"""Fine-tuning: from given weights, on answers, with and without an adapter; resumed exactly; published."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.training.sections import loaders_of, memory_of, model_of, tokenizer_of
from tnllm.data.instruct_loader import InstructLoader
from tnllm.errors import UserError
from tnllm.modeling import load_model
from tnllm.modeling.flops import lora_parameters
from tnllm.modeling.lora import merge_adapter
from tnllm.parallel.mesh import close_mesh
from tnllm.parallel.parallelize import parallelize
from tnllm.training.config import load_recipe
from tnllm.training.launch import config_mesh
from tnllm.training.loop import train
from tnllm.training.run_model import make_meta_model, weights_dtype

CHAT = """
tokenizer: {path: TOKENIZER}
data: {format: chat, path: DATA, seq_len: 64, val_fraction: 0.1, chat_template: "Q: {prompt} A: "}
optimizer: {learning_rate: 1e-2}
schedule: {warmup_steps: 2, horizon_steps: 12}
train: {init: BASE, max_steps: 12, global_batch_tokens: 256, micro_batch_size: 2, device: cpu}
eval: {every_steps: 6, sample_prompts: the quick, sample_tokens: 4}
log: {every_steps: 1}
checkpoint: {every_steps: 4, async_save: false}
"""


@pytest.fixture(scope="module")
def base(corpus, tmp_path_factory):
    """A small model, trained a little on text."""
    folder = tmp_path_factory.mktemp("base")
    from tests.training.conftest import RECIPE

    text = RECIPE.replace("CORPUS", str(corpus[0])).replace("TOKENIZER", str(corpus[1]))
    (folder / "base.yaml").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(folder))
        train(load_recipe(str(folder / "base.yaml"), ["eval.every_steps=0"]), folder / "run")
    return folder / "run"


@pytest.fixture
def chat(base, corpus, tmp_path):
    """A recipe for twenty conversations over the corpus' words."""
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "seven", "wizards"]
    with open(tmp_path / "talk.jsonl", "w") as file:
        for i in range(20):
            record = {"instruction": f"{words[i % 11]} {words[i // 2]}", "output": " ".join(words[i % 7 : i % 7 + 3])}
            file.write(json.dumps(record) + "\n")
    path = tmp_path / "chat.yaml"
    names = {"TOKENIZER": corpus[1], "DATA": tmp_path / "talk.jsonl", "BASE": base}
    text = CHAT
    for name, value in names.items():
        text = text.replace(name, str(value))
    path.write_text(text)
    return str(path)


def rows(run, key="loss"):
    return [row[key] for line in (run / "metrics.jsonl").read_text().splitlines() if key in (row := json.loads(line))]


@pytest.mark.slow
@pytest.mark.parametrize("sets", [[], ["lora.rank=8"]], ids=["all", "adapter"])
def test_a_run_learns_resumes_exactly_and_is_published(chat, base, tmp_path, sets, capfd):
    train(load_recipe(chat, sets), tmp_path / "uninterrupted")
    shown = capfd.readouterr().err
    assert "20 conversations (0 cut to data.seq_len, 0 more without an answer): 18 to learn from" in shown
    assert "sample at step 12: the quick -> " in shown and "generate --model" in shown and "--chat" in shown
    losses = rows(tmp_path / "uninterrupted")
    assert losses[-1] < losses[0] - 0.2 and len(rows(tmp_path / "uninterrupted", "val_loss")) == 2
    train(load_recipe(chat, [*sets, "train.max_steps=5"]), tmp_path / "parts")
    train(load_recipe(chat, sets), tmp_path / "parts", resume="auto")
    assert rows(tmp_path / "parts") == losses
    published, step = (
        load_model(tmp_path / "uninterrupted"),
        load_model(tmp_path / "uninterrupted/checkpoints/step-00000012"),
    )
    for name, value in published.state_dict().items():
        assert torch.equal(value, step.state_dict()[name]), name
    settings = json.loads((tmp_path / "uninterrupted/weights/generation_config.json").read_text())
    assert settings["chat_template"] == "Q: {prompt} A: "
    assert (tmp_path / "uninterrupted/adapter").is_dir() == bool(sets)
    start = load_model(base)
    assert not all(torch.equal(a, b) for a, b in zip(start.parameters(), published.parameters(), strict=True))
    if sets:
        merge_adapter(start, tmp_path / "uninterrupted/adapter")
        for name, value in published.state_dict().items():
            torch.testing.assert_close(value, start.state_dict()[name], rtol=1e-6, atol=1e-7)
        assert torch.equal(start.embed_tokens.weight, published.embed_tokens.weight)


def test_the_first_loss_is_the_given_weights(chat, base):
    config = load_recipe(chat)
    loader, _ = loaders_of(config)
    batch = loader.batch(0, 4)
    mine = model_of(config)
    assert config.model == load_model(base).config
    assert all(parameter.requires_grad for parameter in mine.parameters())
    given = load_model(base).loss(batch.tokens, batch.labels, batch.cu_seqlens)
    assert float(mine.loss(batch.tokens, batch.labels, batch.cu_seqlens).detach()) == float(given)


def test_text_can_be_continued_from_weights_too(recipe, base, tmp_path):
    config = load_recipe(str(recipe), [f"train.init={base}", "train.max_steps=1", "eval.every_steps=0"])
    train(config, tmp_path / "run")
    assert rows(tmp_path / "run")[0] == pytest.approx(rows(base)[-1], rel=0.2)


def test_a_resumed_run_keeps_its_adapter(chat, tmp_path):
    train(load_recipe(chat, ["lora.rank=4", "train.max_steps=1"]), tmp_path / "run")
    for sets in (["lora.rank=2"], []):
        with pytest.raises(UserError, match="lora is not as in step-00000001; a resumed run keeps its adapter"):
            train(load_recipe(chat, sets), tmp_path / "run", resume="auto")


def test_the_tokenizer_and_template_come_with_the_weights(chat, base, tmp_path):
    shutil.copytree(base / "weights", tmp_path / "weights")
    settings = json.loads((tmp_path / "weights/generation_config.json").read_text())
    (tmp_path / "weights/generation_config.json").write_text(json.dumps({**settings, "chat_template": "<{prompt}>"}))
    sets = [f"train.init={tmp_path / 'weights'}", "tokenizer.path=null", "data.chat_template=null"]
    config = load_recipe(chat, sets)
    tokenizer = tokenizer_of(config)
    assert tokenizer.path == tmp_path / "weights/tokenizer.model"
    loader, _ = loaders_of(config)
    assert tokenizer.decode(loader.sources[0].ids[0].tolist()).lstrip().startswith("<")


def test_conversations_to_validate_on(chat, tmp_path):
    lines = (tmp_path / "talk.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "val.jsonl").write_text("".join(lines[:3]))
    config = load_recipe(chat, [f"data.val_path={tmp_path / 'val.jsonl'}"])
    loader, validation = loaders_of(config)
    assert sum(len(source.ids) for source in loader.sources) == len(lines)
    assert [len(source.ids) for source in validation.sources] == [3]


def test_conversations_are_mixed_by_weight(chat, tmp_path):
    lines = (tmp_path / "talk.jsonl").read_text().splitlines(keepends=True)
    for name, part in (("a", lines[:10]), ("b", lines[10:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(part))

    def shares(first: str, second: str) -> tuple[InstructLoader, list[int]]:
        sources = f"{{path: {tmp_path}/a.jsonl{first}}}, {{path: {tmp_path}/b.jsonl{second}}}"
        config = load_recipe(chat, [f"data.path=[{sources}]", "data.val_fraction=0"])
        loader, _ = loaders_of(config)
        return loader, [int(loader._items(sample)[0] is loader.sources[-1]) for sample in range(400)]

    loader, drawn = shares(", weight: 3", ", weight: 1")
    assert drawn.count(0) == 300
    # Each source has its own passes: every row of it comes once before any comes twice.
    for index, rows in enumerate(loader._rows):
        nth = [tuple(loader._items(i)[1]) for i in range(400) if drawn[i] == index]
        assert sorted(nth[: len(rows)]) == sorted(map(tuple, rows)) == sorted(nth[len(rows) : 2 * len(rows)])
    # Without a weight: its share of the tokens, beside which 1 is little.
    assert shares(", weight: 1", "")[1].count(1) > 390
    assert len(shares("", "")[0].sources) == 1


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (
            ["train.init=/no/such"],
            "train.init: model '/no/such' is not a folder; give a run folder, a weights folder or hf://ORG/NAME (--set)",
        ),
        (["model.num_layers=3"], "but the weights of train.init"),
        (["lora.rank=4", "train.weights=bf16"], "cannot be combined with lora"),
        (
            ["lora.rank=4", "parallel.tensor=2"],
            "parallel.tensor is 2, but an adapter's matrices",
        ),
        (["data.packing=concat"], "data.packing concat cannot be combined with data.format chat"),
        (["lora.targets=[qkv]"], "lora.targets.0 is 'qkv': input should be 'qkvu_proj'"),
        (["data.path=/no/such.jsonl"], "no such file or folder: /no/such.jsonl"),
        (["data.chat_template=Hello"], "it must hold {prompt} once"),
    ],
)
def test_bad_input_is_one_line(chat, tmp_path, sets, message):
    with pytest.raises(UserError) as error:
        train(load_recipe(chat, sets), tmp_path / "run")
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_an_adapter_saves_memory(chat):
    config, small = load_recipe(chat), load_recipe(chat, ["lora.rank=4"])
    model = model_of(small, low=True)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert lora_parameters(small.model, small.lora) == trained
    wide, narrow = (memory_of(c, low_precision=True) for c in (config, small))
    assert narrow.optimizer == 8 * trained < wide.optimizer
    frozen = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
    assert narrow.weights - 4 * trained == pytest.approx(frozen, rel=0.01)


@pytest.mark.parametrize("axes", ["replicate=2", "shard=4", "shard=2 sequence=2"])
def test_memory_of_a_rank_is_what_it_holds(axes):
    mesh = [f"parallel.{axis}" for axis in axes.split()]
    batch = ["data.seq_len=64", "train.global_batch_tokens=4096", "train.micro_batch_size=1"]
    config = load_recipe("tiny", [*mesh, *batch, "lora.rank=16", "train.dtype=bf16"])
    mesh = config_mesh(config.parallel, "cpu", fake=config.parallel.num_ranks)
    sharded = parallelize(
        make_meta_model(config.model, config.lora, weights_dtype(config.train, config.lora, low=True)), mesh
    )
    sharded.locate_shards()
    close_mesh(mesh)
    sizes = [(p.requires_grad, p.numel() * p.element_size()) for p in sharded.parameters()]
    trained = sum(size for learned, size in sizes if learned)
    memory = memory_of(config, low_precision=True)
    # Rows do not divide evenly, and theta is unsharded and fp32 everywhere.
    assert memory.gradients == pytest.approx(trained, rel=0.01) and memory.optimizer == 2 * memory.gradients
    assert memory.weights == pytest.approx(sum(size for _, size in sizes), rel=0.01)


@pytest.mark.slow
def test_two_ranks_start_from_the_same_weights(chat, tmp_path):
    """As typed, in processes of their own: the losses of one process, but for the order of fp32 sums."""
    sets = ["train.max_steps=2", "eval.every_steps=0", "eval.sample_prompts=[]"]
    train(load_recipe(chat, sets), tmp_path / "one")
    command = [sys.executable, "-m", "tnllm", "train", chat, "--nproc", "2", "--out", str(tmp_path / "two")]
    command += [part for item in sets for part in ("--set", item)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("20 conversations (0 cut") == 1
    assert rows(tmp_path / "two") == pytest.approx(rows(tmp_path / "one"), rel=1e-5)
