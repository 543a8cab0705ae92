"""A conversation whose state holds the past: a turn costs only what is new in it, however long the conversation is.

conversation = Conversation(loaded, params, loaded.chat_template)
for event in conversation.ask("Who are you?"):
    ...                              # as from `generate`
conversation.reset()
"""

from collections.abc import Generator, Sequence
from dataclasses import replace

from tnllm.chat_template import encode, render, render_part, split_template, stop_strings
from tnllm.errors import UserError
from tnllm.generation.context import Context, read
from tnllm.generation.decoder import generate
from tnllm.generation.loading import LoadedModel
from tnllm.generation.sampler import SamplingParams
from tnllm.generation.samples import Piece, Result
from tnllm.tokenizer import StreamDecoder, Tokenizer


def part_ids(
    loaded: LoadedModel, messages: Sequence[tuple[str, str]], awaits_answer: bool, is_last: bool
) -> tuple[list[int], bool]:
    """Token ids of a part of a conversation after another part, and whether an answer follows: as in `render_part`.

    A last message of "assistant" is the beginning of the answer. Raises UserError for a role that is not known, and for no
    messages at all.
    """
    if not messages and not awaits_answer:
        raise UserError("messages is empty; give at least one message, such as a user's")
    segments, awaits_answer = render_part(loaded.chat_template, messages, awaits_answer, is_last)
    return encode(segments, loaded.tokenizer.encode, loaded.tokenizer.eos_id), awaits_answer


class Conversation:
    """The turns of one conversation; all of them have the token ids that `part_ids` gives for the same messages."""

    def __init__(
        self,
        loaded: LoadedModel,
        params: SamplingParams,
        template: str,
        start: Context | None = None,
        system: str = "",
    ) -> None:
        """`template` holds {prompt} once; `start` is a context to talk about, such as a document.

        The template's opening words end an answer, in case the model starts to speak for the user.
        """
        split_template(template)
        self._loaded, self._template, self._start, self._system = loaded, template, start, system
        self._params = replace(params, stop=(*params.stop, *stop_strings(template)), n=1)
        self.reset()

    def reset(self) -> None:
        """Forget every turn. `messages` are the (role, text) pairs so far."""
        self._context = self._start
        self._unread: list[int] = []
        self._read: list[int] = []  # for prompt lookup
        self._is_first = True
        self.messages: list[tuple[str, str]] = []

    def restore(self, context: Context, messages: Sequence[tuple[str, str]]) -> None:
        """Continue another conversation: `context()` of it, and its `messages`."""
        self._context, self._unread, self._read, self._is_first = context, [], [], False
        self.messages = list(messages)

    @property
    def num_turns(self) -> int:
        """Questions asked so far."""
        return sum(role == "user" for role, _ in self.messages)

    def ask(self, message: str) -> Generator[Piece | Result]:
        """The answer, as from `generate`. Of an interrupted answer, what was generated is remembered."""
        loaded, tokenizer = self._loaded, self._loaded.tokenizer
        system = self._system if self._is_first else ""
        turn = encode(
            render(self._template, [("system", system), ("user", message)]), tokenizer.encode, tokenizer.eos_id
        )
        if self._context is None:
            turn = loaded.at_start(turn)
        [self._context] = read(loaded.model, [self._unread + turn], [self._context])
        self._read += self._unread + turn
        self._unread, self._is_first = [], False
        self.messages.append(("user", message))
        tokens: list[int] = []
        events = generate(
            loaded.model, tokenizer, [[]], self._params, contexts=[self._context], histories=[self._read],
            eos_ids=loaded.eos_ids,
        )  # fmt: skip
        text = None
        try:
            for event in events:
                if isinstance(event, Piece):
                    tokens.append(event.token)
                else:
                    event = replace(event, prompt_tokens=len(turn))
                    if event.finish_reason == "stop":
                        text = event.text
                yield event
        finally:
            if tokens and tokens[-1] in loaded.eos_ids:
                tokens.pop()
            answer = _canonical(tokens, tokenizer) if text is None else tokenizer.encode(text)
            self.messages.append(("assistant", tokenizer.decode(answer)))
            # The model was trained on answers that end with the end token, whatever ended this one.
            self._unread = [*answer, tokenizer.eos_id]

    def context(self) -> Context | None:
        """All turns so far as a context; None before the first."""
        if self._context is not None and self._unread:
            [self._context] = read(self._loaded.model, [self._unread], [self._context])
            self._unread = []
        return self._context


def _canonical(tokens: list[int], tokenizer: Tokenizer) -> list[int]:
    """What the tokenizer makes of the text of sampled `tokens`, less an incomplete last character.

    Returns `tokens` where their bytes are not valid text.
    """
    text = "".join(map(StreamDecoder(tokenizer).push, tokens))
    data = b"".join(tokenizer.token_bytes[id] for id in tokens)
    return tokenizer.encode(text) if data.startswith(text.encode()) else tokens
