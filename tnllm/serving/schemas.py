"""The answers of the two routes that generate, of the others, and of errors, as /openapi.json describes them.

A test compares them with what the server sends.
"""

from typing import Literal

from pydantic import BaseModel, Field


class Usage(BaseModel):
    """Token counts of an answer."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[Literal["cached_tokens"], int]


class TextLogprobs(BaseModel):
    """One element for each token. The first token of a text has no log-probability."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class _Choice(BaseModel):
    index: int
    finish_reason: Literal["stop", "length"] | None


class TextChoice(_Choice):
    """A text; in a stream the next piece of one."""

    text: str
    logprobs: TextLogprobs | None


class _Answer(BaseModel):
    id: str
    created: int = Field(description="Seconds since 1970.")
    model: str
    system_fingerprint: str = Field(description="Changes with the weights.")


class Completion(_Answer):
    """The answer of /v1/completions; the events of a stream have the same keys."""

    object: Literal["text_completion"]
    choices: list[TextChoice]
    usage: Usage | None = None


class TopLogprob(BaseModel):
    """A token and its log-probability."""

    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(TopLogprob):
    """A token of the answer, and the most likely ones where it stands."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """One element for each token."""

    content: list[ChatLogprob]
    refusal: None


class ChatMessage(BaseModel):
    """The model's turn."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(_Choice):
    """One answer."""

    message: ChatMessage
    logprobs: ChatLogprobs | None


class ChatCompletion(_Answer):
    """The answer of /v1/chat/completions; the events of a stream hold `delta` in place of `message`."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage


class Model(BaseModel):
    """The served model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(BaseModel):
    """The one model that is served."""

    object: Literal["list"]
    data: list[Model]


class StateObject(BaseModel):
    """What was read, kept on the server."""

    id: str
    object: Literal["state"]
    created: int = Field(description="Seconds since 1970.")
    expires_at: int = Field(description="Seconds since 1970; every use moves it.")
    model: str
    system_fingerprint: str = Field(description="Changes with the weights.")
    dtype: str
    tokenizer: str = Field(description="SHA-256 of the tokenizer, in hex.")
    version: str = Field(description="Of tnllm.")
    bytes: int
    tokens: int = Field(description="Tokens read so far.")
    awaits_answer: bool = Field(description="Whether it ends where an answer begins.")
    usage: Usage | None = None


class StateList(BaseModel):
    """States, oldest first."""

    object: Literal["list"]
    data: list[StateObject]
    has_more: bool


class StateDeleted(BaseModel):
    """The state is forgotten."""

    id: str
    object: Literal["state"]
    deleted: Literal[True]


class Health(BaseModel):
    """Whether requests are taken."""

    status: str
    version: str | None = None


class ErrorInfo(BaseModel):
    """What was given, what is allowed; the key, if it is one key's; the error's name, if it has one."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    """Every answer that is not a success."""

    error: ErrorInfo
