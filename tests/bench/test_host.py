"""The parts of the host's time add up to a call with its backward pass."""

import json

import pytest

from tests.bench.host import main


@pytest.mark.slow
def test_the_parts_are_the_whole(tmp_path, capsys):
    main(["--rounds", "2", "--json", str(tmp_path / "host.json")])
    (row,) = json.loads((tmp_path / "host.json").read_text())["rows"]
    assert row["launch"] + row["dispatch"] + row["autograd"] == pytest.approx(row["both"])
    assert "host time of a call" in capsys.readouterr().out
