import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tnllm.data.shards import (
    MANIFEST,
    TOKEN_BYTES,
    Manifest,
    TokenStream,
    read_manifest,
    token_dtype,
    verify_hashes,
    write_manifest,
    write_shard,
)
from tnllm.errors import RunError, UserError

VOCAB = 50


def make(folder, shards, **changes):
    """A finished folder whose training split has `shards`, lists of documents, lists of ids."""
    folder.mkdir(exist_ok=True)
    written = []
    for number, documents in enumerate(shards):
        tokens = np.array([id for document in documents for id in document], "<u2")
        written.append(write_shard(folder, "train", number, tokens, [len(d) for d in documents], len(tokens)))
    (folder / TOKEN_BYTES).write_bytes(np.arange(VOCAB).astype("<u2").tobytes())
    manifest = Manifest("<u2", VOCAB, 2, "a" * 64, {}, [], written, complete=True)
    write_manifest(folder, Manifest(**{**manifest.__dict__, **changes}))
    return folder


documents = st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=9), max_size=6)


@pytest.mark.slow
@given(st.lists(documents, min_size=1, max_size=4).filter(lambda s: any(map(len, s))), st.data())
@settings(max_examples=60, deadline=None)
def test_the_stream_is_its_documents_in_a_circle(tmp_path_factory, shards, data):
    stream = TokenStream.open(make(tmp_path_factory.mktemp("shards"), shards), verify=True)
    flat = [document for shard in shards for document in shard]
    ids = np.array([id for document in flat for id in document])
    starts = np.cumsum([0, *map(len, flat)])[:-1]
    assert (stream.num_tokens, stream.num_documents) == (len(ids), len(flat))
    for number, document in enumerate(flat):
        assert stream.document(number).tolist() == document
    start = data.draw(st.integers(0, len(ids) - 1))
    count = data.draw(st.integers(1, 3 * len(ids)))
    offsets = (start + np.arange(count)) % len(ids)
    assert stream.read(start, count).tolist() == ids[offsets].tolist()
    assert stream.document_starts(start, count).tolist() == np.flatnonzero(np.isin(offsets, starts)).tolist()
    windows = [np.isin((at + np.arange(1, count)) % len(ids), starts).sum() for at in range(len(ids))]
    assert stream.max_inner_starts(count) == max(windows)


def test_ids_are_stored_small_where_they_fit():
    assert token_dtype(65536) == np.dtype("uint16")
    assert token_dtype(65537) == np.dtype("uint32")


def test_the_manifest_round_trips_and_counts(tmp_path):
    folder = make(tmp_path / "s", [[[5, 2], [6, 7, 2]]])
    manifest = read_manifest(folder)
    assert (manifest.total("tokens"), manifest.total("documents", "train"), manifest.total("tokens", "val")) == (
        5,
        2,
        0,
    )
    values = json.loads((folder / MANIFEST).read_text())
    assert values["splits"]["train"] == {"documents": 2, "tokens": 5, "text_bytes": 5}
    assert values["format"] == "tnllm-tokens"


def test_a_truncated_shard_is_named_with_its_sizes(tmp_path):
    folder = make(tmp_path / "s", [[[5, 2], [6, 7, 2]]])
    path = folder / "train-00000.bin"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(RunError) as error:
        TokenStream.open(folder)
    assert str(error.value) == f"{path} has 7 bytes, the manifest says 10; copy it or tokenize again"
    path.unlink()
    with pytest.raises(RunError, match=r"train-00000.bin is missing \(10 bytes in the manifest\)"):
        TokenStream.open(folder)


@pytest.mark.parametrize("name", ["train-00000.bin", "train-00000.idx"])
def test_a_flipped_bit_is_detected(tmp_path, name):
    folder = make(tmp_path / "s", [[[5, 2]]])
    data = bytearray((folder / name).read_bytes())
    data[-1] ^= 1
    (folder / name).write_bytes(data)
    TokenStream.open(folder)
    with pytest.raises(RunError, match=f"{name} is damaged: sha256"):
        verify_hashes(folder, read_manifest(folder))


def test_folders_that_are_not_shards(tmp_path):
    with pytest.raises(UserError, match=r"holds no manifest.json; make token shards with: tnllm data tokenize"):
        TokenStream.open(tmp_path)
    with pytest.raises(UserError, match="is not finished; run the same 'tnllm data tokenize' again to resume"):
        TokenStream.open(make(tmp_path / "a", [[[5, 2]]], complete=False))
    for text in ("", "[]", "{}", '{"format": "tnllm-tokens", "version": 1}'):
        (tmp_path / MANIFEST).write_text(text)
        with pytest.raises(UserError, match="is not a manifest of token shards"):
            TokenStream.open(tmp_path)
    (tmp_path / MANIFEST).write_text('{"format": "tnllm-tokens", "version": 99}')
    with pytest.raises(UserError, match="has another format or version; this tnllm reads tnllm-tokens 1"):
        TokenStream.open(tmp_path)
