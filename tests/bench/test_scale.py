"""Steps on real ranks (gloo): checked against one process, timed, reported; and what happens when a rank fails."""

import csv
import json
from dataclasses import replace

import pytest

from tnllm.bench import scale
from tnllm.bench.scale import Settings, bench_scale, check_passed, mesh_axes, scale_cases
from tnllm.bench.scale_rank import by_group
from tnllm.bench.scale_report import longest_rows, plot_scale, print_scale_head, print_scale_row, write_scale_csv
from tnllm.errors import RunError, UserError

QUICK = Settings("cpu", compiled=False, steps=1, warmup=0)


@pytest.fixture(scope="module")
def said():
    return []


@pytest.fixture(scope="module")
def results(said):
    cases = scale_cases(["tiny"], [2], ["fsdp", "sp", "tp"], 32, 64)
    # No step can differ from one process by less than nothing.
    cases.insert(3, replace(cases[-1], limit=-1.0))
    return bench_scale(cases, QUICK, note=said.append)


def test_every_mesh_is_checked_and_timed(results):
    assert [(row["mesh"], row["gpus"], row["passed"]) for row in results["accuracy"]] == [
        ("fsdp", 2, True),
        ("tp", 2, False),
        ("sp", 2, True),
        ("tp", 2, True),
    ]
    for row in [row for row in results["accuracy"] if row["passed"]]:
        assert row["loss_limit"] == 2e-5 and row["steps"] == 10
        assert row["last_loss"] < row["first_loss"]  # the compared steps did learn
    rows = results["rows"]
    assert [(row["mesh"], row["rows"], row["seq_len"], row["tokens"]) for row in rows] == [
        ("one", 2, 32, 64),
        ("one", 1, 64, 64),
        ("fsdp", 2, 32, 128),
        ("sp", 1, 128, 128),
        ("tp", 2, 32, 64),
    ]
    alone = {"fsdp": rows[0], "sp": rows[1], "tp": rows[0]}
    for row in rows:
        assert row["status"] == "ok" and row["first_loss"] == pytest.approx(9.01, abs=0.1)
        assert row["tokens_per_s"] == pytest.approx(1e3 * row["tokens"] / row["step_ms"])
        assert row["mfu"] is None and row["collectives_ms"] is None
        if row["mesh"] != "one":
            expected = row["tokens_per_s"] / 2 / alone[row["mesh"]]["tokens_per_s"]
            assert row["efficiency"] == pytest.approx(expected)
    sent = {row["mesh"]: {axis for axis, size in row["sent_bytes"].items() if size} for row in rows}
    assert sent == {"one": set(), "fsdp": {"weights"}, "sp": {"weights", "sequence"}, "tp": {"tensor"}}


def test_reports(results, tmp_path, capsys):
    print_scale_head(results)
    print_scale_row(results["rows"][2])
    out = capsys.readouterr().out
    assert "2 threads" in out or "1 threads" in out
    assert "4 x 32" in out and "weights 0.00876" in out
    write_scale_csv(results, tmp_path / "s.csv")
    with open(tmp_path / "s.csv") as file:
        found = [(row["mesh"], row["tensor"], row["reference"]) for row in csv.DictReader(file)]
    assert found[2:] == [("fsdp", "1", "2x32"), ("sp", "1", "1x64"), ("tp", "2", "2x32")]
    json.dumps(results)
    pytest.importorskip("matplotlib")
    plot_scale(results, tmp_path / "s.png")
    assert (tmp_path / "s.png").stat().st_size > 10_000


def test_a_mesh_that_fails_its_check_is_not_timed(results, said):
    assert [row["mesh"] for row in results["rows"]].count("tp") == 1  # of two
    assert any(line.startswith("not timed: tiny tp on 2 ranks: ") for line in said)
    with pytest.raises(RunError, match=r"not those of one process: tiny tp on 2$"):
        check_passed(results)


def test_after_a_rank_that_failed_the_rest_is_tried(monkeypatch):
    launches = []

    def launch(cases, *_):
        launches.append([case.mesh for case in cases])
        if cases[0].mesh == "fsdp":
            yield {"failed": 0, "rank": 1, "error": "DistBackendError: lost"}
            yield {"failed": 0, "rank": 0, "error": "out of memory"}
            yield {"ended": "ChildFailedError"}
        elif cases[0].mesh == "sp":
            yield {"ended": "Signal 9 (SIGKILL) received"}

    monkeypatch.setattr(scale, "_launch", launch)
    cases = scale_cases(["tiny"], [2], ["fsdp", "sp", "tp"], 32, 64)[2:]
    rows = bench_scale(cases, QUICK)["rows"]
    assert launches == [["fsdp", "sp", "tp"], ["sp", "tp"], ["tp"]]
    assert [(row["mesh"], row["status"]) for row in rows] == [
        ("fsdp", "out of memory"),
        ("sp", "Signal 9 (SIGKILL) received"),
    ]


def test_the_longest_row_is_doubled_until_it_fails(monkeypatch):
    def launch(cases, *_):
        for number, case in enumerate(cases):
            if case.seq_len > 256 * case.gpus:
                yield {"failed": number, "rank": 0, "error": "out of memory"}
                yield {"ended": ""}
                return
            yield {"row": {"id": number, "status": "ok", "step_ms": 10.0}}

    monkeypatch.setattr(scale, "_launch", launch)
    rows = bench_scale(scale_cases(["tiny"], [2], ["sp"], 32, 64), QUICK, longest=True)["rows"]
    assert [(r["gpus"], r["seq_len"]) for r in rows if r["longest"]] == [
        *((1, n) for n in (64, 128, 256, 512)),
        *((2, n) for n in (128, 256, 512, 1024)),
    ]
    assert longest_rows(rows) == [
        "tiny, longest row on 1 GPU: 256 tokens (25,600 tokens/s per GPU); 512: out of memory",
        "tiny, longest row on 2 GPUs: 512 tokens (25,600 tokens/s per GPU); 1K: out of memory",
    ]


def test_meshes():
    assert mesh_axes("fsdp+tp", 8) == {"shard": 4, "sequence": 1, "tensor": 2}
    assert mesh_axes("tp+sp", 4) == {"shard": 1, "sequence": 2, "tensor": 2}
    assert mesh_axes("fsdp+sp", 2) is None and mesh_axes("fsdp+sp", 6) is not None
    case = scale_cases(["385m"], [8], ["fsdp+sp"], 8192, 16384)[-1]
    assert (case.rows, case.seq_len, case.tokens, case.reference) == (1, 32768, 8 * 16384, (1, 16384))
    with pytest.raises(UserError, match="tensor 4, which does not divide tiny's num_heads 2"):
        scale_cases(["tiny"], [4], ["tp"], 32, 64)


def test_kernels_of_collectives_by_group():
    events = [
        {"cat": "kernel", "name": "ncclDevKernel_A", "dur": 2000, "args": {"Process Group Description": "tensor"}},
        {"cat": "kernel", "name": "ncclDevKernel_B", "dur": 500, "args": {"Process Group Description": "tensor"}},
        {"cat": "kernel", "name": "ncclDevKernel_C", "dur": 1000, "args": {}},
        {"cat": "kernel", "name": "gemm", "dur": 9000},
        {"cat": "gpu_user_annotation", "name": "nccl:all_gather", "dur": 9000},
    ]
    assert by_group(events) == {"tensor": 2.5, "all": 1.0}
