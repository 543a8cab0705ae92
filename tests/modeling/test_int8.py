"""int8 weights: against their own dequantised matrix, by one row and by many, and what they cost a trained model."""

import json
import lzma
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from tests.small_models import small_model
from tnllm import assets
from tnllm.errors import RunError, UserError
from tnllm.generation.context import weights_hash
from tnllm.generation.decoder import generate_text
from tnllm.generation.loading import load, pick_dtype, with_adapter
from tnllm.modeling.config import LoraConfig
from tnllm.modeling.cpu_step import cpu_step
from tnllm.modeling.int8 import Int8Embedding, Int8Linear
from tnllm.modeling.lora import add_lora, lora_layers, merge_lora, save_adapter
from tnllm.modeling.weights import SINGLE, load_model, save_model


# 64, 128 and a width that is padded.
@pytest.mark.parametrize("outputs", [192, 256, 100])
def test_a_product_is_that_of_the_rounded_matrix(outputs):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, 48, generator=generator)
    weight[3] = 0
    scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
    rounded = (weight / scale).round() * scale
    linear, x = Int8Linear(weight.shape, weight.device).copy_(weight), torch.randn(20, 48, generator=generator)
    # Rounding of float32 sums of 48 terms.
    for rows in 1, 3, 20:
        torch.testing.assert_close(linear(x[:rows]), x[:rows] @ rounded.T, rtol=1e-4, atol=1e-4)
    assert linear(x.view(4, 5, 48)).shape == (4, 5, outputs)
    ids = torch.tensor([[3, 99], [0, 64]])
    torch.testing.assert_close(Int8Embedding(weight.shape, weight.device).copy_(weight)(ids), rounded[ids])
    torch.testing.assert_close(linear.dequantized(), rounded)


def test_a_row_does_not_depend_on_the_others():
    weight, x = torch.randn(128, 64), torch.randn(4, 64)
    linear = Int8Linear(weight.shape, weight.device).copy_(weight)
    x[1] *= 1000
    assert torch.equal(linear(x)[0], linear(x[:1])[0])


@pytest.mark.parametrize(
    "form",
    [
        {},
        {"gate": "low-rank", "position": "lrpe-d"},
        {"norm": "rmsnorm"},
        {"softmax_every": 2, "qk_norm": True},
        {"kind": "transformer"},
    ],
)
def test_steps_equal_a_chunk(form):
    model = small_model(**form)
    model.quantize_int8()
    tokens = torch.randint(3, 352, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact, after = model(tokens)
        flat, plain = model.init_state(2), model.init_state(2)
        # Softmax layers are decoded by the modules.
        step = cpu_step(model, flat) or partial(model.step, state=flat)
        assert isinstance(step, partial) == bool(model.config.num_softmax)
        for index, column in enumerate(tokens.unbind(1)):
            # Rounding of float32 in 20 tokens, relative to the largest logit.
            for logits in step(column), model.step(column, plain):
                assert (logits - exact[:, index]).abs().max() < 2e-5 * exact.abs().max()
    for ours, theirs in zip(flat.layers, after.layers, strict=True):
        ours = ours[:, :, : theirs.shape[2]]
        assert ours.dtype == torch.float32 and (ours - theirs).abs().max() < 2e-5 * theirs.abs().max()


def test_the_demo_model_keeps_its_bits_per_byte():
    exact, rounded = load(device="cpu"), load(device="cpu", dtype="int8")
    assert rounded.model.dtype_name == "int8" and exact.model.dtype_name == "float32"
    nats = {"float32": 0.0, "int8": 0.0}
    with lzma.open(assets.sample_corpus(), "rt", encoding="utf-8") as lines:
        for _, line in zip(range(3), lines, strict=False):
            ids = torch.tensor([exact.encode(json.loads(line)["text"])[:500]])
            for ready in exact, rounded:
                logits = ready.model(ids)[0][0, :-1]
                nats[ready.model.dtype_name] += float(F.cross_entropy(logits, ids[0, 1:], reduction="sum"))
    # Half a percent, as promised in docs/generation.md; measured 0.07 %.
    assert math.isclose(nats["int8"], nats["float32"], rel_tol=0.005)
    assert nats["int8"] != nats["float32"]
    # A state of one is not for the other.
    assert weights_hash(exact.model) != weights_hash(rounded.model)
    assert generate_text(rounded.model, rounded.tokenizer, "Once upon", max_tokens=8, temperature=0)


@pytest.mark.parametrize("shards", [10**9, 20_000])
@pytest.mark.parametrize("form", [{}, {"norm": "rmsnorm"}, {"softmax_every": 2}, None])
def test_a_saved_model_is_the_same_model(tmp_path, form, shards):
    # The demo model's head is tied to its embedding.
    model = load_model(dtype=torch.float32) if form is None else small_model(**form)
    size = model.num_parameters
    save_model(model, tmp_path / "exact")
    model.quantize_int8()
    save_model(model, tmp_path / "rounded", shard_bytes=shards)
    # Rounded as it is read, as it was written, and widened again.
    as_read, as_written = load_model(tmp_path / "exact", dtype=torch.int8), load_model(tmp_path / "rounded")
    assert as_written.is_int8 and as_written.num_parameters == size
    assert weights_hash(model) == weights_hash(as_read) == weights_hash(as_written)
    for dtype in torch.float32, torch.bfloat16:
        wide = load_model(tmp_path / "rounded", dtype=dtype)
        assert wide.dtype == dtype and not wide.is_int8
        name = "layers.0.channel_mixer.l1.weight"
        torch.testing.assert_close(
            wide.get_parameter(name), as_read.blocks[0].channel_mixer.l1.dequantized().to(dtype), rtol=0, atol=0
        )


def test_damaged_int8_weights_are_refused(tmp_path):
    model = small_model()
    model.quantize_int8()
    save_model(model, tmp_path / "model")
    tensors = load_file(tmp_path / "model" / SINGLE)
    scale = tensors.pop("layers.0.channel_mixer.l1.scale")
    save_file(tensors, tmp_path / "model" / SINGLE)
    with pytest.raises(RunError, match=r"lacks 1 tensors, first 'layers\.0\.channel_mixer\.l1\.scale'"):
        load_model(tmp_path / "model")
    save_file({**tensors, "layers.0.channel_mixer.l1.scale": scale[1:].clone()}, tmp_path / "model" / SINGLE)
    with pytest.raises(RunError, match=r"config\.json says"):
        load_model(tmp_path / "model")


def test_an_adapter_is_merged_before_rounding_and_refused_beside(tmp_path):
    model = small_model(vocab_size=8192)
    save_model(model, tmp_path / "model", tokenizer=assets.demo_weights() / "tokenizer.model")
    add_lora(model, LoraConfig(rank=2))
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B.weight)
    save_adapter(model, tmp_path / "adapter")
    merge_lora(model)
    model.quantize_int8()
    merged = load(tmp_path / "model", "cpu", "int8", tmp_path / "adapter")
    for name, tensor in model.state_dict().items():
        # A matrix may be merged in another order of float32 sums: at most one step of 127.
        assert (merged.model.state_dict()[name].float() - tensor.float()).abs().max() <= 1
    with pytest.raises(UserError, match="adapters beside int8 weights"):
        with_adapter(merged, tmp_path / "adapter")


def test_int8_is_refused_on_a_gpu():
    with pytest.raises(UserError, match="--dtype int8 is for a CPU, and the device is cuda:0"):
        pick_dtype("int8", torch.device("cuda:0"))
    with pytest.raises(UserError, match="allowed: auto, float32, bfloat16, int8"):
        pick_dtype("int4", torch.device("cpu"))
