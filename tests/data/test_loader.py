import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tnllm.data.loader import IGNORE, Loader, Source
from tnllm.data.shards import TOKEN_BYTES, Manifest, TokenStream, write_manifest, write_shard
from tnllm.errors import UserError

VOCAB, EOS = 60, 2


def stream(folder, lengths, seed=0, tokenizer="a" * 64) -> TokenStream:
    """One shard of random documents of these lengths, the end token included."""
    draw = np.random.default_rng(seed)
    documents = [np.append(draw.integers(3, VOCAB, length - 1), EOS) for length in lengths]
    tokens = np.concatenate([*documents, np.zeros(0, int)]).astype("<u2")
    folder.mkdir(exist_ok=True)
    shard = write_shard(folder, "train", 0, tokens, list(lengths), 1)
    (folder / TOKEN_BYTES).write_bytes(np.where(np.arange(VOCAB) == EOS, 0, np.arange(VOCAB)).astype("<u2").tobytes())
    write_manifest(folder, Manifest("<u2", VOCAB, EOS, tokenizer, {}, [], [shard], complete=True))
    return TokenStream.open(folder)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> TokenStream:
    lengths = np.random.default_rng(1).integers(1, 40, 60).tolist()
    return stream(tmp_path_factory.mktemp("corpus") / "s", lengths)


def same(a, b) -> bool:
    return (
        torch.equal(a.tokens, b.tokens)
        and torch.equal(a.labels, b.labels)
        and (a.cu_seqlens is b.cu_seqlens is None or torch.equal(a.cu_seqlens, b.cu_seqlens))
        and (a.num_bytes, a.num_labels) == (b.num_bytes, b.num_labels)
    )


def cat(parts, packing):
    dim = 1 if packing == "reset" else 0
    return [torch.cat([getattr(part, name) for part in parts], dim) for name in ("tokens", "labels")]


@pytest.mark.parametrize("packing", ["reset", "concat"])
@given(first=st.integers(0, 10**12), cuts=st.lists(st.integers(1, 3), min_size=1, max_size=4))
@settings(max_examples=30, deadline=None)
def test_rows_do_not_depend_on_how_they_are_asked_for(corpus, packing, first, cuts):
    loader = Loader([Source(corpus)], seq_len=16, batch_size=4, seed=7, packing=packing)
    other = Loader([Source(corpus)], seq_len=16, batch_size=12, seed=7, rank=1, world_size=3, packing=packing)
    whole = loader.batch(first, sum(cuts))
    parts = []
    for cut in cuts:
        parts.append(other.batch(first, cut))
        first += cut
    tokens, labels = cat(parts, packing)
    assert torch.equal(tokens, whole.tokens) and torch.equal(labels, whole.labels)
    assert sum(part.num_bytes for part in parts) == whole.num_bytes
    assert sum(part.num_labels for part in parts) == whole.num_labels


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_a_step(corpus, world_size):
    ranks = [Loader([Source(corpus)], 16, 8, rank=rank, world_size=world_size) for rank in range(world_size)]
    samples = [sample for loader in ranks for sample in loader.rank_samples(24)]
    assert samples == list(range(24, 32))


def test_another_seed_gives_another_order(corpus):
    first, second = (Loader([Source(corpus)], 16, 4, seed=seed).batch(0, 8) for seed in (0, 1))
    assert not torch.equal(first.tokens, second.tokens)
    assert same(first, Loader([Source(corpus)], 16, 4, seed=0).batch(0, 8))


def test_documents_do_not_see_each_other(corpus):
    loader = Loader([Source(corpus)], seq_len=32, batch_size=4)
    ends = 0
    for first in range(0, 60, 4):
        batch = loader.batch(first, 4)
        tokens, labels = batch.tokens[0], batch.labels[0]
        bounds = batch.cu_seqlens.unique().tolist()
        assert bounds[0] == 0 and bounds[-1] == 4 * 32
        assert {32, 64, 96} <= set(bounds)
        for begin, end in itertools.pairwise(bounds):
            # Inside a sequence the label is the next token, and only its last token may end a document.
            assert torch.equal(labels[begin : end - 1], tokens[begin + 1 : end])
            assert (tokens[begin : end - 1] != EOS).all()
            if tokens[end - 1] == EOS:
                ends += 1
                assert labels[end - 1] == IGNORE
            else:
                assert end % 32 == 0 and labels[end - 1] != IGNORE
        assert batch.num_labels == (labels != IGNORE).sum()
    assert ends > 20


def test_cu_seqlens_has_one_shape_and_is_padded_with_its_last_value(corpus):
    loader = Loader([Source(corpus)], seq_len=32, batch_size=4)
    bounds = [loader.batch(first, 4).cu_seqlens for first in range(0, 400, 4)]
    assert {tuple(b.shape) for b in bounds} == {(4 * loader.max_row_sequences + 1,)}
    assert all(b.dtype == torch.int32 and b[-1] == 128 and (b.diff() >= 0).all() for b in bounds)
    # The bound is reached by some row of this corpus, so it could not be smaller.
    rows = [loader.batch(first, 1).cu_seqlens for first in range(40 * loader.num_rows)]
    assert max(len(b.unique()) - 1 for b in rows) == loader.max_row_sequences


def test_concat_rows_run_on_over_documents(corpus):
    batch = Loader([Source(corpus)], seq_len=32, batch_size=4, packing="concat").batch(0, 4)
    assert batch.tokens.shape == batch.labels.shape == (4, 32)
    assert batch.cu_seqlens is None
    assert torch.equal(batch.tokens[:, 1:], batch.labels[:, :-1])
    assert batch.num_labels == 4 * 32


