"""The bodies of the OpenAI-style API: requests and answers.

    request = CompletionRequest.model_validate(body)
    prompts, params = request.prompts(loaded), request.params(loaded)      # token ids, SamplingParams
    answer = TextAnswer(loaded, "demo", fingerprint, request, prompts, params)     # or ChatAnswer
    answer.chunk(answer.piece(choice, event))                              # streaming
    answer.body([answer.full_choice(choice, result, None)])                # not streaming

Unknown keys are refused, and so are OpenAI's keys that would change the answer and are not supported. A key that is null
counts as not given.
"""

import codecs
import time
import uuid
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tnllm.chat_template import stop_strings
from tnllm.errors import UserError, did_you_mean
from tnllm.generation.conversation import message_ids
from tnllm.generation.loading import LoadedModel
from tnllm.generation.sampler import MAX_SAMPLES, SamplingParams
from tnllm.generation.samples import Piece, Result, TokenLogprob

MAX_STOPS, MAX_PROMPTS = 16, 128
# OpenAI's keys that are accepted and have no effect here.
_IGNORED = ("user", "metadata", "store", "safety_identifier", "prompt_cache_key", "service_tier")


class StreamOptions(BaseModel):
    """How to stream."""

    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool = Field(False, description="End the stream with a chunk that holds the token counts.")


class _Request(BaseModel):
    """The keys of both kinds of request. SamplingParams checks their ranges."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = Field(None, description="The served model's id, or nothing.")
    max_tokens: int | None = Field(None, description="Most tokens to generate. Default: the model's, or 256.")
    temperature: float | None = Field(None, description="0 takes the most likely token. Default: the model's.")
    top_p: float | None = Field(None, description="Keep the most likely tokens that together reach this probability.")
    top_k: int | None = Field(None, description="Keep the k most likely tokens; 0 keeps all.")
    min_p: float | None = Field(None, description="Drop tokens below this share of the top token's probability.")
    repetition_penalty: float | None = Field(None, description="Above 1: tokens of prompt and text become less likely.")
    presence_penalty: float | None = Field(None, description="-2 to 2, subtracted from the logits of generated tokens.")
    frequency_penalty: float | None = Field(None, description="-2 to 2, subtracted once for each occurrence.")
    seed: int | None = Field(None, description="The same seed gives the same text; choice i has seed + i.")
    stop: str | list[str] | None = Field(None, description="End before any of these texts.")
    n: int = Field(1, description="Choices for each prompt.")
    ignore_eos: bool = Field(False, description="Continue after the end token.")
    stream: bool = Field(False, description="Send the text as it is generated, as server-sent events.")
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _known(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        for key in values:
            if key not in cls.model_fields and key not in _IGNORED and values[key] is not None:
                hint = did_you_mean(key, cls.model_fields)
                raise UserError(f"{key!r} is not supported{hint}; allowed: {', '.join(cls.model_fields)}")
        return {key: value for key, value in values.items() if value is not None and key not in _IGNORED}

    def _sampling(self, loaded: LoadedModel, more: dict[str, Any]) -> SamplingParams:
        names = (
            "max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
            "frequency_penalty", "seed",
        )  # fmt: skip
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stop) > MAX_STOPS:
            raise UserError(f"stop holds {len(stop)} strings; at most {MAX_STOPS}")
        for text in stop:
            # Raises UserError for a lone surrogate, which no text can contain.
            loaded.tokenizer.encode(text)
        return loaded.params(**{**given, "n": self.n, "ignore_eos": self.ignore_eos, "stop": tuple(stop), **more})


class CompletionRequest(_Request):
    """POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]] = Field(description="Texts, or token ids.")
    echo: bool = Field(False, description="Put the prompt before the text.")
    logprobs: int | None = Field(None, description="Log-probabilities, also of this many most likely tokens.")

    def prompts(self, loaded: LoadedModel) -> list[list[int]]:
        """Token ids of each prompt. Raises UserError."""
        given = self.prompt
        if isinstance(given, str):
            return [loaded.encode(given)]
        if not given:
            raise UserError('prompt is an empty list; give a text, "" to start from nothing')
        if isinstance(given[0], int):
            return [given]
        if len(given) > MAX_PROMPTS:
            raise UserError(f"prompt holds {len(given)} prompts; at most {MAX_PROMPTS} in one request")
        return [loaded.encode(one) if isinstance(one, str) else one for one in given]

    def params(self, loaded: LoadedModel) -> SamplingParams:
        """Raises UserError for a value out of range."""
        return self._sampling(loaded, {"logprobs": self.logprobs})


