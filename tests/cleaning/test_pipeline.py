import gzip
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from datatrove.pipeline.base import PipelineStep

from tests.cleaning.texts import CHINESE, ENGLISH
from tnllm import assets
from tnllm.cleaning import report as reports
from tnllm.cleaning.executor import Stage, run_stages
from tnllm.cleaning.pipeline import open_run
from tnllm.cleaning.records import read_records
from tnllm.cleaning.run import clean as run_all
from tnllm.cleaning.settings import CleanSettings, SlurmSection
from tnllm.errors import RunError, UserError
from tnllm.files import only_writer, write_text_atomic

pytestmark = pytest.mark.slow


def clean(settings, out, workers=1):
    run = open_run(settings, out)
    assert run_stages(run.stages, "local", workers, settings.slurm, lambda progress: None)
    report = reports.build_report(run)
    reports.write_report(out, report)
    return report


def contents(out):
    files = [*sorted((out / "clean").iterdir()), *sorted((out / "rejected").iterdir())]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def sample(**sections):
    path = str(assets.named("dirty-sample"))
    return CleanSettings.model_validate(
        {
            "input": {"path": path, "shard_mb": 0.1},
            "rules": {"zh": {"length": [40, 200_000]}},
            "decontaminate": {"path": ["dirty-evaluation"]},
            "output": {"tally_field": "noise"},
            **sections,
        }
    )


@pytest.fixture(scope="module")
def cleaned(tmp_path_factory):
    out = tmp_path_factory.mktemp("cleaned") / "out"
    return out, clean(sample(), out)


def test_the_sample_loses_its_dirt_and_keeps_its_text(cleaned):
    _, report = cleaned
    removed = {kind: 1 - entry["out"] / entry["in"] for kind, entry in report["tally"].items()}
    for kind in ("foreign", "boilerplate page", "keywords", "fragment", "repetition", "evaluation text"):
        assert removed.pop(kind) == 1, kind
    assert removed.pop("lost encoding") > 0.95 and removed.pop("gibberish") > 0.9
    # Of each text with an exact and a near copy one of the three stays.
    copies = [report["tally"][kind] for kind in ("exact copy", "near copy")]
    assert sum(entry["in"] - entry["out"] for entry in copies) + report["tally"]["none"]["rejected"]["dedup"] >= 76
    # The rules cannot see that words are shuffled: that is for self-cleaning.
    assert removed.pop("shuffled") < 0.1
    assert report["tally"]["none"]["rejected"]["rules"] < 0.05 * report["tally"]["none"]["in"]
    for kind in ("tags", "broken encoding", "personal data", "boilerplate lines"):
        assert removed[kind] < 0.15, kind


def test_every_document_is_counted_and_kept_somewhere(cleaned):
    out, report = cleaned
    kept = [r for path in sorted((out / "clean").iterdir()) for r in read_records(path)]
    lost = [r for path in sorted((out / "rejected").iterdir()) for r in read_records(path)]
    assert len(kept) + len(lost) == report["documents_in"] and len(kept) == report["documents_out"]
    for before, after in zip(report["steps"], report["steps"][1:], strict=False):
        assert before["documents_out"] == after["documents_in"]
        assert before["documents_in"] - before["documents_out"] == sum(before["reasons"].values())
    for record in lost:
        assert record["rejected"]["step"] and record["rejected"]["reason"]
    rule = next(r["rejected"] for r in lost if r["rejected"]["step"] == "rules")
    low, high = rule["range"]
    assert (low is not None and rule["value"] < low) or (high is not None and rule["value"] > high)
    assert rule["figures"][rule["reason"].split()[0]] == rule["value"]
    assert not any("rejected" in record for record in kept)
    assert {"text", "id", "source", "lang", "where", "noise"} == set(kept[0])


