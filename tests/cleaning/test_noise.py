import lzma

import pytest

from tests.cleaning import noise
from tnllm import assets


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
