"""The bodies of the OpenAI-style API: requests and answers.

    request = CompletionRequest.model_validate(body)
    prompts, params = request.prompts(loaded), request.params(loaded)      # token ids, SamplingParams
    answer = TextAnswer(loaded, "demo", fingerprint, request, prompts, params)     # or ChatAnswer
    answer.chunk(answer.piece(choice, event))                              # streaming
    answer.body([answer.full_choice(choice, result, None)])                # not streaming

A key that is null counts as not given, and so does a value that asks for nothing (`bodies.py`). Everything else that is
not supported is refused by name.
"""

import codecs
import time
import uuid
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, ValidationError, model_validator

from tnllm.chat_template import stop_strings
from tnllm.errors import UserError
from tnllm.generation.conversation import part_ids
from tnllm.generation.loading import LoadedModel
from tnllm.generation.sampler import MAX_LOGPROBS, MAX_SAMPLES, MAX_SEED, SamplingParams
from tnllm.generation.samples import Piece, Result, TokenLogprob
from tnllm.serving import bodies
from tnllm.serving.bodies import MAX_MESSAGES, MAX_PROMPTS, MAX_STOP_CHARACTERS, MAX_STOPS, RequestError, shown

_Stop = Annotated[
    list[str],
    PlainValidator(
        bodies.check_stop,
        json_schema_input_type=Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
        | Annotated[
            list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]], Field(max_length=MAX_STOPS)
        ],
    ),
]
_Prompt = Annotated[
    str | list[Any],
    PlainValidator(
        bodies.check_prompt,
        json_schema_input_type=str
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[int], Field(min_length=1)]
        | Annotated[list[Annotated[list[int], Field(min_length=1)]], Field(min_length=1, max_length=MAX_PROMPTS)],
    ),
]
_Int = BeforeValidator(bodies.whole)
# Log-probabilities of one answer, and tokens of prompts that it repeats. So many take a few hundred MB for a while.
MAX_SIZE = 1 << 20


class StreamOptions(BaseModel):
    """How to stream."""

    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool = Field(False, description="End the stream with a chunk that holds the token counts.")


def _check_stream_options(given: Any) -> StreamOptions:
    if not isinstance(given, dict):
        raise RequestError(f"stream_options is {shown(given)}; allowed: an object", "stream_options")
    options = bodies.without_neutral(given, {}, StreamOptions.model_fields, "stream_options.")
    usage = options.get("include_usage", False)
    if not isinstance(usage, bool):
        raise RequestError(f"stream_options.include_usage is {shown(usage)}; allowed: true or false", "stream_options")
    return StreamOptions(include_usage=usage)


class _Request(BaseModel):
    """The keys of both kinds of request. Values that mean "off" elsewhere, such as -1, mean it here too."""

    model_config = ConfigDict(extra="forbid", strict=True)
    # The key of what is read, for errors.
    text_key: ClassVar[str]

    model: str | None = Field(None, description="The served model's id, or nothing.")
    state: str | None = Field(None, description="The id of a state that the text follows; then it may be empty.")
    max_tokens: Annotated[int, Field(ge=-1), _Int] | None = Field(
        None, description="Most tokens to generate. Default, and -1: the model's, or 256."
    )
    temperature: float | None = Field(
        None, ge=0, le=100, description="0 takes the most likely token. Default: the model's."
    )
    top_p: float | None = Field(
        None, ge=0, le=1, description="Keep the most likely tokens that together reach this probability; 0 keeps one."
    )
    top_k: Annotated[int, Field(ge=-1), _Int] | None = Field(
        None, description="Keep the k most likely tokens; 0 and -1: all."
    )
    min_p: float | None = Field(
        None, ge=0, le=1, description="Drop tokens below this share of the top token's probability."
    )
    repetition_penalty: float | None = Field(
        None, gt=0, le=100, description="Above 1: tokens of prompt and text become less likely."
    )
    presence_penalty: float | None = Field(
        None, ge=-2, le=2, description="Subtracted from the logits of generated tokens."
    )
    frequency_penalty: float | None = Field(None, ge=-2, le=2, description="Subtracted once for each occurrence.")
    seed: Annotated[int, Field(ge=-1, le=MAX_SEED), _Int] | None = Field(
        None, description="The same seed gives the same text; choice i has seed + i. -1: a new one."
    )
    stop: _Stop | None = Field(None, description="End before any of these texts.")
    n: Annotated[int, _Int] = Field(1, ge=1, le=MAX_SAMPLES, description="Choices for each prompt.")
    ignore_eos: bool = Field(False, description="Continue after the end token.")
    stream: bool = Field(False, description="Send the text as it is generated, as server-sent events.")
    stream_options: Annotated[
        StreamOptions | None, PlainValidator(_check_stream_options, json_schema_input_type=StreamOptions)
    ] = Field(None, description="How to stream; needs `stream`.")

    @model_validator(mode="before")
    @classmethod
    def _known(cls, values: Any) -> Any:
        values = bodies.without_neutral(values, bodies.REQUEST, cls.model_fields)
        if "state" in values:
            # The state may be all that is to be continued.
            values.setdefault(cls.text_key, [] if cls.text_key == "messages" else "")
        return values

    @model_validator(mode="after")
    def _streams(self) -> "_Request":
        if self.stream_options is not None and self.stream_options.include_usage and not self.stream:
            raise RequestError("stream_options.include_usage is true; it needs stream to be true", "stream_options")
        return self

    def _sampling(self, loaded: LoadedModel, more: dict[str, Any], most_tokens: int | None) -> SamplingParams:
        names = {field.name for field in fields(SamplingParams)} - {"logprobs"}
        given = {name: value for name in names if (value := getattr(self, name)) is not None} | more
        for name in ("max_tokens", "seed"):
            if given.get(name) == -1:
                del given[name]
        if given.get("top_k") == -1:
            given["top_k"] = 0
        if given.get("top_p") == 0:
            # Nothing but the most likely token is kept.
            given["temperature"] = 0
            del given["top_p"]
        if most_tokens is not None:
            # The default is not what a request asked for, so it gives way to the server's limit.
            given.setdefault("max_tokens", min(most_tokens, loaded.params().max_tokens))
            if given["max_tokens"] > most_tokens:
                message = f"max_tokens is {shown(given['max_tokens'])}; this server gives at most {most_tokens}"
                raise RequestError(message, "max_tokens")
        return loaded.params(**given)


