"""Folders with one writer, and outputs checked before the work."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tnllm.errors import UserError
from tnllm.files import LOCK, check_output_file, check_output_folder, only_writer, write_bytes_atomic

HOLD = """
import sys, time
from pathlib import Path
from tnllm.files import only_writer
with only_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""

NO_GUARD = """
from multiprocessing import get_context
from pathlib import Path
from tnllm.files import only_writer
with only_writer(Path("folder"), wait_s=float("inf")):
    process = get_context("spawn").Process(target=print)
    process.start()
    process.join()
    raise SystemExit(process.exitcode)
"""


def test_a_second_writer_is_refused_by_name_until_the_first_dies(tmp_path):
    folder = tmp_path / "run"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None and first.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=rf"^.* is being written by pid {first.pid} on .*; wait for it, or .*$"):
            only_writer(folder).__enter__()
        first.send_signal(signal.SIGKILL)
    assert json.loads((folder / LOCK).read_text())["pid"] == first.pid
    with only_writer(folder):
        assert json.loads((folder / LOCK).read_text())["pid"] == os.getpid()
    assert not (folder / LOCK).exists()


def test_the_lock_of_another_machine_is_explained_and_can_be_forced(tmp_path):
    record = {
        "written_by": "tnllm train tiny",
        "pid": 7,
        "host": "node-17",
        "boot": "x",
        "since": "2026-01-01T00:00:00",
    }
    (tmp_path / LOCK).write_text(json.dumps(record))
    with (
        pytest.raises(
            UserError, match=r"by pid 7 on node-17 \(tnllm train tiny, .*; if it has ended, add --force-unlock"
        ),
        only_writer(tmp_path, force=False),
    ):
        pass
    with pytest.raises(UserError, match=rf"if it has ended, remove {tmp_path / LOCK}"), only_writer(tmp_path):
        pass
    assert json.loads((tmp_path / LOCK).read_text()) == record
    with only_writer(tmp_path, force=True):
        pass
    assert not (tmp_path / LOCK).exists()


def test_force_never_takes_a_lock_that_is_held(tmp_path):
    refused = pytest.raises(UserError, match=f"written by pid {os.getpid()} on")
    with only_writer(tmp_path), refused, only_writer(tmp_path, force=True):
        pass


@pytest.mark.parametrize("content", ["", "null", "\udcff"])
def test_a_record_that_says_nothing_blocks_nobody(tmp_path, content):
    (tmp_path / LOCK).write_bytes(content.encode("utf-8", "surrogateescape"))
    with only_writer(tmp_path):
        pass


def test_a_folder_made_for_nothing_is_removed(tmp_path):
    with pytest.raises(UserError), only_writer(tmp_path / "a" / "b"):
        raise UserError("bad input")
    assert not (tmp_path / "a").exists()
    with only_writer(tmp_path / "a" / "b") as handle:
        assert not os.get_inheritable(handle)
        (tmp_path / "a" / "b" / "file").touch()
    assert [path.name for path in Path(tmp_path / "a" / "b").iterdir()] == ["file"]


def test_an_error_names_the_file_that_was_asked_for(tmp_path):
    with pytest.raises(OSError, match=r"No such file or directory: '[^']*/no/such/out'$") as error:
        write_bytes_atomic(tmp_path / "no/such/out", b"")
    assert error.value.filename == str(tmp_path / "no/such/out")


def test_a_device_is_written_as_it_is():
    write_bytes_atomic(Path("/dev/null"), b"gone")
    check_output_file(Path("/dev/null"), "--out")
    assert not Path("/dev/null").is_file()


def test_a_read_only_file_is_kept(tmp_path, monkeypatch):
    (tmp_path / "kept").write_text("kept")
    # Root may write everything, so that permissions alone cannot show it here.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match="kept, which may not be written"):
        check_output_file(tmp_path / "kept", "--out")


@pytest.mark.parametrize("name", ["file", "file/a/b"])
def test_a_folder_below_a_file_is_refused(tmp_path, name):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--out is .*, and .*/file is a file, not a folder"):
        check_output_folder(tmp_path / name, "--out")
    with pytest.raises(UserError, match="is a file, or below one, not a folder"), only_writer(tmp_path / name):
        pass


def test_a_folder_that_can_be_made_is_not_made_yet(tmp_path):
    check_output_folder(tmp_path / "a/b", "--out")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="nothing can be written into /proc"):
        check_output_folder(Path("/proc/a/b"), "--out")


@pytest.mark.parametrize("there", [True, False], ids=["file", "nothing yet"])
def test_a_link_stays_one_and_its_target_is_written(tmp_path, there):
    target, link = tmp_path / "elsewhere" / "target.txt", tmp_path / "link.txt"
    target.parent.mkdir()
    if there:
        target.write_text("before")
    link.symlink_to("elsewhere/target.txt")
    check_output_file(link, "--output")
    write_bytes_atomic(link, b"after")
    assert link.is_symlink() and target.read_text() == "after"
    assert [path.name for path in target.parent.iterdir()] == ["target.txt"]


def test_a_link_into_a_missing_folder_is_named_before_the_work(tmp_path):
    link = tmp_path / "link.txt"
    link.symlink_to(tmp_path / "none" / "target.txt")
    with pytest.raises(UserError, match=r"link.txt: there is no folder .*none; make it first"):
        check_output_file(link, "--output")


def test_a_script_without_a_main_guard_is_told_so(tmp_path):
    """Its workers import it, and would wait for ever for the lock that their parent holds."""
    (tmp_path / "script.py").write_text(NO_GUARD)
    command = [sys.executable, "script.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 1 and (tmp_path / "folder").is_dir() is False
    assert 'tnllm: a worker ran the whole script again; put its code under if __name__ == "__main__":' in done.stderr
