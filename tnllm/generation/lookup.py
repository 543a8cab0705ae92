"""Prompt lookup: what followed the last tokens where they stood before is proposed, and verified in one pass of the model.

    lookup = Lookup(prompt_ids, 16)
    lookup.push(token)                   # each token of the text
    proposal = lookup.propose()          # [] or 16 tokens
    lookup.verified(5)                   # the first 5 of them were right

No draft model is needed: documents, code and answers about a text repeat what was said (Saxena, "Prompt Lookup Decoding",
2023). A proposal that is refused costs a few steps, so only a long match makes one, as in SuffixDecoding (arXiv
2411.04975): text that has followed an earlier passage for a while mostly continues to. What is asked of a match doubles
each time it misleads.
"""

from collections.abc import Sequence

import numpy as np

# Tokens that must have matched before anything is proposed. A pass over 17 tokens costs as much as five steps on a CPU, so
# that proposals which end early lose; a few words that recur by chance are no evidence.
MIN_MATCH = 8
_MOST_ASKED = 64
# Proposed tokens that must be right for a pass to have been worth its time.
WORTH = 4
# Of a longer prompt, tokens at its end that are searched.
_SEARCHED = 1 << 16


class Lookup:
    """Finds, token by token, the last passage that the text follows."""

    def __init__(self, ids: Sequence[int] | np.ndarray, count: int) -> None:
        """ids: what precedes the text. count: tokens of a proposal."""
        self._ids: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}  # of each run of MIN_MATCH tokens, the last one
        self._next = self._length = 0  # the token after the passage, and how many tokens of it the text has followed
        self._count, self._asked = count, MIN_MATCH
        self.num_proposed = self.num_right = 0  # tokens
        for id in ids[-_SEARCHED:]:
            self.push(int(id))

    def push(self, token: int) -> None:
        ids = self._ids
        follows = self._length > 0 and ids[self._next] == token
        ids.append(token)
        if len(ids) < MIN_MATCH:
            return
        run = tuple(ids[-MIN_MATCH:])
        if follows:
            self._next, self._length = self._next + 1, self._length + 1
        else:
            self._next = self._ends.get(run, 0)
            self._length = MIN_MATCH if self._next else 0
        self._ends[run] = len(ids)

    def propose(self) -> list[int]:
        """The tokens to verify next; none without a match that is long enough."""
        if self._length < self._asked:
            return []
        # A passage that reaches the end of the text repeats itself.
        period = self._ids[self._next : self._next + self._count]
        return [period[index % len(period)] for index in range(self._count)]

    def verified(self, right: int) -> None:
        self.num_proposed, self.num_right = self.num_proposed + self._count, self.num_right + right
        self._asked = MIN_MATCH if right >= WORTH else min(2 * self._asked, _MOST_ASKED)
