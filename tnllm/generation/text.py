"""From token ids to text that may be shown: whole characters only, and nothing of a stop string.

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
    """Cuts a text that comes in pieces before the stop string that is complete first, however it is cut in pieces.

    Of two that end at the same character the longer one counts.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """What of the text so far is now known to lie before any stop string. Call no more once `stopped`."""
        assert not self.stopped
        self._held += text
        ends = [(at + len(stop), at) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if ends:
            self.stopped = True
            return self._release(min(ends)[1], forget=True)
        return self._release(len(self._held) - self._partial())

    def close(self) -> str:
        """What was held back because a stop string might have come."""
        return self._release(len(self._held))

    def _partial(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        longest = min(len(self._held), max((len(stop) - 1 for stop in self._stop), default=0))
        for length in range(longest, 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stop):
                return length
        return 0

    def _release(self, length: int, forget: bool = False) -> str:
        text, self._held = self._held[:length], "" if forget else self._held[length:]
        return text


class TextStream:
    """The text of generated ids. An incomplete last character is left out."""

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = (), stop: Sequence[str] = ()) -> None:
        """`before` holds the ids that precede the text; only the last few matter."""
        self._decoder = StreamDecoder(tokenizer)
        for id in before[-TAIL_TOKENS:]:
            self._decoder.push(id)
        self._finder = StopFinder(stop)

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found; the text ends before it."""
        return self._finder.stopped

    def push(self, id: int) -> str:
        """Text that became certain with `id`."""
        text = self._decoder.push(id)
        return self._finder.push(text) if text else ""

    def close(self) -> str:
        """The rest, when no more ids come."""
        return "" if self.stopped else self._finder.close()
