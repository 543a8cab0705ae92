"""Other projects' signatures: against float64 definitions here, against the projects' own functions where they import."""

import subprocess
import sys

import pytest
import torch

from tnllm.kernels import drop_in
from tnllm.kernels.lightning_attention.reference import quadratic

B, T, H, D, E = 2, 70, 4, 32, 32
# float64 sums of a few hundred products: see test_lightning_attention.py.
EXACT = dict(rtol=1e-11, atol=1e-11)


def inputs(dtype=torch.float64, device="cpu", length=T, batch=B):
    rng = torch.Generator().manual_seed(0)
    shapes = [(batch, length, H, D), (batch, length, H, D), (batch, length, H, E), (batch, H, D, E)]
    q, k, v, state = (torch.randn(shape, generator=rng, dtype=torch.float64) for shape in shapes)
    return *(x.to(device, dtype) for x in (q, k, v)), state.to(
        device, torch.float64 if device == "cpu" else torch.float32
    )


SLOPES = torch.tensor([0.84, 0.0625, 0.0039, 0.0])


def heads_first(*tensors):
    return tuple(x.transpose(1, 2).contiguous() for x in tensors)


@pytest.mark.parametrize("state_v_first", [False, True])
@pytest.mark.parametrize("scale", [None, 1.0, 0.3])
def test_chunk_simple_gla(state_v_first, scale):
    q, k, v, state = inputs()
    given = state.mT.contiguous() if state_v_first else state
    o, final = drop_in.chunk_simple_gla(
        q, k, v, g_gamma=-SLOPES, scale=scale, initial_state=given, output_final_state=True, state_v_first=state_v_first
    )
    expected, expected_final = quadratic(q * (D**-0.5 if scale is None else scale), k, v, -SLOPES, state)
    torch.testing.assert_close(o, expected, **EXACT)
    torch.testing.assert_close(final.mT if state_v_first else final, expected_final, **EXACT)
    assert drop_in.chunk_simple_gla(q, k, v, g_gamma=-SLOPES)[1] is None


def test_packed_texts_with_offsets_of_any_integer_type():
    q, k, v, _ = inputs(batch=1)
    offsets = torch.tensor([0, 3, 3, T])
    o, final = drop_in.chunk_simple_gla(
        q, k, v, g_gamma=-SLOPES, scale=1.0, output_final_state=True, cu_seqlens=offsets
    )
    expected, states = quadratic(q, k, v, -SLOPES, cu_seqlens=offsets.int())
    torch.testing.assert_close(o, expected, **EXACT)
    torch.testing.assert_close(final, states, **EXACT)


def test_gates_by_token_are_refused():
    q, k, v, _ = inputs()
    with pytest.raises(ValueError, match="only constant decays"):
        drop_in.chunk_simple_gla(q, k, v, torch.zeros(B, T, H))
    with pytest.raises(ValueError, match="give g_gamma"):
        drop_in.chunk_simple_gla(q, k, v)


def test_chunk_lightning_attn_has_flas_decays():
    q, k, v, state = inputs()
    o, final = drop_in.chunk_lightning_attn(q, k, v, 3, 12, initial_state=state, output_final_state=True)
    # By hand: 8 / 4 heads, three quarters of the depth above layer 3 of 12.
    decay = torch.tensor([0.0, -1.5, -3.0, -4.5])
    expected, expected_final = quadratic(q * D**-0.5, k, v, decay, state)
    torch.testing.assert_close(o, expected, **EXACT)
    torch.testing.assert_close(final, expected_final, **EXACT)


@pytest.mark.parametrize("shape", [(H,), (H, 1, 1), (1, H, 1, 1)])
def test_the_official_function_and_its_gradients(shape):
    given = [x.requires_grad_() for x in heads_first(*inputs()[:3])]
    o = drop_in.lightning_attn_func(*given, SLOPES.view(shape))
    exact = [x.detach().transpose(1, 2).requires_grad_() for x in given]
    expected = quadratic(*exact, -SLOPES)[0]
    torch.testing.assert_close(o.transpose(1, 2), expected, **EXACT)
    grads = torch.autograd.grad(o.square().sum(), given)
    for ours, theirs in zip(grads, torch.autograd.grad(expected.square().sum(), exact), strict=True):
        torch.testing.assert_close(ours.transpose(1, 2), theirs, rtol=1e-9, atol=1e-9)


def test_vllms_prefill_continues_from_its_state():
    q, k, v, state = inputs()
    before = state.clone()
    o, states = drop_in.lightning_attention(*heads_first(q, k, v), SLOPES, kv_history=state)
    expected, final = quadratic(q, k, v, -SLOPES, state)
    torch.testing.assert_close(o.transpose(1, 2), expected, **EXACT)
    torch.testing.assert_close(states[:, :, -1], final, **EXACT)
    assert torch.equal(state, before)


