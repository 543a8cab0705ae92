"""The Triton kernels against the float64 chunked form: small odd shapes under Triton's interpreter on CPU
(GPU: the same ones compiled), large ones on a GPU only. Memory that no kernel wrote is NaN."""

from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tnllm.kernels.lightning_attention import chunk, lightning_attention, lightning_attention_step
from tnllm.kernels.lightning_attention.op import HEAD_DIMS
from tnllm.kernels.lightning_attention.reference import quadratic

launch = pytest.importorskip("tnllm.kernels.lightning_attention.launch")
step = pytest.importorskip("tnllm.kernels.lightning_attention.step")

pytestmark = pytest.mark.usefixtures("poisoned_memory")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Relative root-mean-square error. fp32: three tf32 products leave 1e-6. bf16 and fp16: the result is rounded
# to 8 and 11 bits (1.7e-3 and 2e-4 rms), as are the scores and the state on their way into the tensor cores,
# at random.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}


def make(B, T, H, D, E, dtype, lengths=None, with_state=True, seed=0):
    rng = torch.Generator().manual_seed(seed)
    q, k, v, do = (torch.randn(B, T, H, d, generator=rng).to(DEVICE, dtype) for d in (D, D, E, E))
    log_decay = -torch.tensor([0.0, 0.84, 0.05, 30.0, 0.0039, 1e-5])[:H].to(DEVICE)
    states = torch.randn(2, len(lengths) if lengths else B, H, D, E, generator=rng).to(DEVICE)
    initial, dfinal = states if with_state else (None, None)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int().to(DEVICE) if lengths else None
    return do, dfinal, q, k, v, log_decay, initial, cu_seqlens


def check(args, tolerance=None):
    do, dfinal, *inputs = args
    tolerance = tolerance or TOLERANCE[do.dtype]
    o, final = launch.triton_forward(*inputs)
    grads = launch.triton_backward(do, dfinal, *inputs)
    wide = [None if x is None else x.cpu().double() if x.is_floating_point() else x.cpu() for x in args]
    wide[5] = args[5].cpu()
    exact = (*chunk.chunk_forward(*wide[2:]), *chunk.chunk_backward(*wide))
    names = ("o", "final", "dq", "dk", "dv", "dinitial")
    for name, a, b in zip(names, (o, final, *grads), exact, strict=True):
        if a is not None:
            error = float((a.cpu().double() - b).norm() / b.norm())
            assert error <= tolerance, f"{name}: relative error {error:.1e}"  # NaN fails too


@pytest.fixture
def short_splits(monkeypatch):
    """Split even short texts every 128 tokens, with two sub-splits each."""
    monkeypatch.setattr(launch, "plan", lambda T, *_: launch.Plan(128, 64) if T > 128 else launch.Plan(T, T))


@pytest.mark.slow
@pytest.mark.parametrize("T", [1, 2, 31, 32, 33, 65])
def test_any_length(T):
    check(make(2, T, 2, 32, 32, torch.float32))


@pytest.mark.parametrize("lengths", [None, (0, 70, 30)])
def test_gradients_without_tensor_memory_accelerator(monkeypatch, lengths):
    """GPUs before Hopper: loads and stores by pointer, and the decay on the other operand."""
    monkeypatch.setattr(launch, "_device", lambda x: launch.Device(4, 101376, has_tma=False))
    check(make(1, 100, 2, 32, 32, torch.float32, lengths))


