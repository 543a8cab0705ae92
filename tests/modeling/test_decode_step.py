"""The persistent decode kernels against the model's own step: one program in Triton's interpreter, all on a GPU."""

import pytest
import torch

from tnllm.kernels.decode_step.narrow import NarrowDecodeStep, chunks, fits
from tnllm.kernels.decode_step.wide import MAX_BATCH, WideDecodeStep
from tnllm.modeling.config import ModelConfig
from tnllm.modeling.decode_step import persistent_step
from tnllm.modeling.model import build_model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def model_of(**changes):
    sizes = {"vocab_size": 101, "num_layers": 2, "model_dim": 96, "num_heads": 3, "glu_dim": 72}
    model = build_model(ModelConfig(**(sizes | changes)), DEVICE, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)  # large enough for every part to matter
    return model


@torch.no_grad()
def gaps(model, batch, narrow, steps=2):
    """Largest differences of logits and of states over a few steps after some text. Checks positions and the argmax."""
    vocab = model.config.vocab_size
    _, state = model(torch.randint(0, vocab, (batch, 9), device=DEVICE))
    mine = state.clone()
    step = persistent_step(model, mine, max_batch=8, narrow=narrow)
    assert type(step) is (NarrowDecodeStep if narrow and batch == 1 else WideDecodeStep)
    worst = 0.0
    for _ in range(steps):
        tokens = torch.randint(0, vocab, (batch,), device=DEVICE)
        logits = model.step(tokens, state)
        step.tokens.copy_(tokens)
        step()
        worst = max(worst, float((step.logits - logits).abs().max() / logits.std()))
        top_logit, top_token = step.logits.max(dim=-1)
        assert torch.equal(step.tokens, top_token) and torch.equal(step.top_logit, top_logit)
    assert torch.equal(state.position, mine.position)
    pairs = zip(state.layers, mine.layers, strict=True)
    return worst, max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)


# fp32 sums of up to a few thousand terms in another order.
LIMIT = 2e-5


each_kernel = pytest.mark.parametrize("narrow", [True, False], ids=["narrow", "wide"])


@pytest.mark.slow
@pytest.mark.usefixtures("poisoned_memory")
@each_kernel
@pytest.mark.parametrize(
    ("batch", "changes"),
    [
        (1, {}),
        (1, {"glu_activation": "silu", "value_activation": "silu", "glu_dim": 600}),
        (3, {"scale_embedding": False, "glu_activation": "silu", "value_activation": "silu"}),
        (1, {"position": "lrpe-d", "activation": "none", "model_dim": 64, "num_heads": 1, "tie_embeddings": False}),
        (1, {"model_dim": 520, "num_heads": 5, "num_layers": 1}),
    ],
)
def test_one_kernel_equals_the_model(batch, changes, narrow):
    logits, states = gaps(model_of(**changes), batch, narrow)
    assert logits < LIMIT and states < LIMIT


@pytest.mark.slow
@each_kernel
@torch.no_grad()
def test_the_argmax_is_a_token_that_may_be_chosen(narrow):
    model = model_of()
    with torch.no_grad():
        model.head_weight[90:] = 40 * model.head_weight[7]  # far ahead, but padding of the vocabulary
        model.head_weight[[20, 60]] = 5 * model.head_weight[7]  # equal ones: the first is taken
    state = model.init_state(1)
    step = persistent_step(model, state, num_choices=90, narrow=narrow)
    step.tokens.fill_(3)
    for _ in range(4):
        step()
        expected = step.logits[0, :90].argmax()
        assert int(step.tokens) == int(expected) and float(step.top_logit) == float(step.logits[0, expected])
    assert torch.isfinite(step.top_logit).all()
    model.head_weight[41] = torch.nan
    step()
    assert int(step.tokens) == 41 and step.top_logit.isnan().all()


def test_the_narrow_kernel_is_for_widths_that_fit_into_registers():
    assert [fits(width, 2) for width in (96, 1024, 2048, 2560, 4096)] == [True, True, True, False, False]
    assert chunks(1024, 2) == (4, 1) and chunks(2048, 2) == (4, 2)
    for width, expected in ((1024, NarrowDecodeStep), (1280, WideDecodeStep)):  # fp32: half as wide
        model = model_of(model_dim=width, num_heads=8, num_layers=1)
        assert type(persistent_step(model, model.init_state(1))) is expected


def test_other_models_and_large_batches_have_none():
    for changes in (
        {"gate": "none"},
        {"norm": "rmsnorm"},
        {"norm_position": "gate"},
        {"norm_position": "output"},
        {"position": "ape"},
        {"activation": "relu"},
    ):
        model = model_of(**changes)
        assert persistent_step(model, model.init_state(1)) is None
    model = model_of()
    assert persistent_step(model, model.init_state(1)) is not None
    assert persistent_step(model, model.init_state(MAX_BATCH + 1)) is None
    model.layers[1].channel_mixer.l1 = torch.nn.Sequential(model.layers[1].channel_mixer.l1)
    assert persistent_step(model, model.init_state(1)) is None


@pytest.mark.gpu
@each_kernel
@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("width", [1024, 2048])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_large_on_gpu(batch, width, dtype, narrow):
    sizes = {"model_dim": width, "num_heads": width // 128, "glu_dim": width * 11 // 4}
    model = model_of(vocab_size=5003, num_layers=6, **sizes).to(dtype)
    # bf16: the model rounds every activation to 8 bits, the kernel none.
    limit = 2e-4 if dtype == torch.float32 else 0.2
    logits, states = gaps(model, batch, narrow and fits(width, dtype.itemsize), steps=20)
    assert logits < limit and states < limit