def decode(device, dtype, tolerance):
    q, k, v, _ = inputs(dtype, device, length=1, batch=3)
    caches = torch.randn(5, H, D, E, device=device, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    before, slots = caches.clone(), torch.tensor([4, -1, 2], device=device)
    o = drop_in.linear_decode_forward_triton(*heads_first(q, k, v), caches, SLOPES.to(device), slots)
    rows, used = [4, 2], [0, 2]
    picked = (x[used].double().cpu() for x in (q, k, v))
    expected, final = quadratic(*picked, -SLOPES, before[rows].double().cpu())
    torch.testing.assert_close(o[used].double().cpu(), expected.flatten(1), **tolerance)
    torch.testing.assert_close(caches[rows].double().cpu(), final, **tolerance)
    assert torch.equal(caches[[0, 1, 3]], before[[0, 1, 3]]) and not o[1].any()


def test_vllms_step_updates_the_slots_and_skips_padding():
    decode("cpu", torch.float64, EXACT)


def test_only_what_attention_needs_is_imported():
    """The modules beyond torch's, which is what the import costs: no configuration, no model, no command line."""
    code = (
        "import sys, torch; before = set(sys.modules); import tnllm.kernels.drop_in; "
        "print(*sorted(name for name in set(sys.modules) - before))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert set(printed) == {
        "tnllm", "tnllm.kernels", "tnllm.kernels.drop_in", "tnllm.kernels.lightning_attention",
        "tnllm.kernels.lightning_attention.chunk", "tnllm.kernels.lightning_attention.op",
    }  # fmt: skip


# bf16 rounds the operands at 2^-9: two implementations differ by a few of these, of the largest result.
BF16 = 1.5e-2


def near(ours, theirs):
    assert (ours.double() - theirs.double()).norm() <= BF16 * theirs.double().norm()


@pytest.fixture
def cuda():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    return "cuda"


@pytest.mark.gpu
def test_the_step_on_a_gpu(cuda):
    # fp32 sums of 32 products, in another order.
    decode(cuda, torch.float32, dict(rtol=1e-5, atol=1e-5))


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
def test_equal_to_fla(cuda, packed):
    fla = pytest.importorskip("fla.ops.simple_gla")
    q, k, v, state = inputs(torch.bfloat16, cuda, length=513, batch=1)
    more = {"initial_state": state}
    if packed:
        more = {"cu_seqlens": torch.tensor([0, 100, 513], device=cuda), "initial_state": state.repeat(2, 1, 1, 1)}
    results = []
    for function in (drop_in.chunk_simple_gla, fla.chunk_simple_gla):
        given = [x.clone().requires_grad_() for x in (q, k, v)]
        o, final = function(*given, g_gamma=-SLOPES.to(cuda), output_final_state=True, **more)
        results.append((o, final, *torch.autograd.grad(o.float().square().sum(), given)))
    for ours, theirs in zip(*results, strict=True):
        near(ours, theirs)


@pytest.mark.gpu
def test_equal_to_flas_lightning_attention(cuda):
    fla = pytest.importorskip("fla.ops.lightning_attn")
    # 512: fla 0.6.0 weighs the absent rows of a short last chunk of 64 by exp(-decay * rows). That overflows in fast heads,
    # and times zero is NaN in its final state.
    q, k, v, state = inputs(torch.bfloat16, cuda, length=512, batch=1)
    for ours, theirs in zip(
        drop_in.chunk_lightning_attn(q, k, v, 3, 12, initial_state=state, output_final_state=True),
        fla.chunk_lightning_attn(q, k, v, 3, 12, initial_state=state, output_final_state=True),
        strict=True,
    ):
        near(ours, theirs)


@pytest.mark.gpu
def test_equal_to_the_official_function(cuda):
    official = pytest.importorskip("lightning_attn.ops")
    results = []
    for function in (drop_in.lightning_attn_func, official.lightning_attn_func):
        given = [x.requires_grad_() for x in heads_first(*inputs(torch.bfloat16, cuda, length=512)[:3])]
        o = function(*given, SLOPES.view(-1, 1, 1).to(cuda))
        results.append((o, *torch.autograd.grad(o.float().square().sum(), given)))
    for ours, theirs in zip(*results, strict=True):
        near(ours, theirs)


@pytest.mark.gpu
def test_equal_to_vllms(cuda):
    vllm = pytest.importorskip("vllm.model_executor.layers.lightning_attn")
    # Its blocks are of 256 tokens, its widths multiples of 64: two of ours beside each other.
    q, k, v = (torch.cat([x, x.flip(1)], -1) for x in inputs(torch.bfloat16, cuda, length=512, batch=1)[:3])
    slopes = SLOPES.to(cuda)
    ours, theirs = (f(*heads_first(q, k, v), slopes) for f in (drop_in.lightning_attention, vllm.lightning_attention))
    near(ours[0], theirs[0])
    near(ours[1][:, :, -1], theirs[1][:, :, -1])
    slots, step = torch.tensor([1], device=cuda), heads_first(q[:, :1], k[:, :1], v[:, :1])
    caches = [ours[1][:, :, -1].repeat(2, 1, 1, 1) for _ in range(2)]
    functions = (drop_in.linear_decode_forward_triton, vllm.linear_decode_forward_triton)
    ours, theirs = (f(*step, cache, slopes, slots) for f, cache in zip(functions, caches, strict=True))
    near(ours, theirs)
    near(*caches)
