"""Output folders at URLs: written to a local folder, which is uploaded when it is finished and then removed.

folder = begin_output("s3://bucket/tokens", inputs)         # a path stays itself
...                                                         # write to `folder`; a stopped run resumes there
finish_output("s3://bucket/tokens", folder, last="manifest.json")

A mark lies at the URL until all is uploaded, and the file that readers look for comes last, so what was interrupted never
looks complete. The same command uploads again.
"""

import hashlib
import shutil
from collections.abc import Iterable
from pathlib import Path

from tnllm.data.remote import is_remote, local_path, network, open_url
from tnllm.errors import UserError
from tnllm.files import LOCK, format_bytes, only_writer
from tnllm.progress import log

_MARK = ".uploading"
# What only a later run on this machine needs.
_LOCAL = ("work", LOCK)


def begin_output(out: str | Path, inputs: Iterable[str | Path] = ()) -> Path:
    """The local folder for an output; for a URL one in ~/.cache/tnllm/outputs, the same in every run.

    Raises UserError for a URL that holds files, that cannot be written, or that is one of `inputs`, inside or around one.
    """
    if not is_remote(out):
        return Path(local_path(out))
    url = str(out).rstrip("/") + "/"
    for given in inputs:
        other = str(given).rstrip("/") + "/"
        if url.startswith(other) or other.startswith(url):
            raise UserError(f"the output {out} lies in its own input {given}, or around it; choose another output")
    storage, path = open_url(url)
    with network(url, "be written"):
        names = storage.find(path) if storage.exists(path) else []
        if names and not any(name.endswith(f"/{_MARK}") for name in names):
            raise UserError(f"{out} holds files already ({names[0]}); choose another output, or remove them first")
        # Only an attempt tells whether the work may be saved here.
        storage.makedirs(path, exist_ok=True)
        storage.pipe_file(f"{path.rstrip('/')}/{_MARK}", b"tnllm is writing here\n")
    name = url.rstrip("/").rpartition("/")[2]
    folder = Path.home() / ".cache/tnllm/outputs" / f"{name}-{hashlib.sha256(url.encode()).hexdigest()[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    log(f"writing to {folder}, uploaded to {out} at the end")
    return folder


def finish_output(out: str | Path, folder: Path, last: str) -> None:
    """Upload what `begin_output` gave, the file `last` after all others, and remove it here. A path stays as it is.

    Raises RunError if the network fails; what was written is kept, and the same command uploads it. Raises UserError if
    another process uploads it.
    """
    if not is_remote(out):
        return
    storage, path = open_url(str(out).rstrip("/") + "/")
    path = path.rstrip("/")
    # Another process with the same command may have found the work done.
    with only_writer(folder):
        if not (folder / last).exists():
            raise UserError(f"another process has uploaded {out} just now")
        files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
        names = [str(file.relative_to(folder)) for file in files if file.relative_to(folder).parts[0] not in _LOCAL]
        names = [name for name in names if name != last and ".tmp" not in name] + [last]
        size = sum((folder / name).stat().st_size for name in names)
        log(f"uploading {len(names)} files, {format_bytes(size)}, to {out}")
        with network(str(out), "be written"):
            ours = {f"{path}/{name}".lstrip("/") for name in (*names, _MARK)}
            for stray in storage.find(path):
                # Left by an upload of other content that was interrupted.
                if stray.lstrip("/") not in ours:
                    storage.rm_file(stray)
            for name in names:
                storage.makedirs(f"{path}/{name}".rpartition("/")[0], exist_ok=True)
                storage.put_file(str(folder / name), f"{path}/{name}")
            storage.rm_file(f"{path}/{_MARK}")
        shutil.rmtree(folder)