class CompletionRequest(_Request):
    """POST /v1/completions."""

    text_key: ClassVar[str] = "prompt"

    prompt: _Prompt = Field(description="a text, several, or token ids")
    echo: bool = Field(False, description="Put the prompt before the text.")
    # False is what the chat's key of this name says for none.
    logprobs: Annotated[
        Annotated[int, Field(ge=0, le=MAX_LOGPROBS), _Int] | None,
        BeforeValidator(lambda value: None if value is False else value),
    ] = Field(None, description="Log-probabilities, also of this many most likely tokens.")

    def prompts(
        self, loaded: LoadedModel, most_tokens: int | None = None, awaits_answer: bool = False
    ) -> list[list[int]]:
        """Token ids of each prompt. Raises RequestError, for too long a text without reading it."""
        given = self.prompt if isinstance(self.prompt, list) and type(self.prompt[0]) is not int else [self.prompt]
        for one in given:
            if isinstance(one, str):
                check_text_length(loaded, one, most_tokens, "prompt")
        is_start = self.state is None
        return [loaded.encode(one, start=is_start) if isinstance(one, str) else one for one in given]

    def params(self, loaded: LoadedModel, most_tokens: int | None = None) -> SamplingParams:
        """`most_tokens` limits max_tokens. Raises UserError for a value out of range."""
        return self._sampling(loaded, {"logprobs": self.logprobs}, most_tokens)


class TextPart(BaseModel):
    """A part of a message; only text is supported."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]


class AssistantMessage(BaseModel):
    """A turn of the model's. As the last message it is the beginning of the answer, which continues it."""

    role: Literal["assistant"]
    content: str | list[TextPart] | None = None


class ChatRequest(_Request):
    """POST /v1/chat/completions."""

    text_key: ClassVar[str] = "messages"

    messages: Annotated[
        list[Any],
        PlainValidator(
            bodies.check_messages,
            json_schema_input_type=Annotated[
                list[Message | AssistantMessage], Field(min_length=1, max_length=MAX_MESSAGES)
            ],
        ),
    ] = Field(description="a list of messages: system, developer, user and assistant, in any order")
    max_completion_tokens: Annotated[int, Field(ge=-1), _Int] | None = Field(
        None, description="Another name for max_tokens, which it precedes unless it is -1."
    )
    logprobs: bool = Field(False, description="Log-probabilities of the answer's tokens.")
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS), _Int] | None = Field(
        None, description="Also those of this many most likely tokens; needs logprobs."
    )

    def prompts(
        self, loaded: LoadedModel, most_tokens: int | None = None, awaits_answer: bool = False
    ) -> list[list[int]]:
        """Token ids of the conversation, in the model's turn format, after the state. Raises RequestError.

        awaits_answer: whether the state ends where an answer begins.
        """
        ids, _ = _turns(loaded, self.messages, most_tokens, awaits_answer, is_last=True)
        return [loaded.at_start(ids) if self.state is None else ids]

    def params(self, loaded: LoadedModel, most_tokens: int | None = None) -> SamplingParams:
        """`most_tokens` limits max_tokens. Raises UserError for a value out of range."""
        if self.top_logprobs and not self.logprobs:
            raise RequestError(f"top_logprobs is {self.top_logprobs}; it needs logprobs to be true", "top_logprobs")
        more: dict[str, Any] = {"logprobs": (self.top_logprobs or 0) if self.logprobs else None}
        if self.max_completion_tokens not in (None, -1):
            more["max_tokens"] = self.max_completion_tokens
        params = self._sampling(loaded, more, most_tokens)
        # As in `tnllm generate --chat`: an answer ends where the model starts to speak for the user.
        return replace(params, stop=(*params.stop, *stop_strings(loaded.chat_template)))


