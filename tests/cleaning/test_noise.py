import json
import lzma
import random

import pytest

from tests.cleaning import noise
from tnllm import assets
from tnllm.cleaning.records import read_records


@pytest.mark.slow
def test_the_sample_that_ships_is_what_noise_makes(tmp_path):
    """All but the Japanese excerpts, whose source does not ship: there, a line with other text of the same kind."""
    noise.write_sample(tmp_path, "？" * 30_000)
    shipped = assets.folder() / "dirty"
    for name in ("held-out.jsonl.xz", "evaluation.jsonl"):
        assert (tmp_path / name).read_bytes() == (shipped / name).read_bytes()
    num_japanese = 0
    for path in sorted((shipped / "pages").iterdir()):
        expected = lzma.decompress((tmp_path / "pages" / path.name).read_bytes()).split(b"\n")
        for line, made in zip(lzma.decompress(path.read_bytes()).split(b"\n"), expected, strict=True):
            if line != made:
                assert "？？？".encode() in made and b'"noise": "foreign"' in line
                num_japanese += 1
    assert num_japanese == 8


def test_corpora_for_comparing_cleaning(tmp_path):
    """All text of a document, held-out documents apart; a thinned corpus as large as a cleaned one."""
    rng = random.Random(0)
    texts = [" ".join(f"{word}{rng.randrange(10**6)}" for word in ["sea"] * 400) for _ in range(50)]
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text, "source": "made"}) + "\n" for text in texts))
    noise.main("mix", str(corpus), str(tmp_path), "whole")
    noisy, held_out = tmp_path / "noisy.jsonl.gz", tmp_path / "held-out.jsonl.gz"
    noise.main("clean", str(noisy), str(tmp_path / "clean.jsonl.gz"))
    noise.main("thin", str(noisy), str(tmp_path / "thin.jsonl.gz"), str(tmp_path / "clean.jsonl.gz"))
    records, kept, clean, thinned = (
        list(read_records(path)) for path in (noisy, held_out, tmp_path / "clean.jsonl.gz", tmp_path / "thin.jsonl.gz")
    )
    assert len({text[:20] for text in texts} & {record["text"][:20] for record in kept}) == 2
    assert not {record["text"] for record in records} & {record["text"] for record in kept}
    # Three whole excerpts each; what is left is too short.
    assert {len(text) // 1200 for text in texts} == {3} and {len(text) % 1200 > 400 for text in texts} == {False}
    assert len(records) + len(kept) == 150
    assert [record for record in records if record["noise"] == "none"] == clean
    assert {record["noise"] for record in thinned} > {"none"}
    sizes = [sum(len(record["text"].encode()) for record in part) for part in (clean, thinned)]
    assert 0 <= sizes[1] - sizes[0] < 1300 * 3
