"""Conversations for fine-tuning: instruction files read, checked and turned into token ids with the answers marked.

    conversations = list(read_conversations([Path("alpaca.json"), Path("chats.jsonl")]))
    ids, counted = encode(conversations[0], tokenizer, "Human:\n{prompt}\nAssistant:\n")

Files hold one JSON object a line, or one JSON array of objects; .gz, .xz, .bz2 and .zst are decompressed. An object is
one of

    {"instruction": ..., "input": ..., "output": ...}                      alpaca; input may be empty or missing
    {"messages": [{"role": "user", "content": ...}, ...]}                  roles system (first), user, assistant
    {"conversations": [{"from": "human", "value": ...}, ...]}              the same in ShareGPT's format, or as above
    {"prompt": ..., "response": ...}                                       or "completion" in place of "response"

with, in any of them, a "system" text; in the first and last, earlier turns as "history": [[prompt, answer], ...], which are
learned like the last; and in a message "weight", "train" or "loss", 0 or 1: whether that answer is learned. Other keys
that change what a conversation is ("tools", an image) are refused; keys that are not read are named once.

A conversation is written as in the released models' fine-tuning: the template around each prompt, the answer, the
end token. A system message comes first, on a line of its own; so does alpaca's instruction if there is an input, but with
a system text or a history it is a line of the prompt, above the input.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tnllm import chat_template
from tnllm.data import compressed
from tnllm.data.compressed import read_bytes
from tnllm.data.documents import json_type
from tnllm.data.folders import files_below, is_unicode
from tnllm.errors import UserError
from tnllm.progress import log
from tnllm.tokenizer import Tokenizer

SUFFIXES = (".jsonl", ".ndjson", ".json")
_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant"}
_ROLES |= {"gpt": "assistant", "developer": "system"}
# Flags of single answers, by the names that OpenAI's files, axolotl, ms-swift and others give them.
_LEARNED_KEYS = ("weight", "train", "loss", "trainable", "training", "learn")
# Keys with which a conversation is not what its texts say, and flags whose sense differs between tools.
_REFUSED_KEYS = ["tools", "functions", "tool_calls", "function_call", "reasoning_content"]
_REFUSED_KEYS += ["image", "images", "video", "videos", "audio", "audios"]
_REFUSED_FLAGS = ("mask", "masked", "loss_mask", "loss_weight", "sample_weight", "weights", "train_detail")
# Preferences: each key that begins so, and the flags of single answers, which may say that an answer is bad.
_PREFERENCES = ("chosen", "rejected")
_VERDICTS = ("label", "kto_tag")
# Keys that say where a record is from, and nothing about what is learned.
_HARMLESS_KEYS = {"id", "idx", "index", "uuid", "prompt_id", "conversation_id", "source", "dataset", "origin"}
_HARMLESS_KEYS |= {"category", "type", "topic", "task", "lang", "language", "license", "url", "title", "date", "time"}
_HARMLESS_KEYS |= {"timestamp", "created", "model", "author", "tags", "name"}
_SHAPES = 'expected {"instruction", "input", "output"}, {"messages"}, {"conversations"} or {"prompt", "response"}'


@dataclass(frozen=True)
class Conversation:
    """A system message (may be empty), and one or more turns of a prompt and its answer.

    The answers of the turns in `not_learned` (indices from 0) are context only.
    """

    system: str
    turns: tuple[tuple[str, str], ...]
    where: str = ""
    not_learned: frozenset[int] = frozenset()

    @property
    def has_answer(self) -> bool:
        return any(answer.strip() for turn, (_, answer) in enumerate(self.turns) if turn not in self.not_learned)


def find_instruction_files(path: str | Path) -> list[Path]:
    """The file `path`, or the sorted instruction files below the folder `path`. Raises UserError if there is none."""
    path = Path(path)
    if path.is_dir():
        files = files_below(path, _is_instructions)
        if not files:
            raise UserError(f"{path} holds no instruction file; allowed: {', '.join(SUFFIXES)}, also .gz .xz .bz2 .zst")
        return files
    if not path.is_file():
        raise UserError(f"no such file or folder: {path}")
    if not _is_instructions(path):
        raise UserError(f"{path} is not an instruction file; allowed: {', '.join(SUFFIXES)}, also .gz .xz .bz2 .zst")
    return [path]


def _is_instructions(path: Path) -> bool:
    name = path.name.lower()
    for suffix in compressed.SUFFIXES:
        name = name.removesuffix(suffix)
    return name.endswith(SUFFIXES) and not name.startswith(".")


def read_conversations(files: Iterable[Path]) -> Iterator[Conversation]:
    """Every conversation of `files`, in order. Keys that are not read, harmless ones apart, are named once on stderr.

    Raises UserError with file and line (in an array: the record's number) for a bad record, RunError for a damaged file.
    """
    unread: dict[str, str] = {}

    def name_unread(key: str, where: str) -> None:
        if unread.setdefault(key, where) == where:
            log(f"{where}: the key {key!r} is not read, here and in what follows")

    for path in files:
        for where, record in _records(path):
            yield parse_record(record, where, name_unread)


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    data = read_bytes(path)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start + 1})") from None
    if text.lstrip().startswith("["):
        try:
            records = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is not a complete JSON array: {error}") from None
        yield from ((f"{path}, record {number}", record) for number, record in enumerate(records, 1))
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield f"{path}:{number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}:{number}: invalid JSON ({error})") from None


def parse_record(
    record: Any, where: str, on_unread: Callable[[str, str], None] = lambda key, where: None
) -> Conversation:
    """Parse one object of a file; `where` names it in errors. Raises UserError.

    `on_unread` gets each key that is not read, with `where`; harmless ones apart.
    """
    if not isinstance(record, dict):
        raise UserError(f"{where}: {json_type(record)}; {_SHAPES}")
    _refuse_keys(record, where)
    for key in ("messages", "conversations"):
        if key in record:
            system, turns, not_learned = _parse_messages(record[key], where, on_unread)
            read = {key, "system"}
            break
    else:
        system, turns, read = _parse_pairs(record, where)
        not_learned = frozenset()
    if (given := _texts(record, ("system",), where, optional=("system",))[0]) and given != system:
        if system:
            raise UserError(f"{where}: both a system message and a 'system' text, which differ; keep one")
        system = given
    learned = _learned(record, where)
    read.update(_LEARNED_KEYS)
    for key in sorted(record.keys() - read - _HARMLESS_KEYS):
        on_unread(key, where)
    return Conversation(system, turns, where, not_learned if learned else frozenset(range(len(turns))))


def _refuse_keys(record: dict[str, Any], where: str) -> None:
    there = [key for key in _REFUSED_KEYS if record.get(key)]
    there += [key for key in _REFUSED_FLAGS if record.get(key) is not None]
    there += [key for key in record if key.startswith(_PREFERENCES) and record[key]]
    there += [key for key in _VERDICTS if isinstance(record.get(key), bool)]
    if there:
        raise UserError(
            f"{where}: the key {there[0]!r} changes what is learned and is not supported; leave such records out, "
            "or the key if the text is right without it"
        )


def _learned(values: dict[str, Any], where: str) -> bool:
    """What the flags of a record or a message say; without any, True."""
    learned = True
    for key in _LEARNED_KEYS:
        flag = values.get(key)
        if flag not in (None, 0, 1):
            raise UserError(f"{where}: {key!r} is {flag!r}; an answer is learned or not: 0 or 1")
        learned = learned and flag in (None, 1)
    return learned


def _parse_pairs(record: dict[str, Any], where: str) -> tuple[str, tuple[tuple[str, str], ...], set[str]]:
    """System text, turns and the keys read of a record with one prompt and its answer, and perhaps earlier turns."""
    history = _history(record, where)
    if "instruction" in record:
        instruction, more, answer = _texts(record, ("instruction", "input", "output"), where, optional=("input",))
        is_first = not history and not record.get("system")
        system = instruction if more and is_first else ""
        prompt = "\n".join(part for part in ("" if system else instruction, more) if part)
        return system, (*history, (prompt, answer)), {"instruction", "input", "output", "system", "history"}
    if "prompt" in record:
        key = "completion" if "completion" in record else "response"
        prompt, answer = _texts(record, ("prompt", key), where)
        return "", (*history, (prompt, answer)), {"prompt", key, "system", "history"}
    fields = ", ".join(map(str, list(record)[:8])) or "none"
    raise UserError(f"{where}: fields {fields}; {_SHAPES}")


def _history(record: dict[str, Any], where: str) -> list[tuple[str, str]]:
    history = record.get("history") or []
    if not isinstance(history, list) or not all(_is_pair(turn) for turn in history):
        raise UserError(f"{where}: 'history' must be a list of [prompt, answer], both texts")
    return [(prompt, answer) for prompt, answer in history]


def _is_pair(turn: Any) -> bool:
    return isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)


def _texts(record: dict[str, Any], keys: Sequence[str], where: str, optional: Sequence[str] = ()) -> list[str]:
    for key in keys:
        value = record.get(key, "" if key in optional else None)
        if not isinstance(value, str) and not (value is None and key in optional):
            actual = "missing" if key not in record else json_type(value)
            raise UserError(f"{where}: {key!r} is {actual}; expected text")
        if not is_unicode(value or ""):
            raise UserError(f"{where}: {key!r} holds a lone surrogate, which is not Unicode text")
    return [record.get(key) or "" for key in keys]


def _parse_messages(
    messages: Any, where: str, on_unread: Callable[[str, str], None]
) -> tuple[str, tuple[tuple[str, str], ...], frozenset[int]]:
    """System text, turns, and the indices of the turns whose answer is not learned."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise UserError(f"{where}: expected a list of messages such as {{'role': ..., 'content': ...}}")
    parsed = []
    for message in messages:
        # First: a message that calls a tool may have no text.
        _refuse_keys(message, where)
        role_key, content_key = ("from", "value") if "from" in message else ("role", "content")
        role, text = _texts(message, (role_key, content_key), where)
        if role not in _ROLES:
            raise UserError(f"{where}: {role_key} is {role!r}; allowed: {', '.join(_ROLES)}")
        learned = _learned(message, where)
        if _ROLES[role] != "assistant" and learned and any(message.get(key) for key in _LEARNED_KEYS):
            raise UserError(f"{where}: a message of {role!r} asks to be learned; only answers are")
        for key in sorted(message.keys() - {role_key, content_key, *_LEARNED_KEYS} - _HARMLESS_KEYS):
            on_unread(key, where)
        parsed.append((_ROLES[role], text, learned))
    system = parsed.pop(0)[1] if parsed and parsed[0][0] == "system" else ""
    expected = ["user", "assistant"] * (len(parsed) // 2)
    if not parsed or [role for role, *_ in parsed] != expected:
        raise UserError(
            f"{where}: roles are {', '.join(role for role, *_ in parsed) or 'none'}; after a system message, if any, "
            "user and assistant alternate, and the assistant comes last"
        )
    texts = [text for _, text, _ in parsed]
    turns = tuple(zip(texts[::2], texts[1::2], strict=True))
    return system, turns, frozenset(turn for turn, (_, _, learned) in enumerate(parsed[1::2]) if not learned)


def encode(conversation: Conversation, tokenizer: Tokenizer, template: str) -> tuple[np.ndarray, np.ndarray]:
    """Token ids [n] int64, and which of them are learned [n] bool: the learned answers and the end token after each.

    Raises UserError for a template without {prompt}.
    """
    messages = [("system", conversation.system)]
    for prompt, answer in conversation.turns:
        messages += [("user", prompt), ("assistant", answer)]
    ids: list[int] = []
    counted: list[bool] = []
    turn = 0
    for segment in chat_template.render(template, messages):
        tokens = chat_template.encode([segment], tokenizer.encode, tokenizer.eos_id)
        ids += tokens
        counted += [segment.is_answer and turn not in conversation.not_learned] * len(tokens)
        turn += segment.is_answer
    return np.array(ids, np.int64), np.array(counted, bool)
