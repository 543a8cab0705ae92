"""The benchmark of packed rows checks what it times."""

import json

import pytest

from tests.bench.packed import SHAPES, cut, main


@pytest.mark.slow
def test_a_row_for_each_shape(tmp_path, capsys):
    main(["--tokens", "128", "--seconds", "0.01", "--json", str(tmp_path / "packed.json")])
    rows = json.loads((tmp_path / "packed.json").read_text())["rows"]
    assert [row["heads"] for row in rows] == [shape[2] for shape in SHAPES]
    assert all(row[key] < 1e-5 for row in rows for key in ("o", "dq", "dk", "dv"))
    assert "multiples of the floor" in capsys.readouterr().out


def test_documents_cover_the_row():
    lengths = cut(7, 100, "cpu")
    assert lengths[0] == 0 and lengths[-1] == 100 and bool((lengths.diff() > 0).all()) and cut(0, 100, "cpu") is None