def test_repaired_texts_read_well(cleaned):
    out, _ = cleaned
    kept = {r["id"]: r for path in sorted((out / "clean").iterdir()) for r in read_records(path)}
    by_kind = {kind: [r["text"] for r in kept.values() if r["noise"] == kind] for kind in ("tags", "personal data")}
    assert not any("<p" in text or "var a" in text or "&nbsp" in text for text in by_kind["tags"])
    assert all("<email>" in text and "<phone>" in text and "<ip>" in text for text in by_kind["personal data"])


def test_workers_change_nothing(cleaned, tmp_path):
    clean(sample(), tmp_path / "out", workers=2)
    assert contents(tmp_path / "out") == contents(cleaned[0])


def test_a_killed_run_resumes_to_the_same_result(cleaned, tmp_path):
    out = tmp_path / "out"
    (tmp_path / "r.yaml").write_text(json.dumps(sample().model_dump(mode="json")))
    command = [
        sys.executable,
        "-m",
        "tnllm",
        "data",
        "clean",
        str(tmp_path / "r.yaml"),
        "-o",
        str(out),
        "--workers",
        "1",
    ]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    done = out / "work" / "filter" / "completions"
    while process.poll() is None and not (done / "00001").exists():
        time.sleep(0.02)
    process.kill()
    process.wait()
    complete = {path.name: path.stat().st_mtime_ns for path in (out / "work" / "filtered").glob("0000[01]*")}
    assert len(complete) == 2
    clean(sample(), out)
    assert contents(out) == contents(cleaned[0])
    assert {name: (out / "work" / "filtered" / name).stat().st_mtime_ns for name in complete} == complete


def test_the_page_holds_everything_and_fetches_nothing(cleaned):
    out, report = cleaned
    page = (out / "report.html").read_text()
    assert "http" not in page and "<script" not in page
    for name in [step["step"] for step in report["steps"]] + list(report["tally"]):
        assert name in page
    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(report))
    shown = reports.render(report)
    assert "page-3.jsonl.xz:42: not UTF-8" in shown and "boilerplate page" in shown


