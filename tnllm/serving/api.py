"""The bodies of requests: completions, conversations, states.

    request = validated(CompletionRequest, body)
    prompts, params = request.prompts(loaded), request.params(loaded)      # token ids, SamplingParams

A key that is null counts as not given, and so does a value that asks for nothing (`bodies.py`). Everything else that is
not supported is refused by name.
"""

from dataclasses import fields, replace
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BeforeValidator, Field, PlainValidator, ValidationError, WithJsonSchema, model_validator

from tnllm.chat_template import stop_strings
from tnllm.errors import UserError
from tnllm.generation.conversation import part_ids
from tnllm.generation.grammar import Grammars
from tnllm.generation.loading import LoadedModel
from tnllm.generation.sampler import MAX_LOGPROBS, MAX_SAMPLES, MAX_SEED, SamplingParams
from tnllm.serving import bodies, constraints
from tnllm.serving.bodies import Body, RequestError, shown
from tnllm.serving.constraints import Call, Wanted

_Stop = Annotated[list[str], PlainValidator(bodies.check_stop), WithJsonSchema(bodies.STOP)]
_Prompt = Annotated[str | list[Any], PlainValidator(bodies.check_prompt), WithJsonSchema(bodies.PROMPT)]
_Int = BeforeValidator(bodies.whole)
_Bias = Annotated[float, Field(ge=-100, le=100)]
# Log-probabilities of one answer, and tokens of prompts that it repeats. So many take a few hundred MB for a while.
MAX_SIZE = 1 << 20


def _check_stream_options(given: Any) -> bool:
    """Whether a stream ends with a chunk that holds the token counts."""
    bodies.typed(given, dict, "stream_options", "an object")
    usage = bodies.without_neutral(given, {}, ["include_usage"], "stream_options.").get("include_usage", False)
    if not isinstance(usage, bool):
        raise RequestError(f"stream_options.include_usage is {shown(usage)}; allowed: true or false", "stream_options")
    return usage


def _check_biases(given: Any) -> dict[str, float]:
    if not isinstance(given, dict) or not all(str(key).isdecimal() and len(key) < 10 for key in given):
        raise RequestError(f"logit_bias is {shown(given)}; allowed: an object of token ids and numbers", "logit_bias")
    try:
        SamplingParams.of({"logit_bias": given})
    except UserError as error:
        raise RequestError(str(error), "logit_bias") from None
    return given


class GenerateRequest(Body):
    """The keys of both kinds of request. Values that mean "off" elsewhere, such as -1, mean it here too."""

    neutral = bodies.REQUEST
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
    logit_bias: (
        Annotated[dict[str, float], PlainValidator(_check_biases, json_schema_input_type=dict[str, _Bias])] | None
    ) = Field(None, description="An object of token ids and what is added to their logits, -100 to 100.")
    response_format: Annotated[
        Wanted | None, PlainValidator(constraints.check_response_format), WithJsonSchema(constraints.RESPONSE_FORMAT)
    ] = Field(None, description="What the text must be: JSON, JSON that fits a schema, or a pattern.")
    structured_outputs: Annotated[
        Wanted | None,
        PlainValidator(constraints.check_structured_outputs),
        WithJsonSchema(constraints.STRUCTURED_OUTPUTS),
    ] = Field(None, description="The same: json, regex, choice or grammar.")
    json_schema: dict[str, Any] | None = Field(None, description="A JSON schema that the text must fit.")
    grammar: str | None = Field(None, description="A grammar in llama.cpp's format that the text must fit.")
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS), _Int] | None = Field(
        None, description="Log-probabilities of the prompt's tokens and of this many most likely ones; not in a stream."
    )
    return_tokens_as_token_ids: bool = Field(False, description="Spell tokens of log-probabilities as token_id:ID.")
    stream: bool = Field(False, description="Send the text as it is generated, as server-sent events.")
    stream_options: Annotated[
        bool,
        PlainValidator(_check_stream_options),
        WithJsonSchema(bodies.object_schema("", {}, include_usage={"type": "boolean"})),
    ] = Field(False, description="include_usage: end the stream with a chunk of token counts; needs `stream`.")

    @model_validator(mode="after")
    def _streams(self) -> "GenerateRequest":
        if self.stream_options and not self.stream:
            raise RequestError("stream_options.include_usage is true; it needs stream to be true", "stream_options")
        if self.prompt_logprobs is not None and self.stream:
            raise RequestError("prompt_logprobs is given; it needs stream to be false", "prompt_logprobs")
        self._constraint()
        return self

    @classmethod
    def _translated(cls, values: dict[str, Any]) -> dict[str, Any]:
        values = dict(values)
        if values.get("state") is not None and values.get(cls.text_key) is None:
            # The state may be all that is to be continued.
            values[cls.text_key] = [] if cls.text_key == "messages" else ""
        for key, name in (("json_schema", "json"), ("grammar", "grammar")):
            # An empty schema is any JSON.
            if (value := values.pop(key, None)) not in (None, ""):
                if "structured_outputs" in values:
                    message = "json_schema, grammar and structured_outputs are the same; give one"
                    raise RequestError(message, "json_schema")
                values["structured_outputs"] = {name: value}
        return values

    def call(self) -> Call | None:
        """The call that the answer must be. Raises RequestError."""
        return None

    def scored_prompt(self, params: SamplingParams) -> int | None:
        """How many most likely tokens to give for each token of the prompt; None: not even its own log-probability."""
        return self.prompt_logprobs

    def _constraint(self) -> dict[str, Wanted]:
        """What the text must fit, by the key that says so. Raises RequestError."""
        given = {"response_format": self.response_format, "structured_outputs": self.structured_outputs}
        call = self.call()
        wanted = {key: value for key, value in given.items() if value is not None}
        wanted |= {"tools": ("json", call.schema)} if call is not None else {}
        if len(wanted) > 1:
            raise RequestError(f"{' and '.join(wanted)} are both given; give one of them", list(wanted)[-1])
        return wanted

    def _own(self) -> dict[str, Any]:
        """The options that the two kinds of request say each in their way. Raises RequestError."""
        raise NotImplementedError

    def params(
        self, loaded: LoadedModel, most_tokens: int | None = None, grammars: Grammars | None = None
    ) -> SamplingParams:
        """`most_tokens` limits max_tokens. Raises UserError for a value out of range."""
        names = {field.name for field in fields(SamplingParams)} & (
            type(self).model_fields.keys() - {"logprobs", "grammar"}
        )
        given = {name: value for name in names if (value := getattr(self, name)) is not None} | self._own()
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
        for key, wanted in self._constraint().items():
            grammars = grammars or Grammars(loaded.tokenizer, loaded.eos_ids)
            given["grammar"] = constraints.compiled(grammars, wanted, key)
        return loaded.params(**given)


