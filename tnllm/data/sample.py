"""The corpora that ship, written out as plain files.

write_sample("sample", Path("corpus"))      # [corpus/sample.jsonl, corpus/NOTICE]
"""

from pathlib import Path

from tnllm import assets
from tnllm.data.compressed import read_bytes
from tnllm.data.corpus import find_files
from tnllm.errors import UserError
from tnllm.files import check_output_folder, only_writer, write_bytes_atomic


def write_sample(name: str, out: Path) -> list[Path]:
    """Write the files of the corpus `name` (see `assets.named`), decompressed, and NOTICE to the folder `out`.

    Raises UserError, before anything is written, if a file is there already.
    """
    check_output_folder(out, "--out")
    contents = {out / path.name.removesuffix(".xz"): path for path in find_files([name])}
    contents[out / "NOTICE"] = assets.folder() / "NOTICE"
    with only_writer(out):
        for path in contents:
            if path.exists():
                raise UserError(f"{path} exists; choose another folder")
        for path, source in contents.items():
            write_bytes_atomic(path, read_bytes(source))
    return list(contents)
