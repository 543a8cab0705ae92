"""The softmax baseline on packed rows, and its normalised queries and keys."""

import pytest
import torch

from tnllm import assets
from tnllm.convert.llama import config_values
from tnllm.data.encode import Options
from tnllm.data.loader import Loader, Source
from tnllm.data.shards import TokenStream
from tnllm.data.tokenize import SAMPLE, prepare
from tnllm.errors import UserError
from tnllm.modeling.config import get_preset
from tnllm.modeling.flops import count_parameters
from tnllm.modeling.model import build_model
from tnllm.modeling.softmax_attention import softmax_attention
from tnllm.modeling.transformer import rotary
from tnllm.tokenizer import Tokenizer

SMALL = {"kind": "transformer", "num_layers": 2, "model_dim": 64, "num_heads": 2, "glu_dim": 96}


@pytest.fixture(scope="module")
def stream() -> TokenStream:
    tokenizer = Tokenizer.load(assets.tokenizer_model(None))
    return TokenStream.open(prepare(SAMPLE, tokenizer, options=Options(val_fraction=0.01)), "train")


@pytest.mark.slow
def test_trimmed_batch_has_the_same_loss_and_gradients(stream: TokenStream) -> None:
    loader = Loader([Source(stream)], seq_len=128, batch_size=4, seed=3)
    batch = loader.batch(0, 4)
    trimmed = batch.trimmed()
    assert batch.cu_seqlens is not None and trimmed.cu_seqlens is not None
    assert batch.num_sequences == int((batch.cu_seqlens.diff() > 0).sum())
    assert int(batch.cu_seqlens.diff().max()) <= batch.longest == 128
    assert (
        trimmed.cu_seqlens[-1] == batch.cu_seqlens[-1] and (trimmed.cu_seqlens.diff() > 0).sum() == batch.num_sequences
    )
    model = build_model(get_preset("tiny", **SMALL), dtype=torch.float64, seed=1)
    results = []
    for item in (batch, trimmed):
        model.zero_grad()
        loss = model.loss(item.tokens, item.labels, item.cu_seqlens, longest=item.longest)
        loss.backward()
        results.append((loss.item(), [p.grad.clone() for p in model.parameters()]))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))


@pytest.mark.gpu
def test_longest_changes_nothing_on_a_gpu(stream: TokenStream) -> None:
    batch = Loader([Source(stream)], seq_len=512, batch_size=8, seed=3).batch(0, 8).to(torch.device("cuda"))
    trimmed = batch.trimmed()
    model = build_model(get_preset("tiny", **SMALL), "cuda", torch.bfloat16, seed=1)
    whole = model.loss(batch.tokens, batch.labels, batch.cu_seqlens)
    assert torch.equal(whole, model.loss(trimmed.tokens, trimmed.labels, trimmed.cu_seqlens, longest=trimmed.longest))


def test_qk_norm_bounds_scores_and_is_the_same_in_decoding() -> None:
    config = get_preset("tiny", qk_norm=True, **SMALL)
    model = build_model(config, dtype=torch.float64, seed=1)
    assert sum(p.numel() for p in model.parameters()) == count_parameters(config)
    tokens = torch.randint(0, config.vocab_size, (2, 9))
    logits, _ = model(tokens)
    state = model.init_state(2)
    steps = torch.stack([model.step(tokens[:, i], state) for i in range(9)], dim=1)
    torch.testing.assert_close(steps, logits, rtol=1e-9, atol=1e-9)
    mixer = model.blocks[0].token_mixer
    q, k, _ = mixer.project(1000 * torch.randn(2, 9, 64, dtype=torch.float64), torch.arange(9).expand(2, 9))
    assert q.square().mean(-1).allclose(torch.ones(2, 9, 2, dtype=torch.float64))
    assert k.square().mean(-1).allclose(torch.ones(2, 9, 2, dtype=torch.float64))


def test_qk_norm_is_for_softmax_attention() -> None:
    with pytest.raises(UserError, match="qk_norm does not apply to kind transnormer"):
        get_preset("tiny", qk_norm=True)


