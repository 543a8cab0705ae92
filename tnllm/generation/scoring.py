"""Log-probabilities of given tokens, for evaluation, `data score`, perplexity and the server's echo.

    for result in Scorer(model).score(requests):               # in the order they finish
        result.index, sum(result.logprobs), result.greedy
    scorer.num_tokens, scorer.plain_tokens                     # computed, and without sharing
    score_tokens(model, hidden, tokens).logprobs               # after hidden states that exist

Every shared prefix of the requests is prefilled once and its state is forked. Nodes of the prefix tree are packed as ragged
rows, each with the state after its parent; padding never enters a state. The deepest ready nodes go first, so few states
are alive at a time. A document longer than a pass is a chain of nodes, so its length costs no memory; nothing is cut off.
"""

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tnllm.errors import RunError, UserError
from tnllm.generation.prefix_tree import Node, PrefixTree, Request
from tnllm.generation.sampler import log_probabilities
from tnllm.modeling.flops import state_bytes
from tnllm.modeling.model import LanguageModel
from tnllm.modeling.packing import pack
from tnllm.modeling.state import State

# Tokens of one pass, and bytes of its initial states and of its logits.
BATCH_TOKENS = {"cpu": 4096, "cuda": 32768}
_STATE_BYTES = {"cpu": 1 << 28, "cuda": 4 << 30}
_LOGITS_BYTES = {"cpu": 1 << 26, "cuda": 1 << 29}

Report = Callable[[int, int], None]


class TokenScores(NamedTuple):
    """Log-probabilities (natural logarithm) of N tokens under R rows of logits."""

    logprobs: Tensor  # [N] fp32
    is_argmax: Tensor  # [N] bool
    top: Tensor  # [R, num_top] fp32, in descending order
    top_ids: Tensor  # [R, num_top] int64


