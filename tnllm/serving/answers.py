"""The answers of the two routes that generate, while they grow.

answer = TextAnswer(loaded, "demo", fingerprint, request, prompts, params)     # or ChatAnswer
answer.chunk(answer.piece(choice, event))                              # streaming
answer.body([answer.full_choice(choice, result, None)])                # not streaming
"""

import codecs
import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeAlias

from tnllm.generation.loading import LoadedModel
from tnllm.generation.sampler import SamplingParams
from tnllm.generation.samples import Piece, Result, TokenLogprob
from tnllm.serving.tickets import PromptRead

# Of a prompt's tokens, if asked for; the first has none.
Scores: TypeAlias = list[TokenLogprob | None] | None
_FINISH = {"eos": "stop", "stop": "stop", "length": "length"}

# Options of sampling that answers name.
SETTINGS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
            "max_tokens", "ignore_eos")  # fmt: skip


def usage(prompt: int, completion: int, cached: int) -> dict[str, Any]:
    """Token counts in OpenAI's shape."""
    counts: dict[str, Any] = {"prompt_tokens": prompt, "completion_tokens": completion}
    return counts | {"total_tokens": prompt + completion, "prompt_tokens_details": {"cached_tokens": cached}}


class Answer:
    """The answer to one request while it grows; choices are numbered over prompts and samples."""

    id_prefix = ""
    object = chunk_object = ""
    # Whether a stream ends with the text [DONE].
    says_done = True

    def __init__(
        self,
        loaded: LoadedModel,
        model: str,
        fingerprint: str,
        request: Any,
        prompts: list[list[int]],
        params: SamplingParams,
    ) -> None:
        self._tokenizer, self.params = loaded.tokenizer, params
        self._request, self._prompts = request, prompts
        self._head = {
            "id": f"{self.id_prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }
        self.prompt_tokens = sum(map(len, prompts))
        self.cached_tokens = self.completion_tokens = 0
        self._queue_s = self._read_s = 0.0
        self._first_read: float | None = None

    @property
    def num_choices(self) -> int:
        return len(self._prompts) * self.params.n

    def usage(self) -> dict[str, Any]:
        """Token counts so far."""
        return usage(self.prompt_tokens, self.completion_tokens, self.cached_tokens)

    def count(self, event: PromptRead | list[Piece] | Result) -> None:
        if isinstance(event, PromptRead):
            self._queue_s, self._read_s = max(self._queue_s, event.queue_s), max(self._read_s, event.read_s)
            self._first_read = self._first_read or time.monotonic()
            self.cached_tokens += event.cached_tokens
        elif isinstance(event, list):
            self.completion_tokens += len(event)

    def timings(self) -> dict[str, float]:
        """How long the parts took until now; of several prompts, reading the one that took longest."""
        parts: dict[str, float] = {"queue_ms": round(1e3 * self._queue_s, 3), "cache_n": self.cached_tokens}
        decoded_s = time.monotonic() - (self._first_read or 0.0)
        read = self.prompt_tokens - self.cached_tokens
        for name, num, seconds in ("prompt", read, self._read_s), ("predicted", self.completion_tokens, decoded_s):
            parts |= {f"{name}_n": num, f"{name}_ms": round(1e3 * seconds, 3)}
            parts[f"{name}_per_token_ms"] = round(1e3 * seconds / num, 3) if num else 0.0
            parts[f"{name}_per_second"] = round(num / seconds, 3) if seconds else 0.0
        return parts

    def prompt_entries(self, logprobs: Scores) -> dict[str, Any]:
        """The key `prompt_logprobs`, if it was asked for: of each token an object by id, as vLLM gives it."""
        num_top = self._request.prompt_logprobs
        if num_top is None or logprobs is None:
            return {}
        return {"prompt_logprobs": [None if entry is None else self._ranked(entry, num_top) for entry in logprobs]}

    def _ranked(self, entry: TokenLogprob, num_top: int) -> dict[str, Any]:
        ranks = {top.id: rank for rank, top in enumerate(entry.top, 1)}
        return {
            str(one.id): {"logprob": one.logprob, "rank": ranks.get(one.id), "decoded_token": one.text}
            for one in {top.id: top for top in (entry, *entry.top[:num_top])}.values()
        }

    def chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """One event of a stream."""
        return {**self._head, "object": self.chunk_object, "choices": choices}

    def body(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """The answer that is not streamed."""
        body = {**self._head, "object": self.object, "choices": choices, "usage": self.usage()}
        return body | {"timings": self.timings()}

    def first(self, choice: int, prompt_logprobs: Scores) -> list[dict[str, Any]]:
        """The chunks of a choice before its first token."""
        return []

    def piece(self, choice: int, pieces: list[Piece]) -> list[dict[str, Any]]:
        """The chunks for tokens that came together; if they complete no text there are none."""
        text, logprobs = "".join([piece.text for piece in pieces]), [one for piece in pieces for one in piece.logprobs]
        return [self._choice(choice, text, logprobs or None, None)] if text or logprobs else []

    def last(self, choice: int, result: Result) -> list[dict[str, Any]]:
        """The chunks at the end of a choice."""
        return [self._choice(choice, None, None, result.finish_reason)]

    def full_choice(self, choice: int, result: Result, prompt_logprobs: Scores) -> dict[str, Any]:
        """A choice that is not streamed."""
        raise NotImplementedError

    def _choice(self, choice: int, text: str | None, entries: Any, reason: str | None) -> dict[str, Any]:
        """A choice of a chunk; at its end `text` is None and `reason` is set. `entries`: a TokenLogprob per token."""
        raise NotImplementedError

    def _token(self, entry: TokenLogprob) -> dict[str, Any]:
        """A token and its log-probability."""
        data = list(self._tokenizer.token_bytes[entry.id])
        return {"token": self._spelled(entry.id), "logprob": entry.logprob, "bytes": data}

    def _spelled(self, id: int) -> str:
        """A token as text; bytes that are not UTF-8 by themselves as `bytes:\\xe4`; a control token by its name."""
        if self._request.return_tokens_as_token_ids:
            return f"token_id:{id}"
        data = self._tokenizer.token_bytes[id]
        if not data:
            return self._tokenizer.piece(id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


class TextAnswer(Answer):
    """Answers /v1/completions."""

    id_prefix, object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        # Where the next token begins in each choice's text, in characters.
        self._offsets = [_Offset() for _ in range(self.num_choices)]

    def _echo(self, choice: int) -> str:
        if not self._request.echo:
            return ""
        prompt, index = self._request.prompt, choice // self.params.n
        if isinstance(prompt, str):
            return prompt
        return prompt[index] if isinstance(prompt[0], str) else self._tokenizer.decode(self._prompts[index])

    def first(self, choice: int, prompt_logprobs: Scores) -> list[dict[str, Any]]:
        text = self._echo(choice)
        if not text:
            return []
        return [self._choice(choice, text, self._prompt_entries(choice, prompt_logprobs), None)]

    def full_choice(self, choice: int, result: Result, prompt_logprobs: Scores) -> dict[str, Any]:
        entries: list[TokenLogprob | int] | None = None
        if result.logprobs is not None:
            entries = [*(self._prompt_entries(choice, prompt_logprobs) or []), *result.logprobs]
        full = self._choice(choice, self._echo(choice) + result.text, entries, result.finish_reason)
        return full | self.prompt_entries(prompt_logprobs)

    def _prompt_entries(self, choice: int, logprobs: Scores) -> list[TokenLogprob | int] | None:
        """The prompt's tokens; the first has an id and no probability."""
        num_top = self.params.logprobs
        if logprobs is None or num_top is None or not self._request.echo:
            return None
        # More of them were computed if `prompt_logprobs` asks for more.
        logprobs = [entry and replace(entry, top=entry.top[:num_top]) for entry in logprobs]
        ids = self._prompts[choice // self.params.n]
        return [entry if entry is not None else ids[index] for index, entry in enumerate(logprobs)]

    def _choice(self, choice: int, text: str | None, entries: Any, reason: str | None) -> dict[str, Any]:
        """`entries` may also hold the id of a token without a log-probability."""
        logprobs = None
        if entries is not None:
            ids = [entry if isinstance(entry, int) else entry.id for entry in entries]
            logprobs = {
                "tokens": [self._spelled(id) for id in ids],
                "token_logprobs": [None if isinstance(entry, int) else entry.logprob for entry in entries],
                "top_logprobs": [None if isinstance(entry, int) else self._tops(entry) for entry in entries],
                "text_offset": [self._offsets[choice].take(self._tokenizer.token_bytes[id]) for id in ids],
            }
        finish = None if reason is None else _FINISH[reason]
        return {"index": choice, "text": text or "", "logprobs": logprobs, "finish_reason": finish}

    def _tops(self, entry: TokenLogprob) -> dict[str, float]:
        """By spelling, the token itself always among them: of two ids that are spelled alike, the more likely one stays."""
        tops: dict[str, float] = {}
        for top in sorted((entry, *entry.top), key=lambda top: -top.logprob):
            tops.setdefault(self._spelled(top.id), top.logprob)
        return tops


class _Offset:
    """Counts the characters of tokens, which may split a character."""

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._count = 0

    def take(self, data: bytes) -> int:
        before = self._count
        self._count += len(self._utf8.decode(data))
        try:
            # Only now may an incomplete character before it have become U+FFFD.
            return self._count - len(data.decode())
        except UnicodeDecodeError:
            return before


class ChatAnswer(Answer):
    """Answers /v1/chat/completions. An answer that must call a tool is the call's arguments, or its name and them."""

    id_prefix, object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._call = self._request.call()
        self._prompt_logprobs: dict[str, Any] = {}

    def first(self, choice: int, prompt_logprobs: Scores) -> list[dict[str, Any]]:
        delta: dict[str, Any] = {"role": "assistant", "content": ""}
        if self._call is not None:
            calls = [] if self._call.name is None else [{"index": 0, **_tool_call(self._call.name, "")}]
            delta |= {"content": None, **({"tool_calls": calls} if calls else {})}
        return [{"index": choice, "delta": delta, "logprobs": None, "finish_reason": None}]

    def full_choice(self, choice: int, result: Result, prompt_logprobs: Scores) -> dict[str, Any]:
        # Choices have one prompt, whose log-probabilities stand beside them.
        self._prompt_logprobs = self.prompt_entries(prompt_logprobs)
        message: dict[str, Any] = {"role": "assistant", "content": result.text, "refusal": None}
        if self._call is not None and (named := self._named(result.text)):
            message |= {"content": None, "tool_calls": [_tool_call(*named)]}
        return {
            "index": choice,
            "message": message,
            "logprobs": self._logprobs(result.logprobs),
            "finish_reason": self._finish(result),
        }

    def body(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return super().body(choices) | self._prompt_logprobs

    def piece(self, choice: int, pieces: list[Piece]) -> list[dict[str, Any]]:
        if self._call is not None and self._call.name is None and not any(piece.logprobs for piece in pieces):
            return []
        return super().piece(choice, pieces)

    def last(self, choice: int, result: Result) -> list[dict[str, Any]]:
        delta: dict[str, Any] = {}
        if self._call is not None and self._call.name is None:
            # Which tool is called is known once the call is complete.
            named = self._named(result.text)
            delta = {"tool_calls": [{"index": 0, **_tool_call(*named)}]} if named else {"content": result.text}
        return [{"index": choice, "delta": delta, "logprobs": None, "finish_reason": self._finish(result)}]

    def _finish(self, result: Result) -> str:
        called = self._call is not None and result.finish_reason == "eos"
        return "tool_calls" if called else _FINISH[result.finish_reason]

    def _named(self, text: str) -> tuple[str, str] | None:
        """Name and arguments of the call that a text is; None where the text was cut before the name was certain."""
        assert self._call is not None
        if self._call.name is not None:
            return self._call.name, text
        try:
            call = json.loads(text)
        except ValueError:
            return None
        return call["name"], json.dumps(call["arguments"], ensure_ascii=False)

    def _choice(self, choice: int, text: str | None, entries: Any, reason: str | None) -> dict[str, Any]:
        delta: dict[str, Any] = {} if text is None else {"content": text}
        if self._call is not None:
            call = {"index": 0, "function": {"arguments": text}}
            delta = {"tool_calls": [call]} if self._call.name is not None else {}
        finish = None if reason is None else _FINISH[reason]
        return {"index": choice, "delta": delta, "logprobs": self._logprobs(entries), "finish_reason": finish}

    def _logprobs(self, entries: Sequence[TokenLogprob] | None) -> dict[str, Any] | None:
        if entries is None:
            return None
        content = [self._token(entry) | {"top_logprobs": list(map(self._token, entry.top))} for entry in entries]
        return {"content": content, "refusal": None}


def _tool_call(name: str, arguments: str) -> dict[str, Any]:
    return {
        "id": f"call_{uuid.uuid4().hex}", "type": "function", "function": {"name": name, "arguments": arguments},
    }  # fmt: skip
