"""`tnllm estimate` as a person meets it; its arithmetic is tested in tests/training/test_estimate.py."""

import json
from collections.abc import Callable

import pytest

Run = Callable[..., tuple[int, str, str]]


def test_table(tnllm: Run) -> None:
    code, out, err = tnllm("estimate", "7b", "--gpu", "h100", "--mfu", "0.4", "--gpus", "128")
    assert code == 0 and "computed, not measured" in err
    assert out.startswith("7b: 6.84B parameters; each of 64 ranks, 16 x 2048 tokens a pass\n")
    lines = {" ".join(line.split()[:2]): line.split()[2:] for line in out.splitlines()}
    assert lines["fits h100"] == ["no", "no", "yes"]


def test_json_and_time(tnllm: Run) -> None:
    code, out, _ = tnllm("estimate", "385m", "--json", "--tokens-per-s", "1e6", "--memory-gib", "24")
    answer = json.loads(out)
    assert code == 0
    assert answer["parameters"] == 398_984_192
    assert answer["days"] == pytest.approx(1e12 / 1e6 / 86400, rel=1e-3)
    assert answer["fits"] == {"24 GiB": {"none": False, "selective": False, "full": True}}
    # 24 layers of 8 heads of 128 x 128 fp32 numbers, and twice the key width in layer 0.
    assert answer["state_gib"] * 2**30 == 25 * 8 * 128 * 128 * 4


def test_another_row_length_keeps_the_tokens_of_a_pass(tnllm: Run) -> None:
    def answer(*args: str) -> dict[str, float]:
        return json.loads(tnllm("estimate", "385m", "--json", *args)[1])

    usual, long = answer(), answer("--seq-len", "16384")
    assert (long["seq_len"], long["rows_per_pass"]) == (16384, 2)
    assert long["rank_gib"] == usual["rank_gib"]
    assert long["state_gib"] == usual["state_gib"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--gpu", "h10"], "--gpu is 'h10'; allowed: h200, h100, a100-80g, a100-40g, l40s, rtx4090; did you mean 'h100'?"),
        (["--mfu", "0.4"], "--mfu is 0.4; it must lie in (0, 1] and is a share of --gpu's peak, so give --gpu too"),
        (["--gpu", "h100", "--mfu", "40"], "--mfu is 40.0; it must lie in (0, 1]"),
        (["--gpus", "0"], "--gpus is 0; it must be above 0"),
        (["--tokens-per-s", "0"], "--tokens-per-s is 0.0; it must be above 0"),
        (["--seq-len", "0"], "--seq-len is 0; it must be above 0"),
    ],
)  # fmt: skip
def test_bad_input(tnllm: Run, args: list[str], message: str) -> None:
    code, out, err = tnllm("estimate", "tiny", *args)
    assert (code, out) == (2, "")
    assert err.startswith(f"tnllm: {message}") and err.count("\n") == 1