@pytest.mark.parametrize(
    ("D", "E", "lengths"),
    [(256, 128, None), (192, 64, (30, 0, 40)), pytest.param(256, 256, (3, 130), marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("splits", [False, True])
def test_wide_heads(monkeypatch, D, E, lengths, splits):
    """16 bits and more than 128 columns: two transposed tiles of the state. Final chunks short and full."""
    if splits:
        monkeypatch.setattr(launch, "plan", lambda T, *_: launch.Plan(64, 64))
    for T in (65, 64) if lengths is None else (None,):
        check(make(1, T or sum(lengths), 1, D, E, torch.float16, lengths))


@pytest.mark.slow
@settings(max_examples=4, deadline=None)
@given(
    st.lists(st.integers(0, 140), min_size=1, max_size=5).filter(any), st.booleans(), st.booleans(),
    st.sampled_from([192, 256]), st.integers(0, 2**16),
)  # fmt: skip
def test_packed_wide_heads_equal_alone(lengths, state, gradient, D, seed):
    check_against_alone(make_packed(lengths, state, gradient, seed, D=D, E=64, dtype=torch.float16))


@pytest.mark.slow
@pytest.mark.parametrize(("D", "E"), [(32, 64), (96, 32), (64, 96), (192, 32), (32, 192), (256, 128)])
def test_head_dims(D, E):
    check(make(1, 40, 2, D, E, torch.float32))


def check_state(args, reverse):
    """What sequence ranks exchange: the final state of a slice, or the gradient of its initial state."""
    do, _, q, k, v, log_decay, *_ = args
    a, b = (q, do) if reverse else (k, v)
    T = a.shape[1]
    distance = torch.arange(T)[:, None] + 1 if reverse else T - 1 - torch.arange(T)[:, None]
    weight = (log_decay.cpu().double() * distance).exp()[..., None].to(DEVICE)
    exact = torch.einsum("bthd,bthe->bhde", a.double() * weight, b.double())
    state = launch.triton_state(a, b, log_decay, reverse)
    assert float((state.double() - exact).norm() / exact.norm()) <= TOLERANCE[a.dtype]


@pytest.mark.slow
@pytest.mark.parametrize("T", [1, 64, 65, 600, 1040])  # 1040: four sub-splits, the first of 272 tokens
@pytest.mark.parametrize("reverse", [False, True])
def test_state_of_a_slice(T, reverse):
    check_state(make(1, T, 5, 32, 64, torch.float32), reverse)


def test_half_precision():
    check(make(1, 130, 2, 64, 64, torch.float16))


@pytest.mark.slow
@pytest.mark.parametrize("with_state", [False, True])
def test_splits(short_splits, with_state):
    check(make(1, 290, 2, 32, 32, torch.float32, with_state=with_state))


@pytest.mark.slow
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize(
    "lengths",
    [[0, 0, 3, 67, 0, 58, 22, 0, 150, 0, 0], [290, 10], [128, 128, 44]],
    ids=["odd", "long", "aligned"],
)
def test_packed_splits(short_splits, lengths, with_state):
    check(make(1, sum(lengths), 1, 32, 32, torch.float32, lengths, with_state))


def check_against_alone(args):
    """Against the definition in float64, which takes one sequence after the other, and its gradients by autograd."""
    do, dfinal, *inputs = args
    results = launch.triton_forward(*inputs), launch.triton_backward(do, dfinal, *inputs)
    q, k, v, initial = leaves = [None if x is None else x.double().requires_grad_() for x in (*inputs[:3], inputs[4])]
    o, final = quadratic(q, k, v, inputs[3], initial, inputs[5])
    outputs, given_grads = ([o], [do.double()]) if dfinal is None else ([o, final], [do.double(), dfinal.double()])
    exact = torch.autograd.grad(outputs, [x for x in leaves if x is not None], given_grads)
    for name, ours, theirs in zip(
        ("o", "final", "dq", "dk", "dv", "dinitial"),
        (*results[0], *results[1]),
        (o, final, *exact),
        strict=initial is not None,
    ):
        error = float((ours.double() - theirs.detach()).norm() / theirs.detach().norm())
        assert error <= TOLERANCE[do.dtype], f"{name}: relative error {error:.1e}"


def make_packed(lengths, state, gradient, seed, **kind):
    """As `make`, each of the two states there or not."""
    args = list(make(1, sum(lengths), 2, **kind, lengths=lengths, seed=seed))
    args[1], args[6] = args[1] if gradient else None, args[6] if state else None
    return args


# Lengths around the chunk of 16 tokens: several sequences in a chunk, none, and some over many chunks and splits.
SHORT = st.lists(st.one_of(st.integers(0, 5), st.integers(14, 18), st.integers(0, 70)), min_size=1, max_size=9)


@pytest.mark.slow
@settings(max_examples=5, deadline=None)
@given(SHORT.filter(any), st.booleans(), st.booleans(), st.booleans(), st.booleans(), st.integers(0, 2**16))
@example([0, 16, 0, 16, 3, 0], True, True, True, True, 0)
def test_packed_equals_alone(lengths, state, gradient, splits, tma, seed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "state_config", lambda *_: launch.Config(16, 64, 4, 2))
        patch.setattr(launch, "attend_config", lambda *_, dual=False: launch.Config(16, 64, 4, 2, dual and tma))
        patch.setattr(launch, "plan", lambda T, *_: launch.Plan(64, 32) if splits and T > 64 else launch.Plan(T, T))
        check_against_alone(make_packed(lengths, state, gradient, seed, D=32, E=32, dtype=torch.float32))


@pytest.mark.gpu
@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.one_of(st.integers(0, 70), st.integers(0, 1500)), min_size=1, max_size=60).filter(any),
    st.booleans(), st.booleans(), st.integers(0, 2**16),
)  # fmt: skip
def test_packed_equals_alone_compiled(lengths, state, gradient, seed):
    check_against_alone(make_packed(lengths, state, gradient, seed, D=128, E=128, dtype=torch.bfloat16))


@pytest.mark.slow
def test_packed_with_different_head_dims(short_splits):
    check(make(1, 200, 1, 32, 64, torch.float32, [70, 0, 130]))


@pytest.mark.slow
def test_fast_decaying_heads_skip_only_negligible_terms(short_splits):
    args = make(1, 290, 2, 32, 32, torch.float32, with_state=False)
    args[5][:] = torch.tensor([-30.0, -0.84])
    check(args)


def test_strided_inputs_are_read_in_place_and_odd_ones_copied():
    B, T, H, D = 1, 40, 2, 32
    fused = torch.randn(B, T, 4 * H * D, device=DEVICE)
    q, k, v, _ = (x.unflatten(-1, (H, D)) for x in fused.chunk(4, -1))
    assert all(launch._readable(x) is x for x in (q, k, v))
    do = torch.randn(B, H, D, T, device=DEVICE).permute(0, 3, 1, 2)  # last stride T: cannot be read in rows
    check((do, None, q, k, v, torch.tensor([-0.1, 0.0], device=DEVICE), None, None))


def test_final_state_may_be_left_out():
    _, _, *inputs = make(1, 40, 2, 32, 32, torch.float32)
    o, none = launch.triton_forward(*inputs, need_state=False)
    assert none is None
    assert torch.equal(o, launch.triton_forward(*inputs)[0])


@pytest.mark.parametrize(("D", "E"), [(32, 64), (96, 96), (256, 128)])
def test_step(D, E):
    _, _, q, k, v, g, state, _ = make(3, 1, 2, D, E, torch.float32)
    slots = torch.zeros(5, 2, D, E, device=DEVICE)
    slots[1:4] = state
    o = step.triton_step(q[:, 0], k[:, 0], v[:, 0], g, slots[1:4])
    expected_o, expected = chunk.chunk_forward(*(x.cpu() for x in (q, k, v, g, state)), None)
    # fp32 both; sums over up to 256 products in another order.
    torch.testing.assert_close(o.cpu(), expected_o[:, 0], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(slots[1:4].cpu(), expected, rtol=1e-6, atol=1e-6)
    assert not slots[0].any() and not slots[4].any()


def test_step_by_row():
    """States stay where they are: sequence b has row rows[b], and a fresh one ignores what its row held."""
    _, _, q, k, v, g, _, _ = make(3, 1, 2, 32, 64, torch.float32)
    states = torch.randn(5, 2, 32, 64, device=DEVICE)
    rows = torch.tensor([[4, 1], [0, 1], [2, 1]], device=DEVICE, dtype=torch.int32)[:, 0]
    before, fresh = states.clone(), torch.tensor([False, True, False], device=DEVICE)
    states[0] = torch.nan
    o = step.triton_step(q[:, 0], k[:, 0], v[:, 0], g, states, rows, fresh)
    expected = before[rows.long()].masked_fill(fresh[:, None, None, None], 0.0)
    expected_o = step.triton_step(q[:, 0], k[:, 0], v[:, 0], g, expected)
    assert torch.equal(o, expected_o) and torch.equal(states[rows.long()], expected)
    assert torch.equal(states[[1, 3]], before[[1, 3]])


@pytest.mark.parametrize("num_sms", [4, 30, 132])
@pytest.mark.parametrize("num_programs", [1, 16, 64, 131, 133, 256, 4000])
@pytest.mark.parametrize("T", [1, 100, 4096, 65537, 2**20])
def test_every_plan_covers_all_tokens_in_full_chunks(T, num_programs, num_sms):
    plan = launch.plan(T, num_programs, num_sms, 64)
    assert plan.split == plan.sub_split == T or (plan.split % plan.sub_split == 0 and plan.sub_split % 64 == 0)
    assert -(-T // plan.split) * num_programs <= max(num_programs, 4 * num_sms)


def test_small_gpus_get_a_shallower_pipeline_or_a_clear_error():
    small = launch.Device(num_sms=46, shared_memory=101376, has_tma=False)
    assert launch.attend_config(128, 128, 2, small, 16).num_stages == 1
    assert not launch.attend_config(128, 128, 2, small, 16, dual=True).tma
    with pytest.raises(ValueError, match="needs 128 KiB of shared memory, this GPU has 99; use bfloat16"):
        launch.attend_config(256, 256, 4, small, 16)
    # A consumer GPU with TMA, but with less shared memory than a Hopper.
    assert not launch.attend_config(256, 256, 2, replace(small, has_tma=True), 16).wide


@pytest.mark.gpu
@pytest.mark.parametrize("D", HEAD_DIMS)
@pytest.mark.parametrize("E", HEAD_DIMS)
def test_all_head_dims_compiled(D, E):
    check(make(1, 1100, 3, D, E, torch.bfloat16, [0, 500, 0, 600]))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("D", "E"), [(32, 32), (64, 64), (96, 128), (128, 128), (256, 128), (192, 256), (256, 256)])
def test_other_dtypes_compiled(D, E, dtype):
    check(make(1, 1100, 3, D, E, dtype, [0, 500, 0, 600]))
    check(make(1, 1088, 3, D, E, dtype, with_state=False))


@pytest.mark.gpu
@pytest.mark.parametrize(("B", "T", "H"), [(1, 65537, 2), (2, 5003, 6), (64, 257, 6), (1, 2**18, 1)])
def test_large_shapes(B, T, H):
    for with_state in (False, True):
        check(make(B, T, H, 128, 128, torch.bfloat16, with_state=with_state))
    check(make(1, B * T, H, 128, 128, torch.bfloat16, [T] * B))


@pytest.mark.gpu
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("T", [8192, 30001])  # 30001: the first sub-split is shorter
def test_state_of_a_long_slice(T, reverse):
    check_state(make(2, T, 6, 128, 128, torch.bfloat16), reverse)


@pytest.mark.gpu
def test_errors_with_silu_and_slow_decay():
    """If do took the decay, its rounding errors would add up: 2.5e-3 of dv, where bf16 alone leaves 1.7e-3."""
    do, _, q, k, v, log_decay, *_ = make(1, 8192, 2, 128, 128, torch.bfloat16)
    q, k, log_decay = torch.nn.functional.silu(q), torch.nn.functional.silu(k), torch.full_like(log_decay, -0.0039)
    dv = launch.triton_backward(do, None, q, k, v, log_decay, None, None)[2]
    exact = chunk.chunk_backward(do.double(), None, q.double(), k.double(), v.double(), log_decay, None, None)[2]
    assert float((dv.double() - exact).norm() / exact.norm()) <= 2.3e-3


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["slices of a projection", "heads first"])
def test_offsets_beyond_32_bits(layout):
    """4.3e9 and 2.7e9 elements; strides of q, k and v that need 64 bits beside others that do not."""
    T, D = 2**20, 128
    if layout == "heads first":
        q, k, v = (torch.randn(1, 20, T, D, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(3))
    else:
        q, k, v, _ = torch.randn(1, T, 32, D, device="cuda", dtype=torch.bfloat16).chunk(4, dim=2)
    do = torch.randn(q.shape, device="cuda", dtype=torch.bfloat16)
    g = torch.full((q.shape[2],), -1.0, device="cuda")  # decays fast, so the end of the row can be checked alone

    def run(do, q, k, v):
        o, final = launch.triton_forward(q, k, v, g, None, None)
        return final, o, *launch.triton_backward(do, None, q, k, v, g, None, None)[:3]

    final, *full = run(do, q, k, v)
    final_end, *end = run(*(x[:, -1000:].contiguous() for x in (do, q, k, v)))
    # Chunks begin elsewhere, so the same sums are rounded in another order.
    for a, b in ((final, final_end), *((a[:, -900:], b[:, -900:]) for a, b in zip(full, end, strict=True))):
        assert float((a - b).float().norm() / b.float().norm()) < TOLERANCE[torch.bfloat16]


@pytest.mark.gpu
def test_compiled_module_trains_and_steps():
    g = -torch.rand(4, device="cuda")

    def loss(q, k, v):
        q = torch.nn.functional.silu(q)
        return lightning_attention(q, k, v, g, need_state=False)[0].square().sum()

    compiled = torch.compile(loss, fullgraph=True)
    for T in (100, 513):
        q, k, v = (torch.randn(2, T, 4, 64, device="cuda", requires_grad=True) for _ in range(3))
        for x in (q, k, v):
            torch._dynamo.mark_dynamic(x, 1)
        ours = torch.autograd.grad(compiled(q, k, v), (q, k, v))
        for a, b in zip(ours, torch.autograd.grad(loss(q, k, v), (q, k, v)), strict=True):
            # The compiler's SiLU and its gradient differ from torch's in the last bits.
            assert float((a - b).norm() / b.norm()) < 1e-5
    state = torch.zeros(2, 4, 64, 64, device="cuda")
    steps = [lightning_attention_step(q[:, t], k[:, t], v[:, t], g, state) for t in range(5)]
    full, final = lightning_attention(q[:, :5], k[:, :5], v[:, :5], g)
    # fp32 with tf32x3 products against exact ones.
    torch.testing.assert_close(torch.stack(steps, 1), full, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state, final, rtol=1e-4, atol=1e-4)