class StateRequest(BaseModel):
    """POST /v1/states, and /v1/states/{id}/fork, where what is to be read may be left out."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = Field(None, description="The served model's id, or nothing.")
    prompt: _Prompt | None = Field(None, description="a text or token ids to read; instead of messages")
    messages: Annotated[
        list[Any],
        PlainValidator(
            bodies.check_messages,
            json_schema_input_type=Annotated[list[Message | AssistantMessage], Field(max_length=MAX_MESSAGES)],
        ),
    ] | None = Field(None, description="a list of messages to read; instead of a prompt")  # fmt: skip
    expires_in: Annotated[int, Field(ge=1), _Int] | None = Field(
        None, description="Seconds without use until the state is deleted; at most, and by default, the server's."
    )

    @model_validator(mode="before")
    @classmethod
    def _known(cls, values: Any) -> Any:
        return bodies.without_neutral(values, {}, cls.model_fields)

    def ids(
        self, loaded: LoadedModel, most_tokens: int, is_start: bool, awaits_answer: bool
    ) -> tuple[list[int] | None, bool]:
        """Token ids to read, None if there are none, and whether an answer follows. Raises RequestError.

        is_start: no state comes before. awaits_answer: whether that one ends where an answer begins.
        """
        if self.prompt is not None and self.messages is not None:
            raise RequestError("prompt and messages are both given; give one of them", "messages")
        if self.messages is not None:
            ids, awaits_answer = _turns(loaded, self.messages, most_tokens, awaits_answer, is_last=False)
            return loaded.at_start(ids) if is_start else ids, awaits_answer
        if self.prompt is None and not is_start:
            return None, awaits_answer
        if not self.prompt or (isinstance(self.prompt, list) and type(self.prompt[0]) is not int):
            raise RequestError("a state is of one prompt; give a text or token ids, or messages", "prompt")
        if not isinstance(self.prompt, str):
            return self.prompt, False
        check_text_length(loaded, self.prompt, most_tokens, "prompt")
        return loaded.encode(self.prompt, start=is_start), False


def _turns(
    loaded: LoadedModel, messages: list[tuple[str, str]], most_tokens: int | None, awaits_answer: bool, is_last: bool
) -> tuple[list[int], bool]:
    check_text_length(loaded, "".join([text for _, text in messages]), most_tokens, "messages")
    try:
        return part_ids(loaded, messages, awaits_answer, is_last)
    except UserError as error:
        raise RequestError(str(error), "messages") from None


_R = TypeVar("_R", bound=BaseModel)


def validated(kind: type[_R], content: bytes, most_tokens: int | None = None) -> _R:
    """The request of this kind that a body holds; `most_tokens` is that of a prompt. Raises RequestError."""
    values = bodies.read(content, most_tokens)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise bodies.explained(error, kind) from None


def check_text_length(loaded: LoadedModel, text: str, most_tokens: int | None, param: str) -> None:
    """Raise RequestError for a very long text that must have more than `most_tokens` tokens, before all of it is read."""
    if most_tokens is None or len(text) <= max(2 * most_tokens, 1 << 17):
        return
    least = _least_tokens(loaded, text, most_tokens)
    if least > most_tokens:
        message = f"{param} has {least} or more tokens; this server takes at most {most_tokens}"
        raise RequestError(message, param, "context_length_exceeded")


def _least_tokens(loaded: LoadedModel, text: str, enough: int) -> int:
    """A lower bound of the number of tokens, from parts of the text; it stops where there are `enough`."""
    size, least = 1 << 16, 0
    for start in range(0, len(text), size):
        # A cut changes the tokens near it, by far fewer than these.
        least += max(0, len(loaded.tokenizer.encode(text[start : start + size])) - 256)
        if least > enough:
            break
    return least


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
        """The chunks for one token; one that completes no text has none."""
        if not piece.text and not piece.logprobs:
            return []
        return [self._choice(choice, piece.text, piece.logprobs or None, None)]

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
        """A token as text; bytes that are not UTF-8 by themselves as `bytes:\\xe4`; a control token by its name."""
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


def check_size(request: "_Request", prompts: list[list[int]], params: SamplingParams) -> None:
    """Raise RequestError for more choices, log-probabilities or repeated tokens than one answer may have."""
    choices = len(prompts) * params.n
    echoed = params.n * sum(map(len, prompts)) if isinstance(request, CompletionRequest) and request.echo else 0
    if choices > MAX_SAMPLES:
        message = f"{len(prompts)} prompts times n = {params.n} are {choices} choices; at most {MAX_SAMPLES}"
        raise RequestError(message, "n" if params.n > 1 else "prompt")
    if echoed > MAX_SIZE:
        raise RequestError(f"echo would repeat {echoed} tokens (prompts times n); at most {MAX_SIZE}", "echo")
    scored = (echoed + choices * params.max_tokens) * (0 if params.logprobs is None else params.logprobs + 1)
    if scored > MAX_SIZE:
        message = f"the answer may have {scored} log-probabilities (its tokens times logprobs + 1); at most {MAX_SIZE}"
        raise RequestError(message, "logprobs")
