"""A conversation: the state holds the past, so a turn costs what is new in it, however long the talk has been.

talk = Conversation(ready, params, ready.chat_template)
for event in talk.ask("Who are you?"):
    ...                              # as from `generate`
talk.reset()
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from tnllm.errors import UserError
from tnllm.generation.context import Context, read
from tnllm.generation.decoder import generate
from tnllm.generation.loading import Ready
from tnllm.generation.sampler import SamplingParams
from tnllm.generation.samples import Piece, Result


def split_template(template: str) -> tuple[str, str]:
    """What comes before and after the prompt. Raises UserError."""
    opening, placeholder, closing = template.partition("{prompt}")
    if not placeholder or "{prompt}" in closing:
        raise UserError(f"the chat template is {template!r}; it must hold {{prompt}} once")
    return opening, closing


def opening_stop(template: str) -> tuple[str, ...]:
    """The stop string that ends an answer in which the model begins to speak for the other side, if there is one."""
    opening = split_template(template)[0].strip()
    return ("\n" + opening,) if opening else ()


def message_ids(ready: Ready, messages: Sequence[tuple[str, str]]) -> list[int]:
    """Token ids of a whole talk, (role, text) each, up to where the answer begins: what Conversation reads.

    An optional "system" (or "developer") text comes first and goes before the first turn on a line of its own; then
    "user" and "assistant" take turns, and "user" has the last word. Raises UserError otherwise.
    """
    opening, closing = split_template(ready.chat_template)
    before = ""
    if messages and messages[0][0] in ("system", "developer"):
        before = messages[0][1] + "\n"
        messages = messages[1:]
    for place, (role, _) in enumerate(messages):
        if role != ("user", "assistant")[place % 2]:
            raise UserError(
                f"message {place} after the system text is of role {role!r}; user and assistant take turns, user first"
            )
    if len(messages) % 2 == 0:
        raise UserError("the last message must be of role 'user'")
    ids: list[int] = []
    for role, text in messages:
        if role == "assistant":
            ids += [*ready.tokenizer.encode(text), ready.tokenizer.eos_id]
        else:
            ids += ready.encode(before + opening + text + closing, start=not ids)
            before = ""
    return ids


class Conversation:
    """Turns after one another. `start`: a context to talk about, such as a document."""

    def __init__(self, ready: Ready, params: SamplingParams, template: str, start: Context | None = None) -> None:
        """`template` holds {prompt} once. Its opening words end an answer, in case the model speaks for both."""
        self._ready, self._template, self._start = ready, split_template(template), start
        self._params = replace(params, stop=(*params.stop, *opening_stop(template)), n=1)
        self.reset()

    def reset(self) -> None:
        """Forget every turn."""
        self._context = self._start
        self._unread: list[int] = []

    def ask(self, message: str) -> Iterator[Piece | Result]:
        """The answer, as from `generate`. If it is broken off, the part that came is remembered."""
        ready = self._ready
        opening, closing = self._template
        turn = ready.encode(opening + message + closing, start=self._context is None)
        [self._context] = read(ready.model, [self._unread + turn], [self._context])
        self._unread = []
        tokens: list[int] = []
        events = generate(
            ready.model, ready.tokenizer, [[]], self._params, contexts=[self._context], eos_ids=ready.eos_ids
        )
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
            # The model was trained on answers that end with the end token, whatever ended this one.
            answer = tokens if text is None else ready.tokenizer.encode(text)
            if answer and answer[-1] in ready.eos_ids:
                answer = answer[:-1]
            self._unread = [*answer, ready.tokenizer.eos_id]

    def context(self) -> Context | None:
        """All turns so far, read; None before the first."""
        if self._context is not None and self._unread:
            [self._context] = read(self._ready.model, [self._unread], [self._context])
            self._unread = []
        return self._context