@torch.no_grad()
def score_tokens(
    model: LanguageModel,
    hidden: Tensor,
    tokens: Tensor,
    rows: Tensor | None = None,
    num_top: int = 0,
    vocab_size: int | None = None,
) -> TokenScores:
    """Score tokens after hidden states; only a part of the logits is in memory at a time.

    hidden [R, M] of `model.hidden`; tokens [N] int64; rows [N] int64, ascending, the hidden state that each token
    follows (None: N = R, each its own). Ids from `vocab_size` are padding of the vocabulary and get no probability.
    """
    rows = torch.arange(len(tokens)) if rows is None else rows.cpu()
    step = max(1, _LOGITS_BYTES[hidden.device.type] // (4 * model.config.vocab_size))
    parts = []
    for low in range(0, len(hidden), step):
        logits = model.logits(hidden[low : low + step])
        logits[:, vocab_size or logits.shape[-1] :] = -torch.inf
        begin, end = torch.searchsorted(rows, torch.tensor([low, low + step])).tolist()
        row, token = (rows[begin:end] - low).to(hidden.device), tokens[begin:end].to(hidden.device)
        chosen, top, top_ids = log_probabilities(logits, token, num_top, row)
        parts.append((chosen, logits.argmax(-1)[row] == token, top, top_ids))
    return TokenScores(*map(torch.cat, zip(*parts, strict=True)))


@dataclass(frozen=True)
class Score:
    """One finished request."""

    index: int
    logprobs: NDArray[np.float64]  # natural logarithm, one per token of the continuation
    greedy: bool  # whether every token of the continuation is the argmax


@dataclass
class _Source:
    """Initial states of nodes, one row per parent; `serial` sorts nodes of one source next to each other."""

    serial: int
    state: State
    waiting: int  # nodes that still need it


@dataclass
class _Pending:
    """Results on the device, copied to the host after the next pass was launched."""

    numbers: NDArray[np.int64]
    scores: TokenScores


class Scorer:
    """Scores requests with a model. `share` False computes each request separately, as a plain harness does."""

    def __init__(
        self,
        model: LanguageModel,
        share: bool = True,
        batch_tokens: int | None = None,
        batch_rows: int | None = None,
        log: Callable[[str], None] = lambda text: None,
    ) -> None:
        """`batch_tokens` and `batch_rows` limit one pass (None: by device and memory). `log` is told when they shrink."""
        self.model, self.share, self.log = model, share, log
        device = model.device.type
        self.batch_tokens = batch_tokens or BATCH_TOKENS[device]
        self.batch_rows = batch_rows
        self.num_tokens = self.plain_tokens = 0

    @torch.no_grad()
    def score(self, requests: Sequence[Request], report: Report = lambda done, total: None) -> Iterator[Score]:
        """Yield a Score per request. `report` gets the tokens computed so far and in total.

        Raises UserError for an id outside the vocabulary, RunError if one node does not fit into memory or the
        model gives non-finite logits.
        """
        checked: set[int] = set()
        for request in requests:
            assert request.context and request.continuation, "a prediction needs a token before it"
            for ids in (request.context, request.continuation):
                if id(ids) not in checked:
                    checked.add(id(ids))
                    self._check_ids(ids)
        if not requests:
            return
        tree = PrefixTree(requests, self.share, max_piece=self.batch_tokens)
        self.num_tokens += tree.num_tokens
        self.plain_tokens += tree.plain_tokens
        first = tree.first_target
        logprobs = np.empty(first[-1], np.float64)
        is_argmax = np.empty(first[-1], np.bool_)
        owner = np.repeat(np.arange(len(requests)), np.diff(first))
        missing = np.diff(first)

        def finished(pending: _Pending) -> Iterator[Score]:
            numbers = pending.numbers
            logprobs[numbers] = _finite(pending.scores.logprobs.double().cpu().numpy())
            is_argmax[numbers] = pending.scores.is_argmax.cpu().numpy()
            touched, counts = np.unique(owner[numbers], return_counts=True)
            missing[touched] -= counts
            for index in touched[missing[touched] == 0].tolist():
                part = slice(first[index], first[index + 1])
                yield Score(index, logprobs[part].copy(), bool(is_argmax[part].all()))

        before: _Pending | None = None
        done = 0
        for tokens, pending in self._passes(tree, self._rows(requests)):
            if before is not None:
                yield from finished(before)
            before = pending
            done += tokens
            report(done, tree.num_tokens)
        if before is not None:
            yield from finished(before)

    @torch.no_grad()
    def read_on(
        self, ids: NDArray[np.int64], targets: NDArray[np.int64], state: State
    ) -> tuple[NDArray[np.float64], State]:
        """Log-probabilities of `targets`, one after each of `ids` [N], from a state of one row; and the state after them.

        Raises as `score` does.
        """
        self._check_ids(ids)
        self._check_ids(targets)
        model = self.model
        try:
            hidden, state = model.hidden(torch.from_numpy(ids)[None].to(model.device), state)
            scores = score_tokens(model, hidden[0], torch.from_numpy(targets))
        except torch.OutOfMemoryError:
            raise _too_large(len(ids)) from None
        return _finite(scores.logprobs.double().cpu().numpy()), state

    def _check_ids(self, ids: Sequence[int] | NDArray[np.int64]) -> None:
        vocab_size, values = self.model.config.vocab_size, np.asarray(ids)
        if not 0 <= values.min() <= values.max() < vocab_size:
            raise UserError(
                f"a token id is outside the model's vocabulary of {vocab_size}; is it the model's tokenizer?"
            )

    def _rows(self, requests: Sequence[Request]) -> int:
        """How many nodes one pass may hold, by the size of a state."""
        model = self.model
        longest = max(len(request.context) + len(request.continuation) for request in requests)
        row_bytes = state_bytes(model.config, longest, model.dtype.itemsize)
        rows = max(1, _STATE_BYTES[model.device.type] // row_bytes)
        return min(rows, self.batch_rows or rows)

    def _passes(self, tree: PrefixTree, max_rows: int) -> Iterator[tuple[int, _Pending | None]]:
        """Run the tree; yields each pass's number of tokens and its results."""
        sources: dict[Node, tuple[_Source, int]] = {}
        ready = [(0, number, node) for number, node in enumerate(tree.top)]
        heapq.heapify(ready)
        serial = len(ready)
        budget, states_alive = self.batch_tokens, 0
        while ready:
            taken = _take(ready, budget, max_rows, states_alive)
            taken.sort(key=lambda entry: (sources[entry[2]][0].serial if entry[2] in sources else 0, entry[1]))
            nodes = [node for _, _, node in taken]
            try:
                pending, after = self._run(nodes, sources)
            except torch.OutOfMemoryError:
                if len(nodes) == 1:
                    raise _too_large(len(nodes[0])) from None
                for entry in taken:
                    heapq.heappush(ready, entry)
                budget, max_rows = max(1, budget // 2), max(1, len(nodes) // 2)
                torch.cuda.empty_cache()
                self.log(f"out of GPU memory: continuing with {budget} tokens and {max_rows} rows at a time")
                continue
            for node in nodes:
                if node in sources:
                    origin, _ = sources.pop(node)
                    origin.waiting -= 1
                    states_alive -= origin.state.batch if origin.waiting == 0 else 0
            inner = [node for node in nodes if node.children]
            if inner:
                rows = [row for row, node in enumerate(nodes) if node.children]
                serial += 1
                kept = after if len(inner) == len(nodes) else after.select(rows)
                source = _Source(serial, kept, sum(len(node.children) for node in inner))
                states_alive += kept.batch
                for row, node in enumerate(inner):
                    for child in node.children:
                        serial += 1
                        sources[child] = (source, row)
                        heapq.heappush(ready, (-child.depth, serial, child))
            yield sum(map(len, nodes)), pending

    def _run(self, nodes: list[Node], sources: dict[Node, tuple[_Source, int]]) -> tuple[_Pending | None, State]:
        """One pass over nodes: their predictions and the states after them."""
        model = self.model
        tokens, cu_seqlens = pack([node.tokens for node in nodes])
        state = self._states(nodes, sources)
        lengths = cu_seqlens.to(model.device) if len(nodes) > 1 else None
        hidden, after = model.hidden(tokens.to(model.device), state, lengths)
        targets = [
            (start + span.position - node.start, span)
            for start, node in zip(cu_seqlens[:-1].tolist(), nodes, strict=True)
            for span in node.targets
        ]
        if not targets:
            return None, after
        positions = np.concatenate([np.arange(first, first + len(span.tokens)) for first, span in targets])
        numbers = np.concatenate([np.arange(span.number, span.number + len(span.tokens)) for _, span in targets])
        order = positions.argsort(kind="stable")
        # Logits only where a token is predicted, once for all that are predicted there.
        indices, rows = np.unique(positions[order], return_inverse=True)
        chosen = torch.from_numpy(np.concatenate([span.tokens for _, span in targets])[order]).long()
        predicting = hidden[0, torch.from_numpy(indices).to(hidden.device)]
        return _Pending(numbers[order], score_tokens(model, predicting, chosen, torch.from_numpy(rows))), after

    def _states(self, nodes: list[Node], sources: dict[Node, tuple[_Source, int]]) -> State:
        """The initial state of each node; nodes of one source are adjacent."""
        parts: list[tuple[State | None, list[int]]] = []
        for node in nodes:
            source, row = sources.get(node, (None, 0))
            state = None if source is None else source.state
            if not parts or parts[-1][0] is not state:
                parts.append((state, []))
            parts[-1][1].append(row)
        states = [self.model.init_state(len(rows)) if state is None else state.select(rows) for state, rows in parts]
        return states[0] if len(states) == 1 else State.cat(states)


def _too_large(tokens: int) -> RunError:
    return RunError(f"a piece of {tokens} tokens does not fit into the GPU's memory; lower --batch-tokens")


def _finite(logprobs: NDArray[np.float64]) -> NDArray[np.float64]:
    if not np.isfinite(logprobs).all():
        raise RunError("the model gives non-finite log-probabilities; are the weights complete? try --dtype float32")
    return logprobs


def _take(
    ready: list[tuple[int, int, Node]], budget: int, max_rows: int, states_alive: int
) -> list[tuple[int, int, Node]]:
    """Take the deepest nodes, then shallower ones to fill the pass while there is room for their states."""
    taken: list[tuple[int, int, Node]] = []
    deepest, tokens = ready[0][0], 0
    while ready and len(taken) < max_rows:
        depth, _, node = ready[0]
        crowded = depth != deepest and bool(node.children) and states_alive + len(taken) >= max_rows
        if taken and (tokens + len(node) > budget or crowded):
            break
        taken.append(heapq.heappop(ready))
        tokens += len(node)
    return taken
