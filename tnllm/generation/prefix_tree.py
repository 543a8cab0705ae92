"""A radix tree over the token ids of a list of requests, in which every shared prefix occurs once.

    tree = PrefixTree([Request(context, continuation), ...])      # ids; both at least one token
    tree.plain_tokens, tree.num_tokens                            # without sharing, and with it
    PrefixTree(requests, share=False)                             # every request by itself

Few-shot headers, question stems and equal contexts of several answers all become inner nodes. A request's tokens are its
context and its continuation without the last token, which is only predicted.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# A fork copies a state; at 385M that takes about as long as computing this many tokens again.
MIN_SAVED_TOKENS = 32

Ids = NDArray[np.int32]


@dataclass(frozen=True)
class Request:
    """What to score: the log-probability of `continuation` after `context`, as token ids. Neither is empty."""

    context: Sequence[int]
    continuation: Sequence[int]


class Targets(NamedTuple):
    """Predictions of consecutive tokens: token i follows position `position + i` of its sequence and has number
    `number + i` among all predictions.
    """

    position: int
    tokens: Ids
    number: int


@dataclass(eq=False)
class Node:
    """A part of a sequence, after its parent's: tokens `ids[start:end]` of the complete sequence `ids`."""

    ids: Ids
    start: int
    end: int
    parent: "Node | None"
    children: list["Node"] = field(default_factory=list)
    depth: int = 0
    # Predictions that follow this node's tokens.
    targets: list[Targets] = field(default_factory=list)
    # Where the sequences that ended here end now: in a child of a dissolved node, or in the rest of a split one.
    heir: "Node | None" = None

    def __len__(self) -> int:
        return self.end - self.start

    @property
    def tokens(self) -> Ids:
        return self.ids[self.start : self.end]


class PrefixTree:
    """The tree of some requests; `top` are the nodes that start a text."""

    def __init__(
        self,
        requests: Sequence[Request],
        share: bool = True,
        max_piece: int | None = None,
        min_saved: int = MIN_SAVED_TOKENS,
    ) -> None:
        """`max_piece` splits longer nodes into chains. Nodes whose sharing saves fewer than `min_saved` tokens dissolve."""
        inputs = _inputs(requests)
        self.plain_tokens = sum(len(ids) for ids in inputs)
        root = Node(np.empty(0, np.int32), 0, 0, None)
        if share:
            ends = _grow(root, inputs)
            _dissolve(root, min_saved)
        else:
            ends = [Node(ids, 0, len(ids), root) for ids in inputs]
            root.children = list(ends)
        _settle(root, max_piece)
        self._assign_targets(requests, ends)
        self.top = root.children
        for node in self.top:
            node.parent = None
        self.num_tokens = sum(len(node) for node in self.nodes())

    def nodes(self) -> list[Node]:
        """Every node, each after its parent."""
        nodes = list(self.top)
        for node in nodes:
            nodes.extend(node.children)
        return nodes

    def _assign_targets(self, requests: Sequence[Request], ends: list[Node]) -> None:
        """Number all predictions and assign each to the node whose token it follows."""
        lengths = np.array([len(request.continuation) for request in requests], np.int64)
        self.first_target = np.concatenate([[0], lengths.cumsum()])
        for request, end, number in zip(requests, ends, self.first_target.tolist(), strict=False):
            node, tokens = end, np.array(request.continuation, np.int32)
            while node.heir is not None:
                node = node.heir
            first, stop = len(request.context) - 1, len(tokens)
            while stop:
                start = max(0, node.start - first)
                if start < stop:
                    node.targets.append(Targets(first + start, tokens[start:stop], number + start))
                    stop = start
                if stop:
                    assert node.parent is not None
                    node = node.parent


def _inputs(requests: Sequence[Request]) -> list[Ids]:
    """The input ids of each request. Choices of a question share one context object, which is converted once."""
    known: dict[int, Ids] = {}
    inputs = []
    for request in requests:
        context = known.get(id(request.context))
        if context is None:
            context = known[id(request.context)] = np.array(request.context, np.int32)
        if len(request.continuation) > 1:
            context = np.concatenate([context, np.array(request.continuation[:-1], np.int32)])
        inputs.append(context)
    return inputs


def _grow(root: Node, inputs: list[Ids]) -> list[Node]:
    """Build the tree in the sequences' lexicographic order; returns the last node of each."""
    # Big-endian bytes sort as the ids do, and compare at memcmp's speed.
    known: dict[int, bytes] = {}
    keys = []
    for ids in inputs:
        if id(ids) not in known:
            known[id(ids)] = ids.astype(">i4").tobytes()
        keys.append(known[id(ids)])
    order = sorted(range(len(inputs)), key=keys.__getitem__)
    ends = [root] * len(inputs)
    path = [root]
    previous = -1
    for number in order:
        ids = inputs[number]
        shared = 0
        if previous >= 0:
            shared = len(ids) if keys[previous] == keys[number] else _common(inputs[previous], ids)
        below = None
        while path[-1].end > shared:
            below = path.pop()
        top = path[-1]
        if top.end < shared:
            assert below is not None
            middle = Node(below.ids, top.end, shared, top, [below])
            top.children[-1] = middle
            below.start, below.parent = shared, middle
            path.append(middle)
            top = middle
        if len(ids) > top.end:
            leaf = Node(ids, top.end, len(ids), top)
            top.children.append(leaf)
            path.append(leaf)
        ends[number] = path[-1]
        previous = number
    return ends


def _common(first: Ids, second: Ids) -> int:
    length = min(len(first), len(second))
    different = first[:length] != second[:length]
    return int(different.argmax()) if different.any() else length


def _dissolve(root: Node, min_saved: int) -> None:
    """Dissolve nodes that save too little: their tokens are computed again in every child."""
    todo = [root]
    while todo:
        node = todo.pop()
        children: list[Node] = []
        queue = list(node.children)
        while queue:
            child = queue.pop()
            if child.children and (len(child.children) - 1) * len(child) < min_saved:
                for grandchild in child.children:
                    grandchild.start, grandchild.parent = child.start, node
                child.heir = child.children[0]
                queue.extend(child.children)
            else:
                children.append(child)
        node.children = children[::-1]
        todo.extend(children)


def _settle(root: Node, max_piece: int | None) -> None:
    """Split long nodes into chains and set the depths."""
    todo = list(root.children)
    while todo:
        node = todo.pop()
        if max_piece is not None and len(node) > max_piece:
            cut = node.start + max_piece
            rest = Node(node.ids, cut, node.end, node, node.children)
            for child in rest.children:
                child.parent = rest
            node.end, node.children, node.heir = cut, [rest], rest
        for child in node.children:
            child.depth = node.depth + 1
        todo.extend(node.children)