class TextPart(BaseModel):
    """A part of a message; only text is supported."""

    model_config = ConfigDict(extra="forbid", strict=True)
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A turn."""

    model_config = ConfigDict(extra="forbid", strict=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    @property
    def text(self) -> str:
        """The content as one text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(_Request):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(description="An optional system message, then user and assistant in turns.")
    max_completion_tokens: int | None = Field(None, description="Another name for max_tokens.")
    logprobs: bool = Field(False, description="Log-probabilities of the answer's tokens.")
    top_logprobs: int | None = Field(None, description="Also those of this many most likely tokens.")

    def prompts(self, loaded: LoadedModel) -> list[list[int]]:
        """Token ids of the conversation, in the model's turn format. Raises UserError."""
        return [message_ids(loaded, [(message.role, message.text) for message in self.messages])]

    def params(self, loaded: LoadedModel) -> SamplingParams:
        """Raises UserError for a value out of range."""
        if self.top_logprobs is not None and not self.logprobs:
            raise UserError("top_logprobs needs logprobs to be true")
        more: dict[str, Any] = {"logprobs": (self.top_logprobs or 0) if self.logprobs else None}
        if self.max_completion_tokens is not None:
            more["max_tokens"] = self.max_completion_tokens
        params = self._sampling(loaded, more)
        # As in `tnllm generate --chat`: an answer ends where the model starts to speak for the user.
        return SamplingParams(**{**params.__dict__, "stop": (*params.stop, *stop_strings(loaded.chat_template))})