def test_bad_input_is_counted_and_located(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    good = json.dumps({"text": ENGLISH.replace("\n", " ")})
    (folder / "a.jsonl").write_bytes(f'{good}\n{{"text": \n{{"body": 1}}\n[1]\n'.encode() + b'{"text": "caf\xe9"}\n')
    packed = gzip.compress(f"{good}\n".encode() * 30)
    (folder / "b.jsonl.gz").write_bytes(packed[:-20])
    (folder / "c.jsonl").write_text("")
    (folder / "d.jsonl").write_text('{"text": "' + "x" * 3_000_000 + '"}\n' + json.dumps({"text": CHINESE}) + "\n")
    (folder / "e.jsonl").write_text('{"text": ""}\n{"text": null}\n')
    settings = CleanSettings.model_validate({"input": {"path": str(folder), "max_line_mb": 1}})
    report = clean(settings, tmp_path / "out")
    assert report["steps"][0]["reasons"] == {"unreadable": 7, "empty": 1}
    named = "\n".join(report["unreadable"])
    for where, why in (
        ("a.jsonl:2", "invalid JSON"),
        ("a.jsonl:3", "no field 'text' (fields: body"),
        ("a.jsonl:4", "a list"),
        ("a.jsonl:5", "not UTF-8 (byte 14"),
        ("b.jsonl.gz", "is cut short or damaged after line"),
        ("d.jsonl:1", "the line is longer than 1.00 MiB (input.max_line_mb)"),
        ("e.jsonl:2", "field 'text' is null"),
    ):
        assert f"{where}: {why}" in named or f"{where} {why}" in named, where
    assert report["documents_out"] == 2


def test_the_recipe_may_say_stop(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\nnope\n')
    settings = CleanSettings.model_validate({"input": {"path": str(tmp_path / "a.jsonl"), "on_error": "stop"}})
    for workers in (1, 2):
        with pytest.raises(UserError, match=r"a.jsonl:2: invalid JSON .*; fix it, or set input.on_error to skip"):
            clean(settings, tmp_path / "out", workers)
    assert not list((tmp_path / "out").rglob("*.gz*"))


def test_one_process_at_a_time(tmp_path):
    out = tmp_path / "out"
    with only_writer(out), pytest.raises(UserError, match=r"out is being written by pid [0-9]+ on .*; wait for it"):
        run_all(sample(), out, 1, lambda progress: None)


def test_another_recipe_or_input_is_refused(cleaned, tmp_path):
    with pytest.raises(UserError, match=r"was made with rules.enabled true \(now false\); choose another folder"):
        open_run(sample(rules={"enabled": False}), cleaned[0])
    (tmp_path / "a.txt").write_text("one")
    settings = CleanSettings.model_validate({"input": {"path": str(tmp_path / "a.txt")}})
    open_run(settings, tmp_path / "out")
    (tmp_path / "a.txt").write_text("two")
    with pytest.raises(UserError, match=r"another content of .*a.txt"):
        open_run(settings, tmp_path / "out")
    open_run(settings, tmp_path / "out", overwrite=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    with pytest.raises(UserError, match="is not empty"):
        open_run(settings, tmp_path / "full")


class Fragile(PipelineStep):
    """Kills its own process the first time it does task 1."""

    type, name = "test", "fragile"

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def run(self, data=None, rank=0, world_size=1):
        if rank == 1 and not (self.folder / "died").exists():
            (self.folder / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        write_text_atomic(self.folder / f"task-{rank}", str(rank))
        return iter(())


def test_a_lost_worker_is_detected_and_its_task_runs_again(tmp_path):
    stage = Stage("fragile", [Fragile(tmp_path)], 3, tmp_path / "log")
    with pytest.raises(RunError, match="a worker died in stage fragile"):
        run_stages([stage], "local", 2, SlurmSection(), lambda progress: None)
    assert run_stages([stage], "local", 2, SlurmSection(), lambda progress: None)
    assert sorted(path.name for path in tmp_path.glob("task-?")) == ["task-0", "task-1", "task-2"]


def test_a_missing_cluster_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    stage = Stage("fragile", [Fragile(tmp_path)], 3, tmp_path / "log")
    with pytest.raises(UserError, match="there is no sbatch on this machine"):
        run_stages([stage], "slurm", 2, SlurmSection(), lambda progress: None)


def test_slurm_gets_all_stages_as_dependent_jobs(tmp_path, monkeypatch):
    """With an sbatch that only records its arguments."""
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\necho Submitted batch job $(wc -l < {tmp_path}/calls)\n'
    )
    sbatch.chmod(0o755)
    squeue = sbatch.with_name("squeue")
    squeue.write_text("#!/bin/sh\nexit 0\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sbatch.parent}:{os.environ['PATH']}")
    run = open_run(sample(), tmp_path / "out")
    assert not run_stages(run.stages, "slurm", 2, SlurmSection(partition="short"), lambda progress: None)
    calls = (tmp_path / "calls").read_text().splitlines()
    # datatrove submits each stage and, after it, a job that sums its counts.
    jobs = [call for call in calls if "RUN_OFFSET" in call]
    assert len(jobs) == len(run.stages) == 6
    assert [f"--dependency=afterok:{number}" in job for number, job in zip((1, 3, 5, 7, 9), jobs[1:], strict=True)] == [
        True
    ] * 5
    scripts = list((tmp_path / "out" / "work").rglob("launch_script.slurm"))
    assert len(scripts) == 6 and all("--partition=short" in path.read_text() for path in scripts)
    # Submitted twice, two jobs would write the same files.
    squeue.write_text("#!/bin/sh\necho 99\necho 7\necho 1\necho 1\n")
    with pytest.raises(UserError, match=r"^jobs 1, 7 of this run are queued or running; .*\(scancel 1 7\), then run"):
        run_stages(run.stages, "slurm", 2, SlurmSection(), lambda progress: None)
    squeue.write_text("#!/bin/sh\necho 99\n")
    sbatch.write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(UserError, match=r"sbatch refused the job"):
        run_stages(run.stages, "slurm", 2, SlurmSection(), lambda progress: None)