class CompletionRequest(GenerateRequest):
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

    def _own(self) -> dict[str, Any]:
        return {"logprobs": self.logprobs}

    def scored_prompt(self, params: SamplingParams) -> int | None:
        given = [self.prompt_logprobs, params.logprobs if self.echo else None]
        return max((num for num in given if num is not None), default=None)


MESSAGES = Annotated[list[Any], PlainValidator(bodies.check_messages), WithJsonSchema(bodies.MESSAGES)]


class ChatRequest(GenerateRequest):
    """POST /v1/chat/completions."""

    text_key: ClassVar[str] = "messages"

    messages: MESSAGES = Field(description="a list of messages: system, developer, user and assistant, in any order")
    max_completion_tokens: Annotated[int, Field(ge=-1), _Int] | None = Field(
        None, description="Another name for max_tokens, which it precedes unless it is -1."
    )
    logprobs: bool = Field(False, description="Log-probabilities of the answer's tokens.")
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS), _Int] | None = Field(
        None, description="Also those of this many most likely tokens; needs logprobs."
    )
    tools: Annotated[
        list[tuple[str, Any]] | None, PlainValidator(constraints.check_tools), WithJsonSchema(constraints.TOOLS)
    ] = Field(None, description="Functions, one of which the answer calls if tool_choice says so.")
    tool_choice: Annotated[
        str | tuple[str, str] | None,
        PlainValidator(constraints.check_tool_choice),
        WithJsonSchema(constraints.TOOL_CHOICE),
    ] = Field(None, description="none, required, or a function; auto only without tools, which no template here has.")

    @classmethod
    def _translated(cls, values: dict[str, Any]) -> dict[str, Any]:
        # Tools that must not be called ask for nothing, whatever they are.
        unused = values.get("tool_choice") == "none"
        kept = {key: value for key, value in values.items() if not (unused and key in ("tools", "tool_choice"))}
        return super()._translated(kept)

    def call(self) -> Call | None:
        return constraints.tool_call(self.tools, self.tool_choice)

    def prompts(
        self, loaded: LoadedModel, most_tokens: int | None = None, awaits_answer: bool = False
    ) -> list[list[int]]:
        """Token ids of the conversation, in the model's turn format, after the state. Raises RequestError.

        awaits_answer: whether the state ends where an answer begins.
        """
        ids, _ = turns(loaded, self.messages, most_tokens, awaits_answer, is_last=True)
        return [loaded.at_start(ids) if self.state is None else ids]

    def _own(self) -> dict[str, Any]:
        if self.top_logprobs and not self.logprobs:
            raise RequestError(f"top_logprobs is {self.top_logprobs}; it needs logprobs to be true", "top_logprobs")
        more: dict[str, Any] = {"logprobs": (self.top_logprobs or 0) if self.logprobs else None}
        return more if self.max_completion_tokens in (None, -1) else more | {"max_tokens": self.max_completion_tokens}

    def params(
        self, loaded: LoadedModel, most_tokens: int | None = None, grammars: Grammars | None = None
    ) -> SamplingParams:
        params = super().params(loaded, most_tokens, grammars)
        if params.grammar is not None:
            # It says itself where the answer ends.
            return params
        # As in `tnllm generate --chat`: an answer ends where the model starts to speak for the user.
        return replace(params, stop=(*params.stop, *stop_strings(loaded.chat_template)))


