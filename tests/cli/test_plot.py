"""`tnllm plot` as a person meets it, and the numbers behind the lines."""

import builtins
import json
import math
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tnllm.errors import UserError
from tnllm.training.plot import draw, read_run, smooth

Run = Callable[..., tuple[int, str, str]]


def write_run(folder: Path, steps: int = 40, rate: float = 2e-3) -> Path:
    folder.mkdir(parents=True)
    rows = []
    for step in range(1, steps + 1):
        row = {"step": step, "tokens": step * 4096, "time": 1000.0 + 2 * step}
        train = {"loss": 3 + 6 * math.exp(-step / 9), "grad_norm": 1.0, "lr": rate, "tokens_per_s": 2048.0, "mfu": None}
        rows.append({**row, **train})
        if step % 10 == 0:
            rows.append({**row, "val_loss": 3.1 + 6 * math.exp(-step / 9), "val_bpb": 1.5})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize("x", ["step", "tokens", "time"])
def test_png_of_two_runs(tnllm: Run, tmp_path: Path, x: str) -> None:
    runs = [str(write_run(tmp_path / name, steps)) for name, steps in (("a", 40), ("b", 25))]
    code, out, err = tnllm("plot", *runs, "-o", str(tmp_path / "loss.png"), "--x", x)
    assert (code, out, err) == (0, f"{tmp_path / 'loss.png'}\n", "")
    data = (tmp_path / "loss.png").read_bytes()
    assert data.startswith(b"\x89PNG")
    assert struct.unpack(">II", data[16:24]) == (1300, 1240)


@pytest.mark.slow
def test_the_chart_names_what_it_shows(tmp_path: Path) -> None:
    runs = [read_run(write_run(tmp_path / "ours")), read_run(write_run(tmp_path / "theirs"))]
    # Text stays text in an SVG whose fonts are not outlines, so that it can be read back.
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none"}):
        text = draw(runs, "tokens", ".svg").decode()
    for words in ("ours, training", "theirs, validation", "loss (nats per token)", "learning rate", "speed (tokens/s)",
                  "tokens (thousands)"):  # fmt: skip
        assert f">{words}<" in text, words
    assert draw(runs[:1], "step", ".svg") == draw(runs[:1], "step", ".svg")


def test_damaged_lines_are_left_out(tmp_path: Path) -> None:
    file = write_run(tmp_path / "run") / "metrics.jsonl"
    file.write_text('{"step": 1, "tok\n\n' + file.read_text()[:-20])
    run = read_run(tmp_path / "run")
    assert (len(run.train), len(run.validation)) == (40, 3)


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        (None, 2, "no metrics at {file}; give a run folder (runs/NAME) or its metrics.jsonl"),
        ("", 2, "{file} holds no logged step; {wait}"),
        ('{"ste', 2, "{file} holds no logged step; {wait}"),
        ("noise\0\n", 2, "{file} holds no logged step; {wait}"),
        ('{"a": 1}\n', 2, "{file} holds no logged step; {wait}"),
    ],
)  # fmt: skip
def test_nothing_to_draw(tnllm: Run, tmp_path: Path, text: str | None, code: int, message: str) -> None:
    file = tmp_path / "metrics.jsonl"
    if text is not None:
        file.write_text(text)
    got, _, err = tnllm("plot", str(tmp_path), "-o", str(tmp_path / "x.png"))
    wait = "wait for the first log.every_steps of the run, or give another run's folder or metrics.jsonl"
    assert (got, err) == (code, f"tnllm: {message.format(file=file, wait=wait)}\n")
    assert not (tmp_path / "x.png").exists()


def test_output_names(tnllm: Run, tmp_path: Path) -> None:
    run = str(write_run(tmp_path / "run"))
    code, _, err = tnllm("plot", run, "-o", "x.jpg")
    assert (code, err) == (2, "tnllm: --output is x.jpg; its name must end in .png, .pdf, .svg; did you mean '.png'?\n")
    code, _, err = tnllm("plot", run, "-o", str(tmp_path / "no" / "x.png"))
    assert code == 2 and "there is no folder" in err


def test_without_matplotlib(tnllm: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str, *args: object, **kwargs: object) -> object:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    real = builtins.__import__
    run = str(write_run(tmp_path / "run"))
    monkeypatch.setattr(builtins, "__import__", missing)
    code, _, err = tnllm("plot", run, "-o", str(tmp_path / "x.png"))
    assert (code, err) == (3, "tnllm: this needs matplotlib, which is not installed; run: pip install 'tnllm[plot]'\n")


@settings(deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1), st.integers(0, 50))
def test_smoothing_stays_between_the_extremes(values: list[float], span: int) -> None:
    for index, value in enumerate(smooth(values, span)):
        seen = values[: index + 1]
        # A weighted mean; the slack is rounding of sums of up to a hundred terms, which below 2.2e-308 is not relative.
        slack = 1e-9 * max(map(abs, seen)) + sys.float_info.min
        assert min(seen) - slack <= value <= max(seen) + slack


def test_smoothing_passes_over_what_is_not_finite() -> None:
    assert smooth([math.nan, 2.0, math.inf, 2.0], 5)[1:] == pytest.approx([2.0, 2.0, 2.0])
    assert math.isnan(smooth([math.nan], 5)[0])
    assert smooth([3.0, 1.0, 2.0], 0) == [3.0, 1.0, 2.0]


def test_unreadable_run_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no metrics at"):
        read_run(tmp_path / "nowhere")
