"""Who owns which block of the paged cache: reference counts, copy-on-write, and a cache of prefixes.

A block is free (nothing of value in it), used (some sequence holds it, `refs > 0`), or cached (no sequence holds it,
but its content may serve a later prompt). Always

    free + cached + used = total

A full block's content is known by its tokens *and* by all tokens before it: its key is (content of the block before it,
its own tokens), where contents are numbered when first seen. Two equal keys therefore mean equal prefixes, token for
token; a hash only finds the candidates (Python compares the tuples).
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence

from irc.core.errors import IrcError

ROOT = 0
"""Content before the first block."""

_Key = tuple[int, tuple[int, ...]]


class BlockManager:
    """Hands out blocks 0 … num_blocks - 1 of `block_size` tokens."""

    def __init__(self, num_blocks: int, block_size: int, *, prefix_cache: bool = True) -> None:
        self.num_blocks, self.block_size, self.prefix_cache = num_blocks, block_size, prefix_cache
        self.refs = [0] * num_blocks
        self._free: deque[int] = deque(range(num_blocks))
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._contents: dict[_Key, tuple[int, int]] = {}  # key → (number of the content, block)
        self._keys: dict[int, _Key] = {}  # of blocks whose content can be found
        self._next_content = ROOT + 1

    @property
    def num_available(self) -> int:
        """Blocks that can be allocated now."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_available

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that this many tokens fill."""
        return -(-num_tokens // self.block_size)

    # ---------------------------------------------------------------- taking and giving back

    def allocate(self, count: int) -> list[int] | None:
        """`count` blocks with one reference each, or None when there are not as many."""
        if count > self.num_available:
            return None
        return [self._take() for _ in range(count)]

    def _take(self) -> int:
        if self._free:
            block = self._free.popleft()
        else:
            block, _ = self._cached.popitem(last=False)
            del self._contents[self._keys.pop(block)]
        self.refs[block] = 1
        return block

    def share(self, blocks: Iterable[int]) -> None:
        """One more sequence holds these blocks."""
        for block in blocks:
            if self.refs[block] == 0:
                del self._cached[block]
            self.refs[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """A sequence holds these blocks no more."""
        # Last blocks first: what is evicted first should be the end of a prefix, not its beginning.
        for block in reversed(blocks):
            self.refs[block] -= 1
            if self.refs[block] == 0:
                if block in self._keys:
                    self._cached[block] = None
                else:
                    self._free.append(block)

    # ---------------------------------------------------------------- prefixes

    def match(self, ids: Sequence[int]) -> tuple[list[int], list[int]]:
        """Blocks that hold the beginning of `ids`, with one reference more, and their contents' numbers.

        At least one token is left over: its logits are wanted.
        """
        blocks: list[int] = []
        contents: list[int] = []
        if self.prefix_cache:
            parent, size = ROOT, self.block_size
            for start in range(0, len(ids) - size, size):
                found = self._contents.get((parent, tuple(ids[start : start + size])))
                if found is None:
                    break
                parent = found[0]
                contents.append(parent)
                blocks.append(found[1])
            self.share(blocks)
        return blocks, contents

    def register(self, parent: int, tokens: Sequence[int], block: int) -> int:
        """A block has been filled with `tokens` behind content `parent`: the number of its content.

        When another block holds the same, that one stays the one to be found.
        """
        if not self.prefix_cache:
            return ROOT
        key = (parent, tuple(tokens))
        found = self._contents.get(key)
        if found is None:
            found = (self._next_content, block)
            self._next_content += 1
            self._contents[key] = found
            self._keys[block] = key
        return found[0]

    def forget(self) -> None:
        """Drop all cached prefixes."""
        self._free.extend(self._cached)
        self._cached.clear()
        self._contents.clear()
        self._keys.clear()

    # ---------------------------------------------------------------- invariants

    def check(self, held: Iterable[Sequence[int]]) -> None:
        """Check the books against the block lists of all sequences.

        Raises:
            IrcError: says which equation does not hold.
        """
        counts = [0] * self.num_blocks
        for blocks in held:
            if len(set(blocks)) != len(blocks):
                raise IrcError(f"a sequence holds a block twice: {list(blocks)}")
            for block in blocks:
                counts[block] += 1
        if counts != self.refs:
            wrong = [(b, r, c) for b, (r, c) in enumerate(zip(self.refs, counts, strict=True)) if r != c]
            raise IrcError(f"references ≠ sequences that hold the block (block, refs, holders): {wrong[:5]}")
        free, cached = set(self._free), set(self._cached)
        used = {block for block, count in enumerate(counts) if count}
        if len(free) != len(self._free) or free & cached or free & used or cached & used:
            raise IrcError(f"blocks in two places: {sorted(free & cached | free & used | cached & used)}")
        if len(free) + len(cached) + len(used) != self.num_blocks:
            raise IrcError(f"free {len(free)} + cached {len(cached)} + used {len(used)} ≠ {self.num_blocks}")
        if any(self._contents[key][1] != block for block, key in self._keys.items()) or not cached <= set(self._keys):
            raise IrcError("a cached block cannot be found by its content")
