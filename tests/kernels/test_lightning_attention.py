"""The public operator on CPU: against the float64 definition, and what must hold between its own results."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tnllm.kernels.lightning_attention import lightning_attention, lightning_attention_step
from tnllm.kernels.lightning_attention.reference import quadratic, recurrent

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# float64 has 2^-53 = 1.1e-16; sums of a few hundred products of standard normal numbers leave 1e-13 at most.
EXACT = dict(rtol=1e-11, atol=1e-11)


def make(B, T, H, D, E, num_seqs=None, dtype=torch.float64, seed=0):
    """Inputs with one head that never forgets, one that forgets within a token, and some between."""
    rng = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(B, T, H, D, generator=rng, dtype=torch.float64) for _ in range(2))
    v = torch.randn(B, T, H, E, generator=rng, dtype=torch.float64)
    state = torch.randn(num_seqs or B, H, D, E, generator=rng, dtype=torch.float64)
    log_decay = -torch.tensor([0.0, 30.0, 0.84, 0.0039, 1e-5, 0.1])[:H]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return *(x.to(dtype) for x in (q, k, v)), log_decay, state.to(wide)


def all_results(function, q, k, v, log_decay, state, cu_seqlens=None):
    """o, final state and the gradients of q, k, v and the initial state for fixed random output gradients."""
    inputs = [x.detach().requires_grad_() for x in (q, k, v, state)]
    o, final = function(*inputs[:3], log_decay, inputs[3], cu_seqlens)
    rng = torch.Generator().manual_seed(1)
    do, dfinal = (torch.randn(x.shape, generator=rng, dtype=torch.float64).to(x.dtype) for x in (o, final))
    return o.detach(), final.detach(), *torch.autograd.grad((o, final), inputs, (do, dfinal))


def assert_all_close(ours, theirs, **tolerance):
    for name, a, b in zip(("o", "final", "dq", "dk", "dv", "dinitial"), ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **tolerance, msg=lambda m, name=name: f"{name}: {m}")


def test_the_two_definitions_agree():
    args = make(2, 37, 4, 5, 3)
    assert_all_close(all_results(recurrent, *args), all_results(quadratic, *args), **EXACT)
    cu_seqlens = torch.tensor([0, 0, 9, 10, 37], dtype=torch.int32)
    args = make(1, 37, 3, 4, 5, num_seqs=4)
    args = (*args, cu_seqlens)
    assert_all_close(all_results(recurrent, *args), all_results(quadratic, *args), **EXACT)


@pytest.mark.parametrize("T", [1, 2, 63, 64, 65, 127, 129, 200])
def test_forward_and_every_gradient_match_the_definition(T):
    args = make(2, T, 6, 8, 5)
    assert_all_close(all_results(lightning_attention, *args), all_results(quadratic, *args), **EXACT)


@pytest.mark.parametrize(
    ("T", "D", "E", "dtype", "tolerance"),
    [
        # float32 rounds at 6e-8 and sums of 10^4 terms in random order gather about 10^2 of that.
        (613, 128, 128, torch.float32, 1e-5),
        (200, 256, 128, torch.float32, 1e-5),
        # bf16 rounds the result itself at 2^-9 = 2e-3 relative; fp16 at 2^-12.
        (129, 64, 96, torch.bfloat16, 4e-3),
        (129, 64, 96, torch.float16, 5e-4),
    ],
)
def test_lower_precisions_are_as_near_as_their_format_allows(T, D, E, dtype, tolerance):
    args = make(1, T, 4, D, E, dtype=dtype)
    ours = all_results(lightning_attention, *args)
    exact = all_results(quadratic, *(x.double() if x is not args[3] else x for x in args))
    for a, b in zip(ours, exact, strict=True):
        assert (a.double() - b).norm() <= tolerance * b.norm()


@pytest.mark.slow
def test_gradcheck():
    q, k, v, g, state = make(1, 6, 3, 3, 2)
    cu_seqlens = torch.tensor([0, 4, 4, 6], dtype=torch.int32)
    states = torch.randn(3, 3, 3, 2, dtype=torch.float64)
    for s, cu in ((state, None), (states, cu_seqlens)):
        inputs = [x.requires_grad_() for x in (q, k, v, s)]
        assert torch.autograd.gradcheck(lambda q, k, v, s, cu=cu: lightning_attention(q, k, v, g, s, cu), inputs)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 90), min_size=1, max_size=4), st.integers(0, 2**16))
def test_any_split_of_the_tokens_gives_the_same_result(lengths, seed):
    q, k, v, g, state = make(2, sum(lengths), 4, 4, 3, seed=seed)
    whole, final = lightning_attention(q, k, v, g, state)
    pieces = []
    for qi, ki, vi in zip(*(x.split(lengths, 1) for x in (q, k, v)), strict=True):
        o, state = lightning_attention(qi, ki, vi, g, state)
        pieces.append(o)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, **EXACT)
    torch.testing.assert_close(state, final, **EXACT)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 150), min_size=1, max_size=6).filter(any), st.integers(0, 2**16))
def test_packed_equals_one_sequence_after_another(lengths, seed):
    q, k, v, g, state = make(1, sum(lengths), 3, 4, 3, num_seqs=len(lengths), seed=seed)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    ours = all_results(lightning_attention, q, k, v, g, state, cu_seqlens)
    assert_all_close(ours, all_results(quadratic, q, k, v, g, state, cu_seqlens), **EXACT)


def test_steps_equal_the_whole_and_update_the_state_in_place():
    q, k, v, g, state = make(2, 70, 6, 4, 3)
    whole, final = lightning_attention(q, k, v, g, state)
    slots = torch.full((4, 6, 4, 3), 7.0, dtype=torch.float64)
    slots[1:3] = state
    for t in range(70):
        o = lightning_attention_step(q[:, t], k[:, t], v[:, t], g, slots[1:3])
        torch.testing.assert_close(o, whole[:, t], **EXACT)
    torch.testing.assert_close(slots[1:3], final, **EXACT)
    assert (slots[[0, 3]] == 7).all()


@pytest.mark.parametrize("changed", [0, 63, 64, 100])
def test_no_output_depends_on_a_later_token(changed):
    q, k, v, g, state = make(1, 130, 4, 4, 3)  # head 0 has no decay at all
    before, _ = lightning_attention(q, k, v, g, state)
    for x in (q, k, v):
        x[:, changed] += 100
    after, _ = lightning_attention(q, k, v, g, state)
    assert torch.equal(before[:, :changed], after[:, :changed])
    assert (before[:, changed] != after[:, changed]).any()


def test_a_row_of_a_batch_equals_the_row_alone():
    q, k, v, g, state = make(3, 100, 4, 8, 8, dtype=torch.float32)
    o, final = lightning_attention(q, k, v, g, state)
    for b in range(3):
        alone, state_alone = lightning_attention(*(x[b : b + 1] for x in (q, k, v)), g, state[b : b + 1])
        torch.testing.assert_close(o[b : b + 1], alone)
        torch.testing.assert_close(final[b : b + 1], state_alone)


def test_inputs_may_be_slices_of_a_fused_projection():
    B, T, H, D = 2, 70, 3, 8
    fused = torch.randn(B, T, 4 * H * D, dtype=torch.float64, requires_grad=True)
    q, k, v, _ = (x.unflatten(-1, (H, D)) for x in fused.chunk(4, -1))
    g = -torch.rand(H)
    o, _ = lightning_attention(q, k, v, g)
    dense, _ = lightning_attention(*(x.contiguous() for x in (q, k, v)), g)
    torch.testing.assert_close(o, dense)
    do = torch.randn(B, H, T, D, dtype=torch.float64).transpose(1, 2)  # strided output gradients too
    (ours,) = torch.autograd.grad(o, fused, do, retain_graph=True)
    (theirs,) = torch.autograd.grad(dense, fused, do)
    torch.testing.assert_close(ours, theirs)


def test_no_initial_state_means_zeros_and_unused_results_need_no_gradient():
    q, k, v, g, state = make(2, 70, 3, 4, 3)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    zeros = torch.zeros_like(state)
    for pick in (0, 1):
        none = lightning_attention(q, k, v, g)[pick]
        given_zeros = lightning_attention(q, k, v, g, zeros)[pick]
        torch.testing.assert_close(none, given_zeros)
        ours = torch.autograd.grad(none.sum(), inputs, allow_unused=True)
        theirs = torch.autograd.grad(given_zeros.sum(), inputs, allow_unused=True)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)


def test_the_final_state_may_be_left_out():
    q, k, v, g, state = make(1, 9, 3, 4, 3)
    inputs = [x.requires_grad_() for x in (q, k, v, state)]
    whole, _ = lightning_attention(q, k, v, g, state)
    o, none = lightning_attention(q, k, v, g, state, need_state=False)
    assert none.numel() == 0
    ours, theirs = (torch.autograd.grad(x.square().sum(), inputs) for x in (o, whole))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
    op = torch.ops.tnllm.lightning_attention.default
    torch.library.opcheck(op, (q, k, v, g, state, None, False))


@pytest.mark.slow
def test_opcheck():
    q, k, v, g, state = make(1, 9, 3, 4, 3, num_seqs=2)
    cu_seqlens = torch.tensor([0, 4, 9], dtype=torch.int32)
    q, k, v, state = (x.requires_grad_() for x in (q, k, v, state))
    ops = torch.ops.tnllm
    for s, cu in ((None, None), (state, cu_seqlens), (None, cu_seqlens)):
        torch.library.opcheck(ops.lightning_attention.default, (q, k, v, g, s, cu))
        dfinal = torch.randn(1 if cu is None else 2, 3, 4, 3, dtype=torch.float64)
        for d in (None, dfinal):
            args = (torch.randn_like(v), d, q, k, v, g, s, cu)
            torch.library.opcheck(
                ops.lightning_attention_backward.default, args, test_utils=("test_schema", "test_faketensor")
            )
    with torch.no_grad():
        step = (q[0, :2], k[0, :2], v[0, :2], g, state.detach())
        torch.library.opcheck(ops.lightning_attention_step.default, step)


@pytest.mark.slow
def test_compiles_whole_with_one_graph_for_all_lengths():
    g = -torch.rand(3)

    def loss(q, k, v, state):
        o, final = lightning_attention(torch.nn.functional.silu(q), k, v, g, state)
        return o.square().sum() + final.sum()

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for T in (5, 64, 131):
        q, k, v, _, state = make(2, T, 3, 4, 3)
        inputs = [x.requires_grad_() for x in (q, k, v, state)]
        for x in inputs[:3]:
            torch._dynamo.mark_dynamic(x, 1)
        ours = torch.autograd.grad(compiled(*inputs), inputs)
        for a, b in zip(ours, torch.autograd.grad(loss(*inputs), inputs), strict=True):
            torch.testing.assert_close(a, b, **EXACT)
    assert counter.frame_count == 1


def _bad_calls():
    q, k, v, g, state = make(1, 4, 2, 4, 3)
    cu = torch.tensor([0, 4], dtype=torch.int32)
    yield "k of another length", (q, k[:, :3], v, g), "q and k must be"
    yield "v without heads", (q, k, v[..., 0], g), "q and k must be"
    yield "one decay for all", (q, k, v, g[:1]), r"log_decay must be float32 \[H\]"
    yield "bf16 decay", (q, k, v, g.bfloat16()), r"log_decay must be float32 \[H\]"
    yield "growing", (q, k, v, -g - 1 + 2), "log_decay must be finite and <= 0"
    for value in ("nan", "-inf", "inf"):
        yield value, (q, k, v, torch.full_like(g, float(value))), "log_decay must be finite and <= 0"
    yield "no tokens", (q[:, :0], k[:, :0], v[:, :0], g), "at least 1"
    yield "mixed dtypes", (q, k, v.float(), g), "share one floating dtype"
    yield "integers", (q.int(), k.int(), v.int(), g), "share one floating dtype"
    yield "narrow state", (q, k, v, g, state.float()), r"initial_state must be torch.float64 \[1, 2, 4, 3\]"
    yield "state of two", (q, k, v, g, state.repeat(2, 1, 1, 1)), r"initial_state must be"
    yield "wide cu_seqlens", (q, k, v, g, None, cu.long()), "cu_seqlens must be int32"
    yield "falling cu_seqlens", (q, k, v, g, None, cu.new_tensor([0, 3, 2, 4])), "rise from 0 to T"
    yield "short cu_seqlens", (q, k, v, g, None, cu.new_tensor([0, 3])), "rise from 0 to T"
    two = (x.repeat(2, 1, 1, 1) for x in (q, k, v))
    yield "packed batch", (*two, g, None, cu), "the batch 1"


@pytest.mark.parametrize(("args", "message"), [pytest.param(*c[1:], id=c[0]) for c in _bad_calls()])
def test_arguments_that_do_not_fit_are_one_clear_line(args, message):
    with pytest.raises(ValueError, match=message) as error:
        lightning_attention(*args)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", ["nan", "-inf", "1.0"])
def test_a_step_refuses_decays_that_do_not_fit(value):
    q, k, v, g, state = make(1, 4, 2, 4, 3)
    before = state.clone()
    with pytest.raises(ValueError, match="log_decay must be finite and <= 0"):
        lightning_attention_step(q[:, 0], k[:, 0], v[:, 0], torch.full_like(g, float(value)), state)
    assert torch.equal(state, before)