class StateRequest(Body):
    """POST /v1/states, and /v1/states/{id}/fork, where what is to be read may be left out."""

    model: str | None = Field(None, description="The served model's id, or nothing.")
    prompt: _Prompt | None = Field(None, description="a text or token ids to read; instead of messages")
    messages: MESSAGES | None = Field(None, description="a list of messages to read; instead of a prompt")
    expires_in: Annotated[int, Field(ge=1), _Int] | None = Field(
        None, description="Seconds without use until the state is deleted; at most, and by default, the server's."
    )

    def ids(
        self, loaded: LoadedModel, most_tokens: int, is_start: bool, awaits_answer: bool
    ) -> tuple[list[int] | None, bool]:
        """Token ids to read, None if there are none, and whether an answer follows. Raises RequestError.

        is_start: no state comes before. awaits_answer: whether that one ends where an answer begins.
        """
        if self.prompt is not None and self.messages is not None:
            raise RequestError("prompt and messages are both given; give one of them", "messages")
        if self.messages is not None:
            ids, awaits_answer = turns(loaded, self.messages, most_tokens, awaits_answer, is_last=False)
            return loaded.at_start(ids) if is_start else ids, awaits_answer
        if self.prompt is None and not is_start:
            return None, awaits_answer
        if not self.prompt or (isinstance(self.prompt, list) and type(self.prompt[0]) is not int):
            raise RequestError("a state is of one prompt; give a text or token ids, or messages", "prompt")
        if not isinstance(self.prompt, str):
            return self.prompt, False
        check_text_length(loaded, self.prompt, most_tokens, "prompt")
        return loaded.encode(self.prompt, start=is_start), False


def turns(
    loaded: LoadedModel, messages: list[tuple[str, str]], most_tokens: int | None, awaits_answer: bool, is_last: bool
) -> tuple[list[int], bool]:
    """Token ids of messages, and whether an answer follows them, as `part_ids` gives. Raises RequestError."""
    check_text_length(loaded, "".join([text for _, text in messages]), most_tokens, "messages")
    try:
        return part_ids(loaded, messages, awaits_answer, is_last)
    except UserError as error:
        raise RequestError(str(error), "messages") from None


_R = TypeVar("_R", bound=Body)


def validated(kind: type[_R], content: bytes, most_tokens: int | None = None) -> _R:
    """The request of this kind that a body holds; `most_tokens` is that of a prompt. Raises RequestError."""
    values = bodies.read(content, most_tokens)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        names = {ours: theirs for theirs, ours in getattr(kind, "other_names", {}).items() if theirs in values}
        raise bodies.explained(error, kind, names) from None


def check_text_length(loaded: LoadedModel, text: str, most_tokens: int | None, param: str) -> None:
    """Raise RequestError for a very long text that must have more than `most_tokens` tokens, before all of it is read."""
    if most_tokens is None or len(text) <= max(2 * most_tokens, 1 << 17):
        return
    size, least = 1 << 16, 0
    for start in range(0, len(text), size):
        # A cut changes the tokens near it, by far fewer than these.
        least += max(0, len(loaded.tokenizer.encode(text[start : start + size])) - 256)
        if least > most_tokens:
            message = f"{param} has {least} or more tokens; this server takes at most {most_tokens}"
            raise RequestError(message, param, "context_length_exceeded")


def check_size(request: "GenerateRequest", prompts: list[list[int]], params: SamplingParams) -> None:
    """Raise RequestError for more choices, log-probabilities or repeated tokens than one answer may have."""
    choices = len(prompts) * params.n
    echoed = params.n * sum(map(len, prompts)) if isinstance(request, CompletionRequest) and request.echo else 0
    if choices > MAX_SAMPLES:
        message = f"{len(prompts)} prompts times n = {params.n} are {choices} choices; at most {MAX_SAMPLES}"
        raise RequestError(message, "n" if params.n > 1 else "prompt")
    if echoed > MAX_SIZE:
        raise RequestError(f"echo would repeat {echoed} tokens (prompts times n); at most {MAX_SIZE}", "echo")
    scored = (echoed + choices * params.max_tokens) * (0 if params.logprobs is None else params.logprobs + 1)
    if request.prompt_logprobs is not None:
        scored += params.n * sum(map(len, prompts)) * (request.prompt_logprobs + 1)
    if scored > MAX_SIZE:
        message = f"the answer may have {scored} log-probabilities (its tokens times logprobs + 1); at most {MAX_SIZE}"
        raise RequestError(message, "logprobs")
