"""A file of token-id requests, to score tasks on a machine that has neither their data nor the harness.

save_bundle(Path("mmlu.npz.xz"), Bundle(requests, questions, answers, {"tasks": ["mmlu"]}))
bundle = load_bundle(Path("mmlu.npz.xz"))

counts = count_tokens(bundle.requests)         # one by one, equal inputs once, shared; needs no model
"""

import io
import json
import lzma
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tnllm.errors import UserError
from tnllm.files import write_bytes_atomic
from tnllm.generation.prefix_tree import PrefixTree, Request


@dataclass(frozen=True)
class Bundle:
    """Log-likelihood requests, question by question, in the order of a question's choices."""

    requests: list[Request]
    questions: list[int]  # index of each request's question
    answers: list[int]  # index of each question's right choice, -1 if it has none
    about: dict[str, Any]


def count_tokens(requests: Sequence[Request]) -> dict[str, int]:
    """Count the tokens computed one by one, with a question's equal inputs computed once, and with shared prefixes."""
    inputs = {(id(request.context), *request.continuation[:-1]): request for request in requests}.values()
    once = sum(len(request.context) + len(request.continuation) - 1 for request in inputs)
    tree = PrefixTree(requests)
    return {
        "requests": len(requests), "one_by_one": tree.plain_tokens, "equal_inputs_once": once,
        "shared": tree.num_tokens,
    }  # fmt: skip


def save_bundle(path: Path, bundle: Bundle) -> None:
    """Write a compressed file, completely or not at all."""
    # The choices of a question share one context object, which is stored once.
    by_id = {id(request.context): request.context for request in bundle.requests}
    index_of = {key: index for index, key in enumerate(by_id)}
    contexts = list(by_id.values())
    context_of = [index_of[id(request.context)] for request in bundle.requests]
    arrays = {
        "contexts": np.concatenate([np.array(ids, np.int32) for ids in contexts]),
        "context_lengths": np.array([len(ids) for ids in contexts], np.int32),
        "context_of": np.array(context_of, np.int32),
        "continuations": np.concatenate([np.array(request.continuation, np.int32) for request in bundle.requests]),
        "continuation_lengths": np.array([len(request.continuation) for request in bundle.requests], np.int32),
        "questions": np.array(bundle.questions, np.int32),
        "answers": np.array(bundle.answers, np.int32),
        "about": np.array(json.dumps(bundle.about)),
    }
    data = io.BytesIO()
    np.savez(data, allow_pickle=False, **arrays)
    write_bytes_atomic(path, lzma.compress(data.getvalue(), preset=6))


def load_bundle(path: Path) -> Bundle:
    """Read a file of `save_bundle`. Raises UserError for anything else."""
    if not path.is_file():
        raise UserError(f"{path} is not a file; write one with `tnllm eval requests`")
    try:
        with np.load(io.BytesIO(lzma.decompress(path.read_bytes())), allow_pickle=False) as data:
            arrays = {name: data[name] for name in data.files}
        contexts = np.split(arrays["contexts"], arrays["context_lengths"].cumsum()[:-1])
        continuations = np.split(arrays["continuations"], arrays["continuation_lengths"].cumsum()[:-1])
        lists = [ids.tolist() for ids in contexts]
        requests = [
            Request(lists[number], ids.tolist())
            for number, ids in zip(arrays["context_of"].tolist(), continuations, strict=True)
        ]
        about = json.loads(str(arrays["about"]))
        return Bundle(requests, arrays["questions"].tolist(), arrays["answers"].tolist(), about)
    except (lzma.LZMAError, ValueError, KeyError, EOFError, OSError, IndexError) as error:
        raise UserError(f"{path} is not a file of requests ({error}); write one with `tnllm eval requests`") from None
