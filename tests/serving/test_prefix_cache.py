"""The prefix cache finds the longest beginning, of these weights alone, within its bytes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.small_models import small_model
from tnllm.generation.context import read
from tnllm.serving.prefix_cache import MIN_TOKENS, PrefixCache


@pytest.fixture(scope="module")
def contexts():
    """Contexts of different lengths; which text they are of does not matter to the cache."""
    model = small_model()
    return [read(model, [[5] * (MIN_TOKENS + extra)])[0] for extra in range(4)]


def size(context):
    return context.state.nbytes + context.logits.nbytes + context.seen.nbytes


def test_the_longest_beginning_is_found(contexts):
    cache = PrefixCache("w", 1 << 30)
    prompt = list(range(100))
    for length, context in zip((20, 50, 80), contexts, strict=False):
        cache.put(prompt[:length], context)
    assert cache.longest(prompt) is contexts[2]
    assert cache.longest(prompt[:80]) is contexts[2]
    assert cache.longest(prompt[:79]) is contexts[1]
    assert cache.longest([*prompt[:30], 7]) is contexts[0]
    assert cache.longest(prompt[1:]) is None and cache.longest([]) is None


def test_short_beginnings_are_not_worth_it(contexts):
    cache = PrefixCache("w", 1 << 30)
    cache.put([5] * (MIN_TOKENS - 1), contexts[0])
    assert len(cache) == 0


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 9), max_size=60))
def test_the_least_recently_used_make_room(uses):
    cache = PrefixCache("w", 3 * size(CONTEXT))
    expected = []
    for name in uses:
        prompt = [name] * MIN_TOKENS
        assert (cache.longest(prompt) is not None) == (name in expected)
        cache.put(prompt, CONTEXT)
        expected = [*(other for other in expected if other != name), name][-3:]
        assert len(cache) == len(expected) and cache.num_bytes == len(expected) * size(CONTEXT) <= cache.max_bytes


CONTEXT = read(small_model(), [[5] * MIN_TOKENS])[0]


def test_what_cannot_fit_is_not_kept(contexts):
    cache = PrefixCache("w", size(contexts[0]) - 1)
    cache.put([5] * MIN_TOKENS, contexts[0])
    assert len(cache) == cache.num_bytes == 0


def test_other_weights_are_other_keys(contexts):
    ours, theirs = PrefixCache("w", 1 << 30), PrefixCache("v", 1 << 30)
    prompt = [5] * MIN_TOKENS
    assert list(ours._keys(prompt, [MIN_TOKENS])) != list(theirs._keys(prompt, [MIN_TOKENS]))


def test_branches_show_what_is_shared():
    cache = PrefixCache("w", 1 << 30)
    shared = list(range(40))
    assert cache.branch([*shared, 1, 2]) == 0
    assert cache.branch([*shared, 3]) == 40
    assert cache.branch(shared[:30]) == 30
    assert cache.branch(shared[: MIN_TOKENS - 1]) == 0
