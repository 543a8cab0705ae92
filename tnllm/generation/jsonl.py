"""Batches in files: one JSON object per line in, one per result out.

    in   {"prompt": "Once upon a time", "id": 7, "max_tokens": 20}
    out  {"index": 0, "id": 7, "sample": 0, "text": "...", "finish_reason": "length", "tokens": [...], "logprobs": null,
          "seed": 1, "usage": {"prompt_tokens": 5, "completion_tokens": 20, "total_tokens": 25}}

`id` is any JSON value and is copied to the results; every other key is a sampling option for this line only.

    with part_file(output, batch_identity(loaded, weights, requests), requests) as (file, first):
        ...                              # results of requests[first:], in order; a stopped batch resumes there
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from tnllm.errors import UserError
from tnllm.files import end_of_links, is_special, read_json, write_text_atomic
from tnllm.generation.loading import LoadedModel
from tnllm.generation.sampler import SamplingParams
from tnllm.generation.samples import Result


@dataclass(frozen=True)
class Request:
    """One line of a batch."""

    prompt: str
    ids: list[int]
    params: SamplingParams
    id: Any


def read_requests(
    name: str, data: bytes, loaded: LoadedModel, options: dict[str, Any], start: bool = True
) -> list[Request]:
    """Check and tokenize every line before anything is generated; blank lines are skipped.

    `options` are the values of keys that a line does not have. `start`: prompts start a text rather than continue a state.
    Raises UserError naming `name` and the line.
    """
    requests = []
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line.decode("utf-8-sig"), parse_constant=_no_constant)
            requests.append(_request(values, loaded, options, start))
        except UnicodeDecodeError as error:
            raise UserError(f"{name}:{number}: byte {error.start} of the line is not UTF-8; convert the file") from None
        except json.JSONDecodeError as error:
            raise UserError(f"{name}:{number}: not JSON ({error.msg} at column {error.colno})") from None
        except RecursionError:
            raise UserError(f"{name}:{number}: not JSON (it is nested too deep)") from None
        except ValueError as error:
            # Python's advice behind a semicolon is not for who wrote the file.
            raise UserError(f"{name}:{number}: not JSON ({str(error).partition(';')[0]})") from None
        except UserError as error:
            raise UserError(f"{name}:{number}: {error}") from None
    if not requests:
        raise UserError(f'{name} holds no request; write one JSON object per line, such as {{"prompt": "Once"}}')
    return requests


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _request(values: Any, loaded: LoadedModel, options: dict[str, Any], start: bool) -> Request:
    if not isinstance(values, dict) or not isinstance(values.get("prompt"), str):
        raise UserError('each line is a JSON object with a string "prompt"')
    try:
        json.dumps(values.get("id"), ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        raise UserError('"id" holds a lone surrogate, which is not Unicode text') from None
    except ValueError:
        raise UserError('"id" holds a number that is too large; write it as a string') from None
    own = {key: value for key, value in values.items() if key not in ("prompt", "id") and value is not None}
    if "max_new_tokens" in own:
        if "max_tokens" in own:
            raise UserError("max_tokens and max_new_tokens are the same option; give one of them")
        own["max_tokens"] = own.pop("max_new_tokens")
    params = loaded.params(**{**options, **own})
    return Request(values["prompt"], loaded.encode(values["prompt"], start), params, values.get("id"))


def result_object(result: Result, echo: str = "", id: Any = None) -> dict[str, Any]:
    """A result as JSON values; `echo` goes before the text."""
    row: dict[str, Any] = {"index": result.index}
    if id is not None:
        row["id"] = id
    logprobs = result.logprobs
    return row | {
        "sample": result.sample,
        "text": echo + result.text,
        "finish_reason": result.finish_reason,
        "tokens": result.tokens,
        "logprobs": None
        if logprobs is None
        else [
            {"id": entry.id, "text": entry.text, "logprob": entry.logprob}
            | {"top": [{"id": top.id, "text": top.text, "logprob": top.logprob} for top in entry.top]}
            for entry in logprobs
        ],
        "seed": result.seed,
        "usage": {
            "prompt_tokens": result.prompt_tokens,
            "completion_tokens": len(result.tokens),
            "total_tokens": result.prompt_tokens + len(result.tokens),
        },
    }


def part_path(path: Path) -> Path:
    """Where the results for `path`, of a link for where it leads, are until all are there."""
    path = end_of_links(path)
    return path.with_name(f"{path.name}.part")


def batch_identity(
    loaded: LoadedModel, weights: str, requests: Sequence[Request], state: str = "", echo: bool = False
) -> dict[str, str]:
    """What decides the results of a batch. `weights` is `weights_hash(model)`, `state` a digest of the state file."""
    parts = {
        "model": [weights, loaded.tokenizer.sha256, loaded.eos_ids],
        "state": state,
        "requests": [[request.ids, asdict(request.params), request.id] for request in requests],
        "--echo": echo,
    }
    return {name: hashlib.sha256(json.dumps(part).encode()).hexdigest() for name, part in parts.items()}


@contextmanager
def part_file(path: Path, identity: dict[str, str], requests: Sequence[Request]) -> Iterator[tuple[TextIO, int]]:
    """Yields a file for results, and the index of the first request that has none in it yet.

    The file is `path`.part until it is complete and then renamed; `path`.part.json says of which batch it is. Raises
    UserError if a part with results is of another batch. Devices and pipes are written as they are.
    """
    if is_special(path):
        with open(path, "w", encoding="utf-8") as file:
            yield file, 0
        return
    path = end_of_links(path)
    part, note = part_path(path), path.with_name(f"{path.name}.part.json")
    with open(part, "a", encoding="utf-8", newline="\n") as file:
        _lock(file, path)
        first = size = 0
        if part.stat().st_size:
            _check_identity(part, note, identity)
            first, size = _finished(part, requests)
        write_text_atomic(note, json.dumps(identity) + "\n")
        # A killed process may leave half a line; of a request with several samples all are generated again.
        file.truncate(size)
        yield file, first
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    note.unlink()


def _lock(file: TextIO, path: Path) -> None:
    """Hold the part until it is closed. Raises UserError if another process does."""
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(f"another process is writing {path}; wait for it, or give another file") from None


def _check_identity(part: Path, note: Path, identity: dict[str, str]) -> None:
    advice = "repeat the command that was stopped, or remove the file to start anew"
    if not note.is_file():
        raise UserError(f"{part} is not known to hold results of this batch; {advice}")
    before = read_json(note, advice)
    other = [name for name, digest in identity.items() if before.get(name) != digest]
    if other:
        raise UserError(f"{part} holds results of another batch ({', '.join(other)} differ); {advice}")


def _finished(part: Path, requests: Sequence[Request]) -> tuple[int, int]:
    """How many requests have all their results in `part`, and the bytes of these."""
    expected = ((index, sample) for index, request in enumerate(requests) for sample in range(request.params.n))
    first, size, read = 0, 0, 0
    with open(part, "rb") as file:
        for line, (index, sample) in zip(file, expected, strict=False):
            if not _is_result(line, index, sample):
                break
            read += len(line)
            if sample == requests[index].params.n - 1:
                first, size = index + 1, read
    return first, size


def _is_result(line: bytes, index: int, sample: int) -> bool:
    try:
        row = json.loads(line)
    except ValueError:
        return False
    return line.endswith(b"\n") and isinstance(row, dict) and (row.get("index"), row.get("sample")) == (index, sample)