@pytest.mark.parametrize("packing", ["reset", "concat"])
def test_bytes_are_those_of_the_counted_labels(corpus, packing):
    batch = Loader([Source(corpus)], seq_len=32, batch_size=4, packing=packing).batch(8, 4)
    counted = batch.labels[batch.labels != IGNORE]
    assert batch.num_bytes == int(torch.where(counted == EOS, 0, counted).sum()) > 0


def test_a_pass_sees_every_token_and_the_next_pass_cuts_elsewhere(corpus):
    loader = Loader([Source(corpus)], seq_len=16, batch_size=1, packing="concat")
    ids = corpus.read(0, corpus.num_tokens)
    rows = loader.num_rows
    assert rows == -(-corpus.num_tokens // 16)
    passes = []
    for epoch in range(2):
        tokens = loader.batch(epoch * rows, rows).tokens
        counts = np.bincount(tokens.flatten(), minlength=VOCAB)
        extra = counts - np.bincount(ids, minlength=VOCAB)
        assert (extra >= 0).all() and extra.sum() == rows * 16 - corpus.num_tokens < 16
        passes.append({tuple(row) for row in tokens.tolist()})
    assert not passes[0] & passes[1]


@pytest.mark.parametrize("packing", ["reset", "concat"])
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=12).filter(lambda x: sum(x) > 1))
@settings(max_examples=25, deadline=None)
def test_validation_counts_every_label_once(tmp_path_factory, packing, lengths):
    source = stream(tmp_path_factory.mktemp("val") / "s", lengths)
    loader = Loader([Source(source)], seq_len=16, batch_size=4, packing=packing, shuffle=False)
    batch = loader.batch(0, loader.num_rows)
    ids = source.read(0, source.num_tokens)
    assert batch.tokens.flatten()[: len(ids)].tolist() == ids.tolist()[: loader.num_rows * 16]
    hidden = len(lengths) - 1 if packing == "reset" else 0
    assert batch.num_labels == len(ids) - 1 - hidden
    beyond = loader.batch(loader.num_rows, 3)
    assert (beyond.num_labels, beyond.num_bytes) == (0, 0) and beyond.tokens.shape == beyond.labels.shape


def test_validation_of_several_sources_sees_each_once(tmp_path):
    sources = [Source(stream(tmp_path / str(i), [20, 30 + i], seed=i)) for i in range(3)]
    loader = Loader(sources, seq_len=16, batch_size=4, packing="concat", shuffle=False)
    assert loader.batch(0, loader.num_rows).num_labels == sum(s.stream.num_tokens - 1 for s in sources)


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> list[TokenStream]:
    """Three sources told apart by their row contents: document lengths differ."""
    folder = tmp_path_factory.mktemp("three")
    return [stream(folder / str(i), [100 * (i + 1)] * 3, seed=i) for i in range(3)]


@given(
    weights=st.lists(st.floats(0.01, 100), min_size=3, max_size=3),
    first=st.integers(0, 10**6),
    count=st.integers(1, 5000),
)
@settings(max_examples=30, deadline=None)
def test_any_stretch_of_samples_has_the_mix_asked_for(three, weights, first, count):
    loader = Loader([Source(s, w) for s, w in zip(three, weights, strict=True)], 16, 4)
    got = np.array(loader._mix.counts(first + count)) - np.array(loader._mix.counts(first))
    share = np.array(weights) / sum(weights)
    # Each end of the stretch is less than two samples off (three sources); weights are rounded to 1/4096.
    assert np.abs(got - share * count).max() < 4 + 3 * count / 4096
    assert round(got.sum()) == count


def test_sources_are_drawn_in_turn_without_gaps(three):
    loader = Loader([Source(s) for s in three], 16, 4)
    seen = [[], [], []]
    for sample in range(500):
        source, nth = loader._mix.locate(sample)
        seen[source].append(nth)
    assert [part == list(range(len(part))) for part in seen] == [True] * 3
    # Without weights a source's share is its share of the tokens: 1 : 2 : 3.
    assert [round(len(part) / 500, 2) for part in seen] == [0.17, 0.33, 0.5]


def test_a_tiny_weight_is_drawn_at_times(three):
    loader = Loader([Source(three[0], 1.0), Source(three[1], 1e-9)], 16, 4)
    assert loader._mix.counts(4097)[1] > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, tmp: Loader([], 16, 4), "no data source is given"),
        (lambda s, tmp: Loader([Source(s)], 16, 4, world_size=3), "4 rows a step do not divide over 3 ranks"),
        (lambda s, tmp: Loader([Source(s, 0.0)], 16, 4), "is 0.0; give a number above 0"),
        (lambda s, tmp: Loader([Source(stream(tmp / "e", []))], 16, 4), "holds 0 documents and no tokens"),
        (
            lambda s, tmp: Loader([Source(s), Source(stream(tmp / "o", [9], tokenizer="b" * 64))], 16, 4),
            "were made with different tokenizers; use one",
        ),
    ],
)
def test_bad_sources_are_refused(corpus, tmp_path, change, message):
    with pytest.raises(UserError) as error:
        change(corpus, tmp_path)
    assert message in str(error.value)


def test_a_batch_moves_as_a_whole(corpus):
    batch = Loader([Source(corpus)], 16, 4).batch(0, 2)
    moved = batch.to(torch.device("meta"))
    assert {moved.tokens.device.type, moved.labels.device.type, moved.cu_seqlens.device.type} == {"meta"}
    assert (moved.num_bytes, moved.num_labels) == (batch.num_bytes, batch.num_labels)
