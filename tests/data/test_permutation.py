import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tnllm.data.permutation import permute, splitmix64


def test_splitmix64_is_the_published_one():
    """The first two outputs of the generator with seed 0, whose state grows by the golden ratio."""
    assert splitmix64(0) == 0xE220A8397B1DCDAF
    assert splitmix64(0x9E3779B97F4A7C15) == 0x6E789E6AA1B965F4


@given(st.lists(st.integers(0, 2**64 - 1), max_size=20))
def test_arrays_and_ints_agree(values):
    assert splitmix64(np.array(values, np.uint64)).tolist() == [splitmix64(value) for value in values]


@given(st.integers(1, 10**9), st.integers(0, 2**64 - 1))
def test_permute_stays_inside(size, key):
    for index in {0, size // 2, size - 1}:
        assert 0 <= permute(index, size, key) < size


@given(st.integers(1, 300), st.integers(0, 2**64 - 1))
@settings(max_examples=40)
def test_permute_is_a_permutation(size, key):
    assert sorted(permute(index, size, key) for index in range(size)) == list(range(size))
