"""Token sequences as a tree of shared prefixes, and forward passes that read each branch once.

A pass is a batch of rows. A row holds whole subtrees, one after the other, each in preorder, so
that the tokens which may attend to the one at column `j` are those at columns `j` to `ends[j]`: its
own subtree (tree attention: Miao et al., SpecInfer, arXiv:2305.09781). What is too large for one
pass is cut: its first tokens are read on their own and kept, and what follows stands on them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

_KEYS_A_TOKEN = 1024
"""Attending to so many keys takes about as long as all else that is done with a token. By count it
is six times the hidden size (Kaplan et al., arXiv:2001.08361); attention is the slower part."""
_TOKENS_A_PASS = 64
"""A pass of few tokens takes about as long as one of so many."""


@dataclass(frozen=True)
class Query:
    """A sequence to read, and the tokens that shall be scored after its last ones."""

    index: int
    """Position in the order of the results."""
    tokens: tuple[int, ...]
    targets: tuple[int, ...]
    """At least one, at most as many as `tokens`. The last is scored after the last token."""

    @property
    def first_scored(self) -> int:
        """Position after which the first target is scored."""
        return len(self.tokens) - len(self.targets)


@dataclass(eq=False)
class Node:
    """Tokens that all sequences below it share: positions `start` to `end` of them."""

    start: int
    end: int
    low: int
    high: int = 0
    """The sequences below it are `low` to `high` of the sorted ones."""
    size: int = 0
    """Tokens of it and of all below it."""
    children: list[Node] = field(default_factory=list)

    def preorder(self) -> Iterator[Node]:
        """The node and all below it, each before what is below it."""
        stack = [self]
        while stack:
            node = stack.pop()
            yield node
            stack += reversed(node.children)

    @property
    def length(self) -> int:
        """Tokens of its own."""
        return self.end - self.start


@dataclass(frozen=True)
class Target:
    """A token whose probability is asked for."""

    column: int
    """Where in its row the token before it stands."""
    index: int
    """Of its query."""
    token: int


@dataclass(frozen=True)
class PackedRow:
    """Subtrees, or a part of one branch, laid end to end."""

    tokens: tuple[int, ...]
    positions: tuple[int, ...]
    """Of each token in its sequence."""
    ends: tuple[int, ...]
    """Column behind the last token that may attend to this one."""
    targets: tuple[Target, ...]
    """By column."""


@dataclass(frozen=True)
class Pass:
    """A batch of rows that all stand on the same tokens."""

    past: int
    """How many of the tokens kept last the rows stand on."""
    rows: tuple[PackedRow, ...]
    keep: bool
    """Whether later passes stand on `past` and its one row."""

    @property
    def width(self) -> int:
        """Length of the longest row."""
        return max(len(row.tokens) for row in self.rows)


class PrefixTree:
    """A radix tree over the tokens of all queries, without what is not worth being shared.

    Args:
        queries: in any order, some perhaps of the same tokens.
        budget: most tokens of a pass, padding included and kept tokens not.
    """

    def __init__(self, queries: Sequence[Query], budget: int) -> None:
        self._queries = sorted(queries, key=lambda query: query.tokens)
        self._budget = budget
        self.root = self._grow()

    def passes(self) -> Iterator[Pass]:
        """Depth first, so that only the tokens above the present branch need to be kept."""
        stack = [self.root]
        while stack:
            node = stack.pop()
            for start in range(node.start, node.end, self._budget):
                end = min(start + self._budget, node.end)
                keep = end < node.end or bool(node.children)
                yield Pass(start, (self._pack([(node, start, end)], nested=False),), keep)
            for rows in _share_out(node, self._budget):
                yield Pass(node.end, tuple(self._pack(_spans(row)) for row in rows), keep=False)
            stack += [child for child in reversed(node.children) if child.size > self._budget]

    def _grow(self) -> Node:
        root = Node(0, 0, 0)
        branch = [root]
        before: tuple[int, ...] = ()
        for number, query in enumerate(self._queries):
            shared = _shared_length(before, query.tokens)
            self._climb(branch, shared, number)
            if len(query.tokens) > shared:
                leaf = Node(shared, len(query.tokens), number)
                branch[-1].children.append(leaf)
                branch.append(leaf)
            before = query.tokens
        self._climb(branch, 0, len(self._queries))
        root.high = len(self._queries)
        root.size = sum(child.size for child in root.children)
        return root

    def _climb(self, branch: list[Node], depth: int, high: int) -> None:
        """Close the nodes of a branch that reach below `depth`; the last one is split there."""
        while branch[-1].end > depth:
            node = branch.pop()
            if branch[-1].end < depth:
                upper = Node(node.start, depth, node.low, children=[node])
                branch[-1].children[-1] = upper
                branch.append(upper)
                node.start = depth
            node.high = high
            node.size = node.length + sum(child.size for child in node.children)
            branch[-1].children[-1:] = self._worthwhile(node)

    def _worthwhile(self, node: Node) -> list[Node]:
        """The node, or what is below it, each with a copy of the node's tokens.

        Sharing saves all copies but one. It costs attention between the branches, computed and
        masked, if all are in one row; and a pass of its own if they do not fit into one.
        """
        if not node.children:
            return [node]
        ended = self._ended(node)
        saved = node.length * (len(node.children) - (0 if ended else 1))
        fits = node.size <= self._budget
        if saved >= (node.size**2 / _KEYS_A_TOKEN if fits else _TOKENS_A_PASS):
            return [node]
        for child in node.children:
            child.start = node.start
            child.size += node.length
        return [*ended, *node.children]

    def _ended(self, node: Node) -> list[Node]:
        """A leaf for the queries that end with this node; they come first among those below it."""
        high = node.children[0].low
        if high == node.low:
            return []
        return [Node(node.start, node.end, node.low, high, node.length)]

    def _pack(self, spans: Sequence[tuple[Node, int, int]], nested: bool = True) -> PackedRow:
        """One row of positions `start` to `end` of each node, in this order."""
        tokens: list[int] = []
        positions: list[int] = []
        ends: list[int] = []
        targets: list[Target] = []
        for node, start, end in spans:
            column = len(tokens)
            tokens += self._queries[node.low].tokens[start:end]
            positions += range(start, end)
            ends += [column + (node.size if nested else end - start)] * (end - start)
            targets += self._targets(node, start, end, column)
        targets.sort(key=lambda target: target.column)
        return PackedRow(tuple(tokens), tuple(positions), tuple(ends), tuple(targets))

    def _targets(self, node: Node, start: int, end: int, column: int) -> Iterator[Target]:
        for query in self._queries[node.low : node.high]:
            first = query.first_scored
            for position in range(max(start, first), end):
                token = query.targets[position - first]
                yield Target(column + position - start, query.index, token)


def _shared_length(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """Length of the longest common prefix, by bisection: comparing slices is fast."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _share_out(node: Node, budget: int) -> Iterator[list[list[Node]]]:
    """Rows of the children that fit into a pass, longest first: first-fit decreasing.

    A row is as long as the longest child. It may also be as long as what it stands on: the keys and
    values of that are repeated for each row, and cost no more than the row itself then. Longer rows
    would only compute more attention between children, which is masked.
    """
    children = [child for child in node.children if child.size <= budget]
    children.sort(key=lambda child: -child.size)
    rows: list[list[Node]] = []
    room: list[int] = []
    length = 0
    for child in children:
        row = next((row for row, left in enumerate(room) if left >= child.size), None)
        if row is None and rows and (len(rows) + 1) * length > budget:
            yield rows
            rows, room = [], []
        if not rows:
            length = max(child.size, min(node.end, budget))
        if row is None or not rows:
            rows.append([])
            room.append(length)
            row = len(rows) - 1
        rows[row].append(child)
        room[row] -= child.size
    if rows:
        yield rows


def _spans(nodes: Sequence[Node]) -> list[tuple[Node, int, int]]:
    return [(node, node.start, node.end) for top in nodes for node in top.preorder()]
