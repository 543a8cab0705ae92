"""Long texts: no drift, no growth, no overflow."""

import math

import pytest
import torch

from tests.small_models import small_model
from tnllm.generation.context import read
from tnllm.kernels.lightning_attention import lightning_attention_step


@pytest.mark.slow
def test_a_long_text_does_not_drift_from_float64():
    tokens = torch.randint(3, 340, (30_000,), generator=torch.Generator().manual_seed(0)).tolist()
    single, double = small_model(), small_model(torch.float64)
    double.load_state_dict(single.state_dict())
    gaps = {}
    a = b = None
    for start in range(0, 30_000, 10_000):
        piece = tokens[start : start + 10_000]
        [a] = read(single, [piece], [a], chunk_tokens=2048)
        [b] = read(double, [piece], [b], chunk_tokens=2048)
        gaps[b.num_tokens] = (a.logits - b.logits).abs().max().item()
    # Logits have a standard deviation of 3. In the last layer the state grows like the square root of the length and
    # the norm takes the scale away again, so the relative error, and with it the gap, stays: measured, at most 1.4e-5
    # up to 50,000 tokens.
    assert max(gaps.values()) < 1e-4, gaps


def naive_step(q, k, v, decay, state, t):
    """The original form: the state is scaled by decay^-t, so that it only adds (arXiv 2307.14995, Algorithm 1)."""
    state += (k * decay**-t)[..., None] * v[..., None, :]
    return ((q * decay**t)[..., None, :] @ state).squeeze(-2)


def test_the_naive_recurrence_overflows_where_ours_holds():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(300, 1, 1, 16, generator=generator) for _ in range(3))
    log_decay = torch.tensor([-(2.0**-0.25)])  # the fastest head of the 7B: 0.84 a token
    state, exact = torch.zeros(1, 1, 16, 16), torch.zeros(1, 1, 16, 16, dtype=torch.float64)
    naive_state, broken_at = torch.zeros(1, 1, 16, 16), None
    for t in range(300):
        ours = lightning_attention_step(q[t], k[t], v[t], log_decay, state)
        expected = lightning_attention_step(q[t].double(), k[t].double(), v[t].double(), log_decay, exact)
        # Sums of a few terms of size 16 in fp32.
        torch.testing.assert_close(ours.double(), expected, atol=1e-5, rtol=0)
        naive = naive_step(q[t], k[t], v[t], log_decay.exp(), naive_state, t)
        if broken_at is None and not naive.isfinite().all():
            broken_at = t
    assert broken_at is not None
    # exp(0.84 t) passes the largest fp32 number, e^88.7, at t = 106.
    assert abs(broken_at - 88.7 / -log_decay.item()) < 3
    assert math.isfinite(state.abs().max())
