"""Conversations for fine-tuning: instruction files read, checked and turned into token ids with the answers marked.

    conversations = list(read_conversations([Path("alpaca.json"), Path("chats.jsonl")]))
    ids, counted = encode(conversations[0], tokenizer, "Human:\n{prompt}\nAssistant:\n")

Files hold one JSON object a line, or one JSON array of objects; .gz, .xz and .bz2 are decompressed. An object is one of

    {"instruction": ..., "input": ..., "output": ...}                      alpaca; input may be empty or missing
    {"messages": [{"role": "user", "content": ...}, ...]}                  roles system (first), user, assistant
    {"conversations": [{"from": "human", "value": ...}, ...]}              the same in ShareGPT's format
    {"prompt": ..., "response": ...}                                       or "completion" in place of "response"

A conversation is written as in the released models' fine-tuning: the template around each prompt, the answer, the
end token. A system message, or alpaca's instruction if there is an input, comes first, on lines of its own.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tnllm import chat_template
from tnllm.data.compressed import read_bytes
from tnllm.errors import UserError
from tnllm.tokenizer import Tokenizer

SUFFIXES = (".jsonl", ".ndjson", ".json")
_COMPRESSED = (".gz", ".xz", ".bz2")
_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
_SHAPES = 'expected {"instruction", "input", "output"}, {"messages"}, {"conversations"} or {"prompt", "response"}'


@dataclass(frozen=True)
class Conversation:
    """A system message (may be empty), and one or more turns of a prompt and its answer."""

    system: str
    turns: tuple[tuple[str, str], ...]
    where: str = ""


def find_instruction_files(path: str | Path) -> list[Path]:
    """The file `path`, or the sorted instruction files of the folder `path`. Raises UserError if there is none."""
    path = Path(path)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file() and _is_instructions(file))
        if not files:
            raise UserError(f"{path} holds no instruction file; allowed: {', '.join(SUFFIXES)}, also .gz .xz .bz2")
        return files
    if not path.is_file():
        raise UserError(f"no such file or folder: {path}")
    if not _is_instructions(path):
        raise UserError(f"{path} is not an instruction file; allowed: {', '.join(SUFFIXES)}, also .gz .xz .bz2")
    return [path]


def _is_instructions(path: Path) -> bool:
    name = path.name.lower()
    for suffix in _COMPRESSED:
        name = name.removesuffix(suffix)
    return name.endswith(SUFFIXES) and not name.startswith(".")


def read_conversations(files: Iterable[Path]) -> Iterator[Conversation]:
    """Every conversation of `files`, in order.

    Raises UserError with file and line (in an array: the record's number) for a bad record, RunError for a damaged file.
    """
    for path in files:
        for where, record in _records(path):
            yield parse_record(record, where)


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    data = read_bytes(path)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start + 1})") from None
    if text.lstrip().startswith("["):
        try:
            records = json.loads(text)
        except ValueError as error:
            raise UserError(f"{path} is not a complete JSON array: {error}") from None
        yield from ((f"{path}, record {number}", record) for number, record in enumerate(records, 1))
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield f"{path}:{number}", json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}:{number}: invalid JSON ({error})") from None


def parse_record(record: Any, where: str) -> Conversation:
    """Parse one object of a file; `where` names it in errors. Raises UserError."""
    if not isinstance(record, dict):
        raise UserError(f"{where}: a JSON {type(record).__name__}; {_SHAPES}")
    for key, role, content in (("messages", "role", "content"), ("conversations", "from", "value")):
        if key in record:
            return _parse_messages(record[key], role, content, where)
    if "instruction" in record:
        texts = _texts(record, ("instruction", "input", "output"), where, optional=("input",))
        system, prompt = (texts[0], texts[1]) if texts[1] else ("", texts[0])
        return Conversation(system, ((prompt, texts[2]),), where)
    if "prompt" in record:
        answer = "completion" if "completion" in record else "response"
        prompt, text = _texts(record, ("prompt", answer), where)
        return Conversation("", ((prompt, text),), where)
    fields = ", ".join(map(str, list(record)[:8])) or "none"
    raise UserError(f"{where}: fields {fields}; {_SHAPES}")


def _texts(record: dict[str, Any], keys: Sequence[str], where: str, optional: Sequence[str] = ()) -> list[str]:
    for key in keys:
        value = record.get(key, "" if key in optional else None)
        if not isinstance(value, str) and not (value is None and key in optional):
            actual = "missing" if key not in record else f"a {type(value).__name__}"
            raise UserError(f"{where}: {key!r} is {actual}; expected text")
    return [record.get(key) or "" for key in keys]


def _parse_messages(messages: Any, role_key: str, content_key: str, where: str) -> Conversation:
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise UserError(f"{where}: expected a list of messages such as {{{role_key!r}: ..., {content_key!r}: ...}}")
    parsed = []
    for message in messages:
        role, text = _texts(message, (role_key, content_key), where)
        if role not in _ROLES:
            raise UserError(f"{where}: {role_key} is {role!r}; allowed: {', '.join(_ROLES)}")
        parsed.append((_ROLES[role], text))
    system = parsed.pop(0)[1] if parsed and parsed[0][0] == "system" else ""
    expected = ["user", "assistant"] * (len(parsed) // 2)
    if not parsed or [role for role, _ in parsed] != expected:
        raise UserError(
            f"{where}: roles are {', '.join(role for role, _ in parsed) or 'none'}; after a system message, if any, "
            "user and assistant alternate, and the assistant comes last"
        )
    texts = [text for _, text in parsed]
    return Conversation(system, tuple(zip(texts[::2], texts[1::2], strict=True)), where)


def encode(conversation: Conversation, tokenizer: Tokenizer, template: str) -> tuple[np.ndarray, np.ndarray]:
    """Token ids [n] int64, and which of them are learned [n] bool: the answers and the end token after each.

    Raises UserError for a template without {prompt}.
    """
    messages = [("system", conversation.system)]
    for prompt, answer in conversation.turns:
        messages += [("user", prompt), ("assistant", answer)]
    ids: list[int] = []
    counted: list[bool] = []
    for segment in chat_template.render(template, messages):
        tokens = chat_template.encode([segment], tokenizer.encode, tokenizer.eos_id)
        ids += tokens
        counted += [segment.is_answer] * len(tokens)
    return np.array(ids, np.int64), np.array(counted, bool)