SCALED = [
    {"rope_scaling": "linear", "rope_factor": 4.0},
    {"rope_scaling": "yarn", "rope_factor": 8.0, "rope_length": 300},
    # Every channel turns more than 32 times within the length of training, or less than once.
    {"rope_scaling": "yarn", "rope_factor": 2.5, "rope_length": 2**22},
    {"rope_scaling": "yarn", "rope_factor": 2.5, "rope_length": 8},
    {"rope_scaling": "yarn", "rope_factor": 1.0},
]


@pytest.mark.parametrize("scaling", SCALED)
def test_scaled_rotary_positions_are_those_of_transformers(scaling: dict) -> None:
    rope = pytest.importorskip("transformers.modeling_rope_utils")
    transformers = pytest.importorskip("transformers")
    config = get_preset("tiny", **{**SMALL, "num_heads": 1}, **scaling)
    values = config_values(config, torch.float32, {}, max_position=config.rope_length)
    keys = {
        key: values[key] for key in ("hidden_size", "num_attention_heads", "head_dim", "rope_theta", "rope_scaling")
    }
    library = transformers.LlamaConfig(max_position_embeddings=values["max_position_embeddings"], **keys)
    expected, factor = rope.ROPE_INIT_FUNCTIONS[config.rope_scaling](library, torch.device("cpu"))
    turn, scale = rotary(config, torch.device("cpu"))
    # fp32 powers, computed in another order.
    torch.testing.assert_close(turn, expected, rtol=2e-6, atol=0)
    assert scale == pytest.approx(factor)


@pytest.mark.parametrize("scaling", SCALED[:2])
def test_scaled_positions_are_the_same_in_decoding(scaling: dict) -> None:
    model = build_model(get_preset("tiny", **SMALL, **scaling), dtype=torch.float64, seed=1)
    tokens = torch.randint(0, 8192, (2, 9), generator=torch.Generator().manual_seed(1))
    logits, _ = model(tokens)
    state = model.init_state(2)
    steps = torch.stack([model.step(tokens[:, i], state) for i in range(9)], dim=1)
    torch.testing.assert_close(steps, logits, rtol=1e-9, atol=1e-9)
    _, half = model(tokens[:, :4])
    torch.testing.assert_close(model(tokens[:, 4:], half)[0], logits[:, 4:], rtol=1e-9, atol=1e-9)
    plain = build_model(get_preset("tiny", **SMALL), dtype=torch.float64, seed=1)
    assert not torch.allclose(plain(tokens)[0], logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"softmax_every": 2, "rope_scaling": "yarn"}, "rope_scaling applies to kind transformer alone"),
        ({**SMALL, "rope_factor": 4.0}, "rope_factor 4.0 needs rope_scaling: linear or yarn"),
        ({**SMALL, "rope_scaling": "yarn", "rope_base": 1.0}, "needs a rope_base above 1"),
        ({**SMALL, "rope_scaling": "ntk"}, "model.rope_scaling is 'ntk'"),
    ],
)
def test_scaling_that_would_do_nothing_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        get_preset("tiny", **changes)


@pytest.mark.parametrize("lengths", [[23], [9, 14]])
def test_a_long_chunk_after_a_cache_is_attended_in_parts(monkeypatch, lengths) -> None:
    """Whatever a part holds, down to one query, outputs and caches are those of one call."""
    rng = torch.Generator().manual_seed(0)
    heads, dim, before = 2, 8, 40

    def some(count: int) -> torch.Tensor:
        return torch.randn(1, count, heads, dim, generator=rng, dtype=torch.float64)

    total = sum(lengths)
    q, k, v = some(total), some(total), some(total)
    cache = torch.randn(len(lengths), 2, before, heads, dim, generator=rng, dtype=torch.float64)
    positions = torch.cat([torch.arange(before, before + length) for length in lengths])[None]
    packed = torch.tensor([0, *lengths]).cumsum(0) if len(lengths) > 1 else None
    whole = softmax_attention(q, k, v, positions, cache, packed)
    for limit in (1, 500):
        monkeypatch.setattr("tnllm.modeling.softmax_attention._MASK_ELEMENTS", limit)
        for ours, theirs in zip(softmax_attention(q, k, v, positions, cache, packed), whole, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
