"""What a model has read, as a value: keep it, fork it, save it, continue it many times.

    [book] = read(model, [book_ids])                     # in chunks, in constant memory
    [first, second] = read(model, [question, other], [book, book])
    save_context("book.state", book, weights_hash(model))
    book = load_context("book.state", model, weights_hash(model))

A context holds all that generation needs: the recurrent state after the last token, the logits for the next one, which
tokens occurred (for the repetition penalty) and the last few ids (a character may be split between tokens). Generation
from a saved context equals generation that never stopped.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from tnllm.errors import UserError
from tnllm.files import write_bytes_atomic
from tnllm.generation.text import TAIL_TOKENS
from tnllm.modeling.cache import is_cache
from tnllm.modeling.model import LanguageModel
from tnllm.modeling.packing import pack
from tnllm.modeling.state import State

# Tokens prefilled at once, all prompts together: enough for efficient matrix products, and few enough that the activations
# of one chunk fit. A prompt of any length needs no more memory.
CHUNK_TOKENS = 2048
_FORMAT = "tnllm-context-1"
# No text is longer, and sums of positions stay far from the limit of int64.
_MAX_POSITION = 1 << 48


@dataclass(frozen=True)
class Context:
    """A text that a model has read. Immutable."""

    state: State  # 1 row
    logits: Tensor  # [1, V] fp32, of the token after the last one
    seen: Tensor  # [1, V] bool, the tokens that occurred
    tail: tuple[int, ...]  # the last few ids

    @property
    def num_tokens(self) -> int:
        """Tokens read so far."""
        return int(self.state.position[0])

    @property
    def nbytes(self) -> int:
        return self.state.nbytes + self.logits.nbytes + self.seen.nbytes

    def to(self, device: torch.device | str) -> "Context":
        """The same on another device, without the unfilled slots of caches."""
        state = self.state.select([0]) if self.state.grows else self.state
        return Context(state.to(device), self.logits.to(device), self.seen.to(device), self.tail)


@torch.no_grad()
def read(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    contexts: Sequence[Context | None] | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
) -> list[Context]:
    """Prefill each prompt, after its context if it has one; given contexts are not changed.

    Prompts of unequal length are packed, so padding never enters a state, and a pass has at most `chunk_tokens` tokens. A
    prompt may be empty only after a context. Raises UserError for an id outside the
    model's vocabulary.
    """
    if contexts is None:
        contexts = [None] * len(prompts)
    assert len(contexts) == len(prompts) and chunk_tokens >= 1
    vocab_size = model.config.vocab_size
    for prompt, context in zip(prompts, contexts, strict=True):
        assert prompt or context, "an empty prompt without a context has no next token"
        if prompt and not 0 <= min(prompt) <= max(prompt) < vocab_size:
            bad = next(id for id in prompt if not 0 <= id < vocab_size)
            raise UserError(f"token id {bad} is outside the model's vocabulary of {vocab_size}")
    states = [context.state if context else model.init_state(1) for context in contexts]
    logits = [context.logits if context else None for context in contexts]
    for group in _chunks([len(prompt) for prompt in prompts], chunk_tokens):
        rows = [row for row, _, _ in group]
        pieces = [list(prompts[row][start:end]) for row, start, end in group]
        before = states[rows[0]] if len(rows) == 1 else State.cat([states[row] for row in rows])
        hidden, after = _hidden(model, pieces, before)
        for index, (row, _, end) in enumerate(group):
            states[row] = after if len(rows) == 1 else after.select([index])
            if end == len(prompts[row]):
                logits[row] = model.logits(hidden[index : index + 1])
    return [
        after_reading(prompt, context, state, row)
        for prompt, context, state, row in zip(prompts, contexts, states, logits, strict=True)
    ]


def _chunks(lengths: list[int], chunk_tokens: int) -> list[list[tuple[int, int, int]]]:
    """Split prompts into passes of at most `chunk_tokens` tokens: lists of (prompt, start, end)."""
    passes: list[list[tuple[int, int, int]]] = []
    room = 0
    for row, length in enumerate(lengths):
        start = 0
        while start < length:
            if room == 0:
                passes.append([])
                room = chunk_tokens
            end = min(length, start + room)
            passes[-1].append((row, start, end))
            room -= end - start
            start = end
    return passes


def _hidden(model: LanguageModel, pieces: list[list[int]], state: State) -> tuple[Tensor, State]:
    """Hidden states [N, M] of the last token of each piece, and the state after it."""
    tokens, cu_seqlens = (tensor.to(model.device) for tensor in pack(pieces))
    if len(pieces) == 1:
        hidden, state = model.hidden(tokens, state)
        return hidden[:, -1], state
    hidden, state = model.hidden(tokens, state, cu_seqlens)
    return hidden[0, cu_seqlens[1:].long() - 1], state


def after_reading(
    prompt: Sequence[int] | np.ndarray, before: Context | None, state: State, logits: Tensor | None
) -> Context:
    """The context after `prompt`, which follows `before`; `state` and `logits` [1, V] are those after its last token."""
    assert logits is not None
    if before is None:
        seen = torch.zeros_like(logits, dtype=torch.bool)
        tail: tuple[int, ...] = ()
    else:
        seen, tail = before.seen.clone(), before.tail
    seen[0, torch.from_numpy(np.asarray(prompt, dtype=np.int64)).to(seen.device)] = True
    return Context(state, logits, seen, (*tail, *map(int, prompt[-TAIL_TOKENS:]))[-TAIL_TOKENS:])


def weights_hash(model: LanguageModel) -> str:
    """SHA-256 (hex) over the model's config and every weight in its dtype: only an equal model may use a saved state."""
    digest = hashlib.sha256(model.config.model_dump_json(exclude=model.config.unset).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def context_bytes(context: Context, weights: str, **more: str) -> bytes:
    """A context as a safetensors file. `weights` is `weights_hash(model)`; `more` is kept beside it, if not empty."""
    state = context.state
    tensors = {f"layers.{index}": layer for index, layer in enumerate(state.layers)}
    tensors |= {"position": state.position, "logits": context.logits, "seen": context.seen.view(torch.uint8)}
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {
        "format": _FORMAT,
        "weights": weights,
        "num_tokens": str(context.num_tokens),
        "tail": json.dumps(context.tail),
        "sha256": _digest(tensors),
    }
    metadata |= {key: value for key, value in more.items() if value}
    metadata["metadata_sha256"] = _metadata_digest(metadata)
    return save(tensors, metadata)


def save_context(path: Path | str, context: Context, weights: str, messages: str = "") -> None:
    """Write a context to a safetensors file, atomically. `weights` is `weights_hash(model)`.

    `messages` is kept beside it, for `read_metadata`.
    """
    write_bytes_atomic(Path(path), context_bytes(context, weights, messages=messages))


def read_metadata(path: Path | str) -> dict[str, str]:
    """What a state file says of itself, read without its tensors. Raises UserError for a file that is not one."""
    path = Path(path)
    if not path.is_file():
        what = "is not a file" if path.exists() else "does not exist"
        raise UserError(f"state file {path} {what}; write one with --state-out")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise UserError(f"state file {path} is damaged or not a state file ({error}); write it again") from None
    if metadata.get("format") != _FORMAT or "weights" not in metadata:
        raise UserError(f"{path} is not a state file this version can read; write one with --state-out")
    return metadata


def load_context(path: Path | str, model: LanguageModel, weights: str) -> Context:
    """Read a context back onto the model's device.

    Raises UserError for a missing or damaged file, another kind of file and the context of another model.
    """
    metadata = read_metadata(path)
    return context_from_bytes(Path(path).read_bytes(), metadata, model, weights, f"state file {path}")


def metadata_of_bytes(data: bytes, name: str) -> dict[str, str]:
    """`read_metadata` of a file's bytes; `name` is for errors. Raises UserError unless the metadata have their digest."""
    try:
        # The header's length, then the header, in JSON.
        metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        digest = metadata["metadata_sha256"]
        if metadata["format"] != _FORMAT or "sha256" not in metadata or "weights" not in metadata:
            raise KeyError("format")
        is_whole = digest == _metadata_digest(metadata)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{name} is not a state of this format ({_FORMAT})") from None
    if not is_whole:
        raise UserError(f"{name} is damaged: its metadata do not match their digest; write it again")
    return dict(metadata)


def context_from_bytes(
    data: bytes, metadata: dict[str, str], model: LanguageModel, weights: str, name: str, device: str | None = None
) -> Context:
    """The context in a file's bytes, on `device`, or else the model's. `name` is for errors, which `load_context` lists."""
    if metadata["weights"] != weights:
        raise UserError(
            f"{name} was written with other weights ({metadata['weights'][:12]}, here {weights[:12]}); "
            "give the --model and --dtype it was written with"
        )
    try:
        tensors = load(data)
        tail = json.loads(metadata["tail"])
    except (SafetensorError, KeyError, ValueError, RecursionError) as error:
        raise UserError(f"{name} is damaged ({type(error).__name__}: {error}); write it again") from None
    for fault in _faults(tensors, tail, metadata, model):
        raise UserError(f"{name} is damaged: {fault}; write it again")
    tensors = {key: tensor.to(device or model.device) for key, tensor in tensors.items()}
    layers = [tensors[f"layers.{index}"] for index in range(model.config.num_layers)]
    return Context(State(layers, tensors["position"]), tensors["logits"], tensors["seen"].view(torch.bool), tuple(tail))


def _faults(tensors: dict[str, Tensor], tail: Any, metadata: dict[str, str], model: LanguageModel) -> Iterator[str]:
    """What contradicts a context of `model`, in words. Each check relies on those before it."""
    vocab_size, fresh = model.config.vocab_size, model.init_state(1)
    wanted = {f"layers.{index}": layer for index, layer in enumerate(fresh.layers)}
    wanted |= {
        "position": fresh.position,
        "logits": torch.empty(1, vocab_size, device="meta"),
        "seen": torch.empty(1, vocab_size, dtype=torch.uint8, device="meta"),
    }
    if tensors.keys() != wanted.keys():
        names = sorted(tensors.keys() ^ wanted.keys())
        yield f"it lacks tensors of this model or holds others ({', '.join(names[:4])}{' ...' if names[4:] else ''})"
    # All caches are as long as the text, or a little longer; a recurrent state has one shape.
    caches = {name for name, tensor in wanted.items() if is_cache(tensor)}
    lengths = {tensors[name].shape[2] for name in caches if is_cache(tensors[name])}
    for name, tensor in wanted.items():
        shape, given = list(tensor.shape), tensors[name]
        if name in caches:
            shape[2] = max(lengths, default=0)
        if list(given.shape) != shape or given.dtype != tensor.dtype:
            yield f"{name} is {given.dtype} {list(given.shape)}, not {tensor.dtype} {shape}"
    position = int(tensors["position"][0])
    if str(position) != metadata.get("num_tokens"):
        yield f"its position is {position}, not the number of tokens it was written with"
    if not 0 <= position < _MAX_POSITION or (lengths and position > max(lengths)):
        yield f"its position is {position}"
    if not isinstance(tail, list) or len(tail) > TAIL_TOKENS:
        yield "the ids of its last tokens are not a short list"
    for id in tail:
        if type(id) is not int or not 0 <= id < vocab_size:
            yield f"its last tokens hold {id!r}, which is not in the vocabulary of {vocab_size}"
    if int(tensors["seen"].max()) > 1 or not all(tensors[name].isfinite().all() for name in wanted):
        yield "it holds numbers that no model writes"
    if "sha256" in metadata and metadata["sha256"] != _digest(tensors):
        yield "its bytes do not match their digest"
    if "metadata_sha256" in metadata and metadata["metadata_sha256"] != _metadata_digest(metadata):
        yield "its metadata do not match their digest"


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        # A flat copy, since a tensor without elements cannot be viewed as bytes.
        digest.update(name.encode() + tensors[name].flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _metadata_digest(metadata: dict[str, str]) -> str:
    rest = sorted((key, value) for key, value in metadata.items() if key != "metadata_sha256")
    return hashlib.sha256(json.dumps(rest).encode()).hexdigest()
