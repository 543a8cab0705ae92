"""From token ids to text that may be shown: complete characters only, and nothing of a stop string.

stream = TextStream(tokenizer, before=prompt_ids, stop=("\\nHuman:",))
for id in ids:
    print(stream.push(id), end="")
    if stream.stopped:
        break
print(stream.close())
"""

from collections.abc import Sequence

from tnllm.tokenizer import StreamDecoder, Tokenizer

# A UTF-8 character has at most 4 bytes, so at most 4 tokens; a few more cover control tokens between them.
TAIL_TOKENS = 8


class StopFinder:
    """Ends a streamed text before the first stop string in it, however the text is split into pieces.

    Of two stop strings that end at the same character, the longer one counts.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._pending = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The text that is now known to precede any stop string. Must not be called once `stopped`."""
        assert not self.stopped
        if not self._stop:
            return text
        self._pending += text
        ends = [(at + len(stop), at) for stop in self._stop if (at := self._pending.find(stop)) >= 0]
        if ends:
            self.stopped = True
            return self._release(min(ends)[1], forget=True)
        return self._release(len(self._pending) - self._partial())

    def close(self) -> str:
        """The text that was held back because a stop string might have begun."""
        return self._release(len(self._pending))

    def _partial(self) -> int:
        """Length of the longest suffix of the text that is a prefix of a stop string."""
        longest = min(len(self._pending), max(len(stop) - 1 for stop in self._stop))
        for length in range(longest, 0, -1):
            if any(stop.startswith(self._pending[-length:]) for stop in self._stop):
                return length
        return 0

    def _release(self, length: int, forget: bool = False) -> str:
        text, self._pending = self._pending[:length], "" if forget else self._pending[length:]
        return text


class TextStream:
    """The text of generated ids, without an incomplete last character."""

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = (), stop: Sequence[str] = ()) -> None:
        """`before`: the ids that precede the text; only the last few matter."""
        self._decoder = StreamDecoder(tokenizer)
        for id in before[-TAIL_TOKENS:]:
            self._decoder.push(id)
        self._finder = StopFinder(stop)
        self.num_chars = 0  # complete ones among the ids so far, those of a stop string included

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found; the text ends before it."""
        return self._finder.stopped

    def push(self, id: int) -> str:
        """The text that is certain with `id`."""
        text = self._decoder.push(id)
        self.num_chars += len(text)
        return self._finder.push(text) if text else ""

    def close(self) -> str:
        """The rest, after the last id."""
        return "" if self.stopped else self._finder.close()
