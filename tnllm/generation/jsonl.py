"""Batches in files: one JSON object per line in, one per result out.

    in   {"prompt": "Once upon a time", "id": 7, "max_tokens": 20}
    out  {"index": 0, "id": 7, "sample": 0, "text": "...", "finish_reason": "length", "tokens": [...], "logprobs": null,
          "seed": 1, "usage": {"prompt_tokens": 5, "completion_tokens": 20, "total_tokens": 25}}

`id` is any JSON value and is copied to the results; every other key is a sampling option for this line only.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from tnllm.errors import UserError
from tnllm.generation.loading import LoadedModel
from tnllm.generation.sampler import SamplingParams
from tnllm.generation.samples import Result, TokenLogprob


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
            raise UserError(f"{name}:{number}: not JSON ({error})") from None
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
        json.dumps(values.get("id"), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise UserError('"id" holds a lone surrogate, which is not Unicode text') from None
    own = {key: value for key, value in values.items() if key not in ("prompt", "id")}
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
        "logprobs": None if logprobs is None else [_logprob(entry) for entry in logprobs],
        "seed": result.seed,
        "usage": {
            "prompt_tokens": result.prompt_tokens,
            "completion_tokens": len(result.tokens),
            "total_tokens": result.prompt_tokens + len(result.tokens),
        },
    }


def _logprob(entry: TokenLogprob) -> dict[str, Any]:
    row: dict[str, Any] = {"id": entry.id, "text": entry.text, "logprob": entry.logprob}
    return row | {"top": [{"id": top.id, "text": top.text, "logprob": top.logprob} for top in entry.top]}


@contextmanager
def part_file(path: Path) -> Iterator[TextIO]:
    """A file that is written as `path`.part and renamed when it is complete; an interrupted run leaves the part."""
    part = path.with_name(f"{path.name}.part")
    with open(part, "w", encoding="utf-8", newline="\n") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
