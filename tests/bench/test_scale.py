"""Scaling over ranks: the plan, real gloo ranks with faults in them, what a trace tells, the report."""

import csv
import dataclasses
import json
import shutil

import pytest

from tnllm.bench.report import write_csv
from tnllm.bench.scale import ONE, Plan, bench_scaling, make_cases, mesh_axes, timed_row
from tnllm.bench.scale_rank import times_of_nccl
from tnllm.bench.tables import longest_line, plot_scaling, print_check, print_environment, print_row, summary
from tnllm.errors import UserError

pytestmark = pytest.mark.slow


def axes(**given):
    return {"replicate": 1, "shard": 1, "sequence": 1, "tensor": 1, **given}


@pytest.mark.parametrize(
    ("text", "ranks", "expected"),
    [
        ("fsdp", 4, axes(shard=4)),
        ("sp", 2, axes(sequence=2)),
        ("fsdp", 1, None),
        ("fsdp+tp", 2, None),
        ("fsdp+tp", 4, axes(shard=2, tensor=2)),
        ("fsdp+tp", 8, axes(shard=4, tensor=2)),
        ("ddp+sp+tp", 8, axes(replicate=2, sequence=2, tensor=2)),
        ("shard=2+sequence=4", 8, axes(shard=2, sequence=4)),
        ("shard=2+sequence=4", 4, None),
    ],
)
def test_meshes(text, ranks, expected):
    assert mesh_axes(text, ranks) == expected


@pytest.mark.parametrize("text", ["fdsp", "fsdp=x", "fsdp+fsdp", "fsdp+shard", "fsdp=2+tp", "tp=0", "shard=2+fsdp=2"])
def test_meshes_that_are_none(text):
    with pytest.raises(UserError, match=f"--meshes has '{text.replace('+', '[+]')}'"):
        mesh_axes(text, 4)


def plan(**given) -> Plan:
    return Plan(**{"presets": ["tiny"], "gpus": [1, 2], "meshes": ["fsdp", "tp", "sp"], "device": "cpu", **given})


def test_work_of_a_gpu_is_the_same_in_weak_scaling_and_split_in_strong():
    cases = make_cases(plan(presets=["385m"], gpus=[1, 2, 4], meshes=["fsdp", "sp", "tp", "fsdp+sp", "sp+tp"], rows=2))
    timed = {(case.ranks, case.mesh): case for case in cases if "time" in case.phases}
    assert {key: (case.rows, case.seq_len) for key, case in timed.items() if key[0] != 1} == {
        (2, "fsdp"): (4, 4096),
        (2, "sp"): (1, 16384),
        (2, "tp"): (2, 4096),
        (4, "fsdp"): (8, 4096),
        (4, "sp"): (1, 32768),
        (4, "tp"): (2, 4096),
        (4, "fsdp+sp"): (2, 16384),
        (4, "sp+tp"): (1, 16384),
    }
    assert [(case.phases, case.rows, case.seq_len) for case in cases if case.ranks == 1] == [
        (["check", "time"], 2, 4096),
        (["time"], 1, 8192),
    ]
    # Everything is checked before it is timed, on the same batch.
    for case in cases:
        assert case.mesh == ONE or case.phases == ["check", "time"]
        assert case.checked == [256, 4]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"gpus": [1, 4], "meshes": ["tp"]}, "tiny on tp: parallel.tensor is 4; it must divide model.num_heads 2"),
        ({"meshes": ["fsdp+tp"]}, "fits none of the numbers of GPUs: --gpus is 1, 2"),
        ({"presets": ["tinny"]}, "did you mean 'tiny'?"),
    ],
)
def test_plans_that_do_not_fit(given, message):
    with pytest.raises(UserError) as told:
        make_cases(plan(**given))
    assert message in str(told.value)


