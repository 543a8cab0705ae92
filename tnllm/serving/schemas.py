"""The answers of the two routes that generate, of the others, and of errors, as /openapi.json describes them.

A test compares them with what the server sends.
"""

from typing import Literal

from pydantic import BaseModel, Field, RootModel


class Usage(BaseModel):
    """Token counts of an answer."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[Literal["cached_tokens"], int]


class Timings(BaseModel):
    """What an answer took, in ms, and how many tokens that were; reading several prompts: that of the slowest."""

    queue_ms: float = Field(description="Until reading began.")
    cache_n: int = Field(description="Tokens that were not read again.")
    prompt_n: int
    prompt_ms: float
    prompt_per_token_ms: float
    prompt_per_second: float
    predicted_n: int
    predicted_ms: float
    predicted_per_token_ms: float
    predicted_per_second: float


class PromptLogprob(BaseModel):
    """A token where a prompt's token stands; its rank where it is known."""

    logprob: float
    rank: int | None
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]


class TextLogprobs(BaseModel):
    """One element for each token. The first token of a text has no log-probability."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class _Choice(BaseModel):
    index: int
    finish_reason: Literal["stop", "length", "tool_calls"] | None


class TextChoice(_Choice):
    """A text; in a stream the next piece of one."""

    text: str
    logprobs: TextLogprobs | None
    prompt_logprobs: PromptLogprobs | None = None


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
    timings: Timings | None = None


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


class CallFunction(BaseModel):
    """A function's name, and its arguments as a JSON text."""

    name: str
    arguments: str


class ToolCall(BaseModel):
    """What the answer calls."""

    id: str
    type: Literal["function"]
    function: CallFunction


class ChatMessage(BaseModel):
    """The model's turn."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(_Choice):
    """One answer."""

    message: ChatMessage
    logprobs: ChatLogprobs | None


class ChatCompletion(_Answer):
    """The answer of /v1/chat/completions; the events of a stream hold `delta` in place of `message`."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage
    timings: Timings | None = None
    prompt_logprobs: PromptLogprobs | None = None


class Model(BaseModel):
    """The served model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(BaseModel):
    """The models that are served."""

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


class TokenPiece(BaseModel):
    """A token and its text, or its bytes."""

    id: int
    piece: str | list[int]


class Tokenized(BaseModel):
    """Token ids of a text."""

    tokens: list[int] | list[TokenPiece]
    count: int
    max_model_len: int = Field(description="Most tokens of a prompt.")
    token_strs: list[str] | None = None


class Detokenized(BaseModel):
    """A text, under the keys of two servers."""

    content: str
    prompt: str


class Template(BaseModel):
    """A conversation as one text."""

    prompt: str


class Defaults(BaseModel):
    """Of a request that says nothing."""

    n_ctx: int
    params: dict[str, float | int | bool]


class Features(BaseModel):
    """What is on."""

    schema_: bool = Field(alias="schema", description="Whether JSON schemas and expressions can be asked for.")
    tools: list[str]
    api_key: bool
    state_grows: bool


class Props(BaseModel):
    """Limits, defaults and what is on."""

    model_alias: str
    is_demo: bool = Field(description="Whether it is the model that ships with tnllm.")
    is_chat_tuned: bool = Field(description="Whether it was trained on conversations.")
    build_info: str
    total_slots: int
    chat_template: str
    bos_token: str
    eos_token: str
    default_generation_settings: Defaults
    limits: dict[str, int]
    features: Features
    vocab_size: int
    modalities: dict[str, bool]


class NativeLogprob(TopLogprob):
    """A token of a text in llama.cpp's form."""

    id: int


class NativeLogprobs(NativeLogprob):
    """And the most likely ones where it stands."""

    top_logprobs: list[NativeLogprob]


class NativeCompletion(BaseModel):
    """The answer of /completion; of several texts a list of them. Events of a stream hold some of the keys."""

    index: int
    content: str
    tokens: list[int]
    id_slot: int
    stop: bool
    stop_type: Literal["eos", "limit", "word", "none"]
    stopping_word: str
    model: str
    prompt: str | None = Field(description="As it was given, if that was a text.")
    tokens_predicted: int
    tokens_evaluated: int
    tokens_cached: int
    truncated: bool
    has_new_line: bool
    generation_settings: dict[str, float | int | bool | None]
    timings: Timings
    completion_probabilities: list[NativeLogprobs] | None = None


class NativeCompletions(RootModel[NativeCompletion | list[NativeCompletion]]):
    """One, or a list for several texts."""


class Slot(BaseModel):
    """A slot."""

    id: int
    n_ctx: int
    is_processing: bool
    n_past: int = Field(description="Tokens of the state that this key's requests have put there.")


class SlotList(RootModel[list[Slot]]):
    """All slots."""


class SlotAction(BaseModel):
    """What was saved, restored or erased."""

    id_slot: int
    filename: str | None = None
    n_saved: int | None = None
    n_written: int | None = None
    n_restored: int | None = None
    n_read: int | None = None
    n_erased: int | None = None
    timings: dict[str, float] | None = None


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
    request_id: str | None = Field(None, description="The same as the header X-Request-Id.")


class Error(BaseModel):
    """Every answer that is not a success."""

    error: ErrorInfo
