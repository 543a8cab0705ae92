"""A conversation: the state holds the past, so a turn costs what is new in it, however long the talk has been.

talk = Conversation(ready, params, ready.chat_template)
for event in talk.ask("Who are you?"):
    ...                              # as from `generate`
talk.reset()
"""

from collections.abc import Iterator
from dataclasses import replace

from tnllm.errors import UserError
from tnllm.generation.context import Context, read
from tnllm.generation.decoder import generate
from tnllm.generation.loading import Ready
from tnllm.generation.rows import Piece, Result
from tnllm.generation.sampler import SamplingParams


class Conversation:
    """Turns after one another. `start`: a context to talk about, such as a document."""

    def __init__(self, ready: Ready, params: SamplingParams, template: str, start: Context | None = None) -> None:
        """`template` holds {prompt} once. Its opening words end an answer, in case the model speaks for both."""
        opening, placeholder, closing = template.partition("{prompt}")
        if not placeholder or "{prompt}" in closing:
            raise UserError(f"the chat template is {template!r}; it must hold {{prompt}} once")
        self._ready, self._template, self._start = ready, (opening, closing), start
        stop = (*params.stop, "\n" + opening.strip()) if opening.strip() else params.stop
        self._params = replace(params, stop=stop, n=1)
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