FAULTS = "tests.bench.scale_faults"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of the cases, which stay because some of them fail."""
    return tmp_path_factory.mktemp("scale")


@pytest.fixture(scope="module")
def small():
    return plan(
        seq_len=32,
        rows=2,
        compiled=False,
        steps=2,
        warmup=1,
        longest=True,
        meshes=["fsdp", "sp", "tp"],
        check_tokens=32,
    )


@pytest.fixture(scope="module")
def results(small, folder):
    """Real ranks with `scale_faults` in them."""
    return bench_scaling(small, folder=folder, module=FAULTS)


def test_a_second_run_measures_only_what_failed(results, small, folder):
    said = []
    again = bench_scaling(small, said.append, folder=folder, module="tests.bench.no_such_module")
    assert sum("measured before" in line for line in said) == 4
    for key in ("rows", "longest"):
        for old, new in zip(results[key], again[key], strict=True):
            if old["mesh"] == "sp":
                assert new["status"] in ("failed", "wrong")
            else:
                assert new == old
    assert again["accuracy"][1]["reason"] == "the ranks ended with exit code 1"


def test_other_settings_are_measured_anew(results, small, folder, tmp_path):
    said = []
    shutil.copytree(folder, tmp_path / "cases")
    other = dataclasses.replace(small, steps=3, gpus=[1], meshes=[], longest=False)
    bench_scaling(other, said.append, folder=tmp_path / "cases", module="tests.bench.no_such_module")
    assert not any("measured before" in line for line in said)


def test_a_finished_run_leaves_no_files(tmp_path):
    kept = tmp_path / "s.json.cases"
    alone = plan(gpus=[1], meshes=[], seq_len=32, rows=1, compiled=False, steps=1, warmup=1, check_tokens=32)
    assert [row["status"] for row in bench_scaling(alone, folder=kept)["rows"]] == ["ok"]
    assert not kept.exists()


def test_a_wrong_mesh_is_caught_and_not_timed(results):
    checks = {row["mesh"]: row for row in results["accuracy"]}
    assert not checks["fsdp"]["passed"] and checks["fsdp"]["norm_difference"] > 0.1
    for mesh in ("sp", "tp"):
        assert checks[mesh]["passed"] and 0 < checks[mesh]["loss_difference"] < 2e-5
    rows = {row["mesh"]: row for row in results["rows"] if row["gpus"] == 2}
    assert rows["fsdp"]["status"] == "wrong" and rows["fsdp"]["step_ms"] is None


def test_a_lost_rank_is_a_row_and_the_cases_after_it_run(results):
    rows = {row["mesh"]: row for row in results["rows"] if row["gpus"] == 2}
    assert (rows["sp"]["status"], rows["sp"]["reason"]) == ("failed", "rank 1 was lost (SIGKILL)")
    assert rows["tp"]["status"] == "ok"
    search = next(row for row in results["longest"] if row["mesh"] == "sp")
    assert longest_line(search) == "longest row, tiny, sp on 2: not found (failed: its first length did not run)"


def test_rows_hold_what_was_measured(results):
    alone = next(row for row in results["rows"] if row["mesh"] == ONE and row["rows"] == 2)
    row = next(row for row in results["rows"] if row["mesh"] == "tp")
    assert row["scaling"] == "strong" and row["tokens"] == alone["tokens"] == 64
    assert 0 < row["low_ms"] <= row["step_ms"] <= row["high_ms"]
    assert row["tokens_per_s"] == pytest.approx(64e3 / row["step_ms"])
    # Of a speed-up over one process, each of two has its half.
    assert row["efficiency"] == pytest.approx(alone["step_ms"] / row["step_ms"] / 2)
    assert row["sent_tensor"] == pytest.approx(row["computed_bytes"], rel=0.01) and row["sent_weights"] == 0
    assert row["comm_ms"] > 0 and row["comm_exposed_ms"] is None and row["peak_gib"] is None
    json.dumps(results)


def test_the_longest_row_is_the_last_that_fitted(results):
    alone = next(row for row in results["longest"] if row["mesh"] == ONE)
    assert (alone["longest"], alone["tried"], alone["status"]) == (128, 256, "out of memory")
    assert alone["reason"] == "rank 0: OutOfMemoryError: no room"
    assert longest_line(alone) == "longest row, tiny, - on 1: 128 tokens fit, 256: does not"


def test_reports(results, tmp_path, capsys):
    print_environment(results["environment"])
    for row in results["accuracy"]:
        print_check(row)
    for row in [*results["rows"], *results["longest"]]:
        print_row(row)
    out = capsys.readouterr().out
    assert "gradient norm 5.0e-01 (limit 0.0005): WRONG" in out and "rank 1 was lost (SIGKILL)" in out
    assert any(
        line.startswith("tiny tp on 2: a rank sends a step, counted: tensor ") for line in summary(results["rows"])
    )
    write_csv(results, tmp_path / "r.csv")
    with open(tmp_path / "r.csv") as file:
        assert [row["mesh"] for row in csv.DictReader(file)] == [row["mesh"] for row in results["rows"]]
    pytest.importorskip("matplotlib")
    plot_scaling(results, tmp_path / "r.png")
    assert (tmp_path / "r.png").stat().st_size > 10_000


def test_without_one_gpu_the_fewest_are_the_base():
    many = plan(presets=["385m"], gpus=[1, 2, 4], meshes=["fsdp"])
    rows: list[dict] = []
    for case, outcome in zip(
        make_cases(many),
        ({"status": "out of memory"}, *({"status": "ok", "step_ms": t} for t in (100, 125))),
        strict=True,
    ):
        rows.append(timed_row(case, many, outcome, rows, {}))
    assert [(row["base_gpus"], row["efficiency"]) for row in rows] == [(None, None), (2, 1.0), (2, pytest.approx(0.8))]


def test_time_of_collectives_by_axis():
    def kernel(name, start, length, **args):
        return {"ph": "X", "cat": "kernel", "name": name, "ts": start, "dur": length, "args": args}

    events = [
        kernel("gemm", 0, 4000),
        kernel("ncclDevKernel_AllGather", 2000, 4000, **{"Process Group Name": "7"}),
        kernel("ncclDevKernel_AllReduce", 9000, 1000, **{"External id": 3}),
        kernel("gemm", 9500, 2000),
        {"ph": "X", "cat": "cpu_op", "name": "record_param_comms", "ts": 0, "dur": 1,
         "args": {"External id": 3, "Process Group Name": "8"}},
        {"ph": "M", "name": "process_name"},
    ]  # fmt: skip
    times = times_of_nccl(events, {"7": "weights", "8": "tensor"}, steps=2)
    assert (times["ms_weights"], times["ms_tensor"], times["ms_sequence"]) == (2.0, 0.5, 0.0)
    assert (times["comm_ms"], times["comm_exposed_ms"]) == (2.5, 1.25)
    assert times_of_nccl(events[:1], {}, 2) == {}
