"""Beginnings of prompts and chats that were processed before, to be copied instead of computed.

Their keys and values lie in a tree of blocks of tokens under each owner, which is the base or one
adapter's matrices, so that personal states never serve another user. Blocks carry the name of who
asked, unless all of their tokens are public: nobody learns from timing what others asked.
"""

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from langchain_cope.engine.device import is_out_of_memory
from langchain_cope.engine.forward.kv_cache import Block
from langchain_cope.engine.rows import Row, Rows

BLOCK = 32  # tokens


_Key = tuple[Hashable, tuple[int, ...]]
"""Who asked, None for a public block, and the block's tokens."""


@dataclass(eq=False)
class _Node:
    parent: "_Node | None"
    key: _Key = (None, ())
    states: Block = field(default_factory=list)
    children: dict[_Key, "_Node"] = field(default_factory=dict)
    owner: Hashable = None


class PrefixCache:
    """At most `capacity` bytes; what was used least recently goes first."""

    def __init__(self, capacity: int, bytes_per_position: int) -> None:
        self._block_bytes = BLOCK * bytes_per_position
        self._capacity = capacity // self._block_bytes if self._block_bytes else 0
        self._roots: dict[Hashable, _Node] = {}
        self._nodes: OrderedDict[_Node, None] = OrderedDict()
        """Least recently used first; a node never before its children."""

    @property
    def num_bytes(self) -> int:
        """Bytes that are held."""
        return len(self._nodes) * self._block_bytes

    def find(self, row: Row) -> list[Block]:
        """Return the longest known beginning of the row's tokens, in blocks.

        At least one token is left to compute.
        """
        nodes = self._path(row, len(row.tokens) - 1)
        self._touch(nodes)
        return [node.states for node in nodes]

    def store(self, row: Row, rows: Rows) -> None:
        """Keep what the key-value cache of `rows` holds of `row`, in whole blocks.

        Where memory runs out, forget everything instead.
        """
        if self._capacity == 0:
            return
        try:
            self._store(row, rows)
        except Exception as error:
            self.clear()
            if not is_out_of_memory(error):
                raise

    def clear(self) -> None:
        """Forget everything."""
        self._roots.clear()
        self._nodes.clear()

    def _store(self, row: Row, rows: Rows) -> None:
        owner = row.owner
        nodes = self._path(row, row.length)
        index = None
        for start in range(len(nodes) * BLOCK, row.length - BLOCK + 1, BLOCK):
            if index is None:
                index = rows.all().index(row)
            parent = nodes[-1] if nodes else self._roots.setdefault(owner, _Node(None, owner=owner))
            key = _key(row, start)
            node = _Node(parent, key, rows.kv.read(index, start, start + BLOCK))
            parent.children[key] = node
            nodes.append(node)
        self._touch(nodes)
        while len(self._nodes) > self._capacity:
            self._forget(next(iter(self._nodes)))

    def _path(self, row: Row, length: int) -> list[_Node]:
        """Return the nodes of the blocks of the row's first `length` tokens that are known."""
        path: list[_Node] = []
        node = self._roots.get(row.owner)
        for start in range(0, length - BLOCK + 1, BLOCK):
            if node is not None:
                node = node.children.get(_key(row, start))
            if node is None:
                break
            path.append(node)
        return path

    def _touch(self, nodes: Sequence[_Node]) -> None:
        for node in reversed(nodes):  # the deepest first: it is to go before those it rests on
            self._nodes[node] = None
            self._nodes.move_to_end(node)

    def _forget(self, node: _Node) -> None:
        del self._nodes[node]
        assert node.parent is not None
        del node.parent.children[node.key]
        if node.parent.parent is None and not node.parent.children:
            del self._roots[node.parent.owner]


def _key(row: Row, start: int) -> _Key:
    """Return the key of the row's block at `start`."""
    end = start + BLOCK
    return None if end <= row.num_public else row.asker, tuple(row.tokens[start:end])


def num_shared(tokens: Sequence[int], others: Sequence[int], most: int) -> int:
    """Return how many leading tokens the two have in common, at most `most`."""
    most = min(most, len(tokens), len(others))
    for start in range(0, most, BLOCK):
        end = min(start + BLOCK, most)
        if tokens[start:end] != others[start:end]:
            return next(at for at in range(start, end) if tokens[at] != others[at])
    return most