def error_body(message: str, type: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """An error in OpenAI's shape."""
    return {"error": {"message": message, "type": type, "param": param, "code": code}}


_FINISH = {"eos": "stop", "stop": "stop", "length": "length"}


class Answer:
    """The answer to one request while it grows; choices are numbered over prompts and samples."""

    id_prefix = ""
    object = chunk_object = ""

    def __init__(
        self,
        loaded: LoadedModel,
        model: str,
        fingerprint: str,
        request: Any,
        prompts: list[list[int]],
        params: SamplingParams,
    ) -> None:
        self._tokenizer, self._params = loaded.tokenizer, params
        self._request, self._prompts = request, prompts
        self._head = {
            "id": f"{self.id_prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }
        self.prompt_tokens = sum(map(len, prompts))
        self.cached_tokens = self.completion_tokens = 0

    @property
    def num_choices(self) -> int:
        return len(self._prompts) * self._params.n

    def usage(self) -> dict[str, Any]:
        """Token counts so far."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }

    def chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """One event of a stream."""
        return {**self._head, "object": self.chunk_object, "choices": choices}

    def body(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """The answer that is not streamed."""
        return {**self._head, "object": self.object, "choices": choices, "usage": self.usage()}

    def first(self, choice: int, prompt_logprobs: list[TokenLogprob | None] | None) -> list[dict[str, Any]]:
        """The chunks of a choice before its first token."""
        raise NotImplementedError

    def piece(self, choice: int, piece: Piece) -> list[dict[str, Any]]:
        """The chunks for one token."""
        if not piece.text and piece.logprob is None:
            return []
        return [self._choice(choice, piece.text, None if piece.logprob is None else [piece.logprob], None)]

    def last(self, choice: int, result: Result) -> list[dict[str, Any]]:
        """The chunks at the end of a choice."""
        return [self._choice(choice, None, None, result.finish_reason)]

    def full_choice(
        self, choice: int, result: Result, prompt_logprobs: list[TokenLogprob | None] | None
    ) -> dict[str, Any]:
        """A choice that is not streamed."""
        raise NotImplementedError

    def _choice(self, choice: int, text: str | None, entries: Any, reason: str | None) -> dict[str, Any]:
        """A choice of a chunk; at its end `text` is None and `reason` is set. `entries`: a TokenLogprob per token."""
        raise NotImplementedError

    def _spelled(self, id: int) -> str:
        """A token as text; bytes that are not UTF-8 by themselves as `bytes:\\xe4`."""
        data = self._tokenizer.token_bytes[id]
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
        prompt, index = self._request.prompt, choice // self._params.n
        if isinstance(prompt, str):
            return prompt
        return prompt[index] if isinstance(prompt[0], str) else self._tokenizer.decode(self._prompts[index])

    def first(self, choice: int, prompt_logprobs: list[TokenLogprob | None] | None) -> list[dict[str, Any]]:
        text = self._echo(choice)
        if not text:
            return []
        return [self._choice(choice, text, self._prompt_entries(choice, prompt_logprobs), None)]

    def full_choice(
        self, choice: int, result: Result, prompt_logprobs: list[TokenLogprob | None] | None
    ) -> dict[str, Any]:
        entries: list[TokenLogprob | int] | None = None
        if result.logprobs is not None:
            entries = [*(self._prompt_entries(choice, prompt_logprobs) or []), *result.logprobs]
        return self._choice(choice, self._echo(choice) + result.text, entries, result.finish_reason)

    def _prompt_entries(
        self, choice: int, logprobs: list[TokenLogprob | None] | None
    ) -> "list[TokenLogprob | int] | None":
        """The prompt's tokens; the first has an id and no probability."""
        if logprobs is None or not self._request.echo:
            return None
        ids = self._prompts[choice // self._params.n]
        return [entry if entry is not None else ids[index] for index, entry in enumerate(logprobs)]

    def _choice(self, choice: int, text: str | None, entries: Any, reason: str | None) -> dict[str, Any]:
        """`entries` may also hold the id of a token without a log-probability."""
        logprobs = None
        if entries is not None:
            ids = [entry if isinstance(entry, int) else entry.id for entry in entries]
            logprobs = {
                "tokens": [self._spelled(id) for id in ids],
                "token_logprobs": [None if isinstance(entry, int) else entry.logprob for entry in entries],
                "top_logprobs": [
                    None if isinstance(entry, int) else {self._spelled(top.id): top.logprob for top in entry.top}
                    for entry in entries
                ],
                "text_offset": [self._offsets[choice].take(self._tokenizer.token_bytes[id]) for id in ids],
            }
        finish = None if reason is None else _FINISH[reason]
        return {"index": choice, "text": text or "", "logprobs": logprobs, "finish_reason": finish}


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
    """Answers /v1/chat/completions."""

    id_prefix, object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def first(self, choice: int, prompt_logprobs: list[TokenLogprob | None] | None) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        return [{"index": choice, "delta": delta, "logprobs": None, "finish_reason": None}]

    def full_choice(
        self, choice: int, result: Result, prompt_logprobs: list[TokenLogprob | None] | None
    ) -> dict[str, Any]:
        return {
            "index": choice,
            "message": {"role": "assistant", "content": result.text, "refusal": None},
            "logprobs": self._logprobs(result.logprobs),
            "finish_reason": _FINISH[result.finish_reason],
        }

    def _choice(self, choice: int, text: str | None, entries: Any, reason: str | None) -> dict[str, Any]:
        delta = {} if text is None else {"content": text}
        finish = None if reason is None else _FINISH[reason]
        return {"index": choice, "delta": delta, "logprobs": self._logprobs(entries), "finish_reason": finish}

    def _logprobs(self, entries: Sequence[TokenLogprob] | None) -> dict[str, Any] | None:
        if entries is None:
            return None

        def plain(entry: TokenLogprob) -> dict[str, Any]:
            data = self._tokenizer.token_bytes[entry.id]
            return {"token": self._spelled(entry.id), "logprob": entry.logprob, "bytes": list(data)}

        content = [plain(entry) | {"top_logprobs": [plain(top) for top in entry.top]} for entry in entries]
        return {"content": content, "refusal": None}


def check_choices(num_prompts: int, n: int) -> None:
    """Raise UserError for more choices than one request may have."""
    if num_prompts * n > MAX_SAMPLES:
        raise UserError(f"{num_prompts} prompts times n = {n} are {num_prompts * n} choices; at most {MAX_SAMPLES}")
