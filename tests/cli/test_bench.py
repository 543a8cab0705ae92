"""`tnllm bench-attn`, `bench-train` and `bench-scale` as typed."""

import json

import pytest

from tnllm.cli.main import main


def run(capfd, *args):
    with pytest.raises(SystemExit) as stop:
        main(list(args))
    return stop.value.code, *capfd.readouterr()


def test_bench_attn_on_cpu(capfd, tmp_path):
    file = tmp_path / "a.json"
    code, out, err = run(
        capfd, "bench-attn", "--device", "cpu", "--seqlens", "64:128", "--seconds", "0.01", "--json", str(file)
    )
    assert code == 0
    assert "no GPU in use" in err and f"wrote {file}" in err
    assert "1 x 4 x 128 x 64" in out and "x floor" in out
    assert {row["length"] for row in json.loads(file.read_text())["rows"]} == {64, 128}


def test_constant_tokens(capfd, tmp_path):
    file = tmp_path / "a.json"
    args = ("--fixed-tokens", "256", "--seqlens", "64,128", "--providers", "tnllm", "--seconds", "0.01")
    assert run(capfd, "bench-attn", "--device", "cpu", *args, "--json", str(file))[0] == 0
    assert [(row["batch"], row["length"]) for row in json.loads(file.read_text())["rows"]] == [(4, 64), (2, 128)]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--seqlens", "1q"], "--seqlens has '1q'; write tokens such as 1000, 64k (65536) or 1m (1048576)"),
        (["--seqlens", "4k:1k"], "the first length must not exceed the second"),
        (["--seqlen", "64", "--seqlens", "64"], "both --seqlen and --seqlens are given"),
        (["--shape", "1x2x3"], "write BATCHxHEADSxLENGTHxDIM"),
        (["--shape", "1x2x3x4", "--seqlen", "5"], "--shape gives lengths itself"),
        (["--dtype", "int8"], "--dtype is 'int8'; allowed: bf16, fp16, fp32"),
        (["--providers", "tnlm"], "did you mean 'tnllm'?"),
        (["--device", "tpu"], "--device is 'tpu'; allowed: auto, cpu, cuda, cuda:N"),
    ],
)
def test_bad_input(capfd, args, message):
    code, out, err = run(capfd, "bench-attn", *args)
    assert code == 2 and out == ""
    assert message in err and err.strip().splitlines()[-1].startswith("tnllm: ")


@pytest.mark.slow
def test_bench_train_on_cpu(capfd, tmp_path):
    file = tmp_path / "t.json"
    args = ("--seqlens", "32,64", "--tokens-per-batch", "64", "--steps", "1", "--warmup", "0", "--json", str(file))
    code, out, err = run(capfd, "bench-train", "--device", "cpu", *args)
    assert code == 0
    assert "no GPU in use: small sizes" in err and f"wrote {file}" in err
    assert "tiny: transnormer over transformer, tokens/s: " in out
    rows = json.loads(file.read_text())["rows"]
    assert [(row["rows"], row["seq_len"]) for row in rows] == [(2, 32), (2, 32), (1, 64), (1, 64)]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--preset", "386m"], "did you mean '385m'?"),
        (["--kinds", "transnormer,rnn"], "--kinds has 'rnn'; allowed: transnormer, transformer"),
        (
            ["--activation-checkpointing", "some"],
            "--activation-checkpointing has 'some'; allowed: none, selective, full",
        ),
        (["--batch", "2", "--tokens-per-batch", "1k"], "both --batch and --tokens-per-batch are given"),
        (["--same", "flops"], "--same is 'flops'; allowed: width, parameters"),
        (["--json", "/no/such/folder/t.json"], "there is no folder /no/such/folder"),
        (["--plot", "t.gif"], "its name must end in .png, .svg or .pdf"),
    ],
)
def test_bench_train_bad_input(capfd, args, message):
    code, out, err = run(capfd, "bench-train", *args)
    assert code == 2 and out == ""
    assert message in err and err.strip().splitlines()[-1].startswith("tnllm: ")


def test_bench_scale_on_cpu(capfd, tmp_path, monkeypatch):
    """What is asked for and what is written; tests/bench/test_scale.py starts the ranks."""
    from tnllm.bench import scale

    asked = []

    def bench(plan, log, on_row, folder, budget):
        asked.append(plan)
        assert folder == tmp_path / "s.json.cases"
        device = {"device": "cpu", "dtype": "float32", "matmul_tflop_per_s": None}
        results = {"environment": device, "accuracy": [], "rows": [], "longest": []}
        on_row("environment", device, results)
        for case in (case for case in scale.make_cases(plan) if "time" in case.phases):
            row = scale.timed_row(
                case, plan, {"status": "ok", "step_ms": 1, "low_ms": 1, "high_ms": 2}, results["rows"], {}
            )
            results["rows"].append(row)
            on_row("rows", row, results)
            # An interrupted run leaves its rows.
            assert len(json.loads(file.read_text())["rows"]) == len(results["rows"])
        return results

    monkeypatch.setattr(scale, "bench_scaling", bench)
    file = tmp_path / "s.json"
    code, out, err = run(
        capfd, "bench-scale", "--device", "cpu", "--json", str(file), "--gpus", "2,4", "--meshes", "fsdp,sp"
    )
    assert code == 0
    assert "CPU processes instead, whose figures say nothing about GPUs" in err and f"wrote {file}" in err
    assert (asked[0].presets, asked[0].gpus, asked[0].compiled) == (["tiny"], [1, 2, 4], False)
    assert [row["mesh"] for row in json.loads(file.read_text())["rows"]] == ["one", "one", "fsdp", "sp", "fsdp", "sp"]
    assert "tiny sp: a row 4 times as long on 4 ranks takes 1.00 times one rank's time per token of a rank" in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--preset", "386m"], "did you mean '385m'?"),
        (["--meshes", "fsdp,pp"], "--meshes has 'pp'; write fsdp, sp, tp, ddp, several axes joined by +"),
        (
            ["--meshes", "shard=2+sequence=2"],
            "--meshes has 'shard=2+sequence=2', which fits none of the numbers of GPUs",
        ),
        (["--meshes", "tp", "--gpus", "4"], "tiny on tp: parallel.tensor is 4; it must divide model.num_heads 2"),
        (["--gpus", "two"], "--gpus is 'two'; write numbers with commas, such as 1,2,4"),
        (["--longest"], "--longest fills a GPU's memory; it needs a GPU"),
        (
            ["--activation-checkpointing", "some"],
            "--activation-checkpointing is 'some'; allowed: none, selective, full",
        ),
        (["--plot", "t.gif"], "its name must end in .png, .svg or .pdf"),
    ],
)
def test_bench_scale_bad_input(capfd, args, message):
    code, out, err = run(capfd, "bench-scale", "--device", "cpu", *args)
    assert code == 2 and out == ""
    assert message in err and err.strip().splitlines()[-1].startswith("tnllm: ")


def test_bench_scale_counts_gpus(capfd, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    code, _, err = run(capfd, "bench-scale", "--gpus", "1,4")
    assert code == 2 and "--gpus is 1,4, but torch sees 2; give at most that many" in err


@pytest.mark.parametrize("command", ["bench-attn", "bench-decode", "bench-train", "bench-scale"])
def test_files_are_checked_before_anything_is_timed(capfd, command):
    for args, message in (
        (["--json", "no/such/t.json"], "no/such/t.json: there is no folder no/such; make it first"),
        (["--plot", "chart.txt"], "--plot is chart.txt; its name must end in .png"),
    ):
        code, _, err = run(capfd, command, *args)
        assert code == 2 and message in err
