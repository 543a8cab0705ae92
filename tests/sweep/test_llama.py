"""transformers' Llama in a sweep: the same function as the project's baseline, on the same packed batches."""

from pathlib import Path

import pytest
import torch
from torch import nn

from tnllm.data.loader import IGNORE, Batch
from tnllm.errors import UserError
from tnllm.modeling.config import get_preset
from tnllm.modeling.model import LanguageModel, build_model
from tnllm.sweep.llama import document_mask, make_llama, summed_loss
from tnllm.training.config import load_recipe

SIZES = [
    "model.kind=transformer",
    "model.vocab_size=64",
    "model.model_dim=32",
    "model.num_layers=2",
    "model.glu_dim=48",
]


def copy_llama(llama: nn.Module, model: LanguageModel) -> None:
    """Give `model` the weights of the library's model."""
    weights = dict(llama.named_parameters())
    with torch.no_grad():
        model.embed_tokens.weight.copy_(weights["model.embed_tokens.weight"])
        model.final_norm.weight.copy_(weights["model.norm.weight"])  # type: ignore[operator, union-attr]
        for index, block in enumerate(model.blocks):
            theirs = {
                name.removeprefix(f"model.layers.{index}."): weight
                for name, weight in weights.items()
                if name.startswith(f"model.layers.{index}.")
            }
            ours = dict(block.named_parameters())
            ours["token_mixer.qkv_proj.weight"].copy_(
                torch.cat([theirs[f"self_attn.{part}_proj.weight"] for part in "qkv"])
            )
            ours["token_mixer.out_proj.weight"].copy_(theirs["self_attn.o_proj.weight"])
            ours["token_norm.weight"].copy_(theirs["input_layernorm.weight"])
            ours["channel_norm.weight"].copy_(theirs["post_attention_layernorm.weight"])
            for name, part in (("l1", "gate"), ("l2", "up"), ("l3", "down")):
                ours[f"channel_mixer.{name}.weight"].copy_(theirs[f"mlp.{part}_proj.weight"])


def packed_batch(length: int) -> Batch:
    """Two rows of `length`; the first holds documents of 5 and the rest, the second a single one."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 64, (1, 2 * length), generator=generator)
    labels = torch.randint(1, 64, (1, 2 * length), generator=generator)
    labels[0, 4] = IGNORE
    ends = [0, 5, length, 2 * length, 2 * length, 2 * length]
    return Batch(tokens, labels, torch.tensor(ends, dtype=torch.int32), 0, 2 * length - 1, length, 3)


def test_the_library_computes_the_loss_of_the_project() -> None:
    pytest.importorskip("transformers")
    sets = [*SIZES, "data.seq_len=16", "train.max_steps=1", "train.global_batch_tokens=32", "train.micro_batch_size=2"]
    config = load_recipe("tiny", sets)
    llama = make_llama(config.model, seed=0)
    model = build_model(config.model)
    copy_llama(llama, model)
    batch = packed_batch(16)
    theirs = summed_loss(llama, config.data.seq_len, torch.float32, torch.device("cpu"), compiled=False)(batch)
    ours = model.loss(batch.tokens, batch.labels, batch.cu_seqlens, longest=batch.longest)
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-4)
    apart = model.loss(batch.tokens.view(2, 16), batch.labels.view(2, 16))
    assert abs(apart.item() - ours.item()) > 1e-2, "the mask between documents changes nothing"


def test_documents_are_kept_apart() -> None:
    batch = packed_batch(8)
    assert batch.cu_seqlens is not None
    mask, positions = document_mask(batch.cu_seqlens, batch.tokens.view(2, 8))
    assert mask is not None and positions is not None
    assert positions.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2], [0, 1, 2, 3, 4, 5, 6, 7]]
    assert mask[0, 0, 6].tolist() == [False] * 5 + [True, True, False]
    assert mask[1, 0, 3].tolist() == [True] * 4 + [False] * 4
    assert document_mask(None, batch.tokens) == (None, None)


@pytest.mark.parametrize("change", [{"qk_norm": True}, {"scale_embedding": True}])
def test_what_llama_is_not_is_refused(change: dict[str, bool]) -> None:
    with pytest.raises(UserError, match="without qk_norm and scale_embedding"):
        make_llama(get_preset("tiny", kind="transformer", **change), 0)
    with pytest.raises(UserError, match=r"model\.kind transformer"):
        make_llama(get_preset("tiny"), 0)


@pytest.mark.slow
def test_a_sweep_trains_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    from tnllm.sweep.plan import read_plan
    from tnllm.sweep.run import read_rows, run_sweep

    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "small.yaml").write_text(
        "model: {preset: tiny, kind: transformer, vocab_size: 8192, model_dim: 32, num_layers: 1, glu_dim: 48}\n"
        "data: {seq_len: 32, val_fraction: 0.1}\n"
        "train: {max_steps: 6, global_batch_tokens: 256, micro_batch_size: 4, device: cpu}\n"
        "schedule: {warmup_steps: 2}\neval: {every_steps: 3, tokens: 500}\n"
    )
    (tmp_path / "plan.yaml").write_text("groups:\n  library: {recipe: small, trainer: llama}\n")
    (tmp_path / "corpus.txt").write_text("".join(f"a line of text, number {i * i}\n" for i in range(900)))
    plan = read_plan(tmp_path / "plan.yaml")
    assert run_sweep(plan, tmp_path / "out", 1, [f"data.path={tmp_path / 'corpus.txt'}"])
    (row,) = read_rows(tmp_path / "out")
    assert (row["status"], row["kind"], row["steps"]) == ("done", "llama", 6)
    assert 0 < row["val_loss"] < 10 and [point[0] for point in row["curve"]] == [3, 6]
