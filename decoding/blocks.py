"""Who owns which KV block: allocation, reference counts, and the prefix cache.

Knows block ids and token ids; knows no tensors and no requests.
"""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Iterable
from collections.abc import Sequence as TokenIds
from dataclasses import dataclass
from typing import Final

ROOT: Final = 0
"""The chain that sequences without a salt start from."""

_Key = tuple[int, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class PrefixHit:
    """Blocks that hold the start of a prompt, and the chain that ended with each when they were found."""

    block_ids: tuple[int, ...] = ()
    chains: tuple[int, ...] = ()

    def chain(self, root: int) -> int:
        """What stands for all of them, found from that root on."""
        return self.chains[-1] if self.chains else root


_NOTHING: Final = PrefixHit()


class BlockPool:
    """A fixed number of blocks of `block_size` KV positions each.

    A block is either owned (reference count above 0) or free. A free block keeps its content, and a
    published one can be found again, until it is handed out anew; the longest free goes first.

    Published content is found by (chain, token ids), where the chain is a number that stands for everything
    before the block. Lookups compare token ids themselves, so nothing rests on a hash being collision-free.
    """

    def __init__(self, *, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.num_blocks = num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._num_owners = [0] * num_blocks
        self._published: dict[_Key, tuple[int, int]] = {}
        self._key_of: dict[int, _Key] = {}
        self._chain_of: dict[int, int] = {}
        self._next_chain = ROOT + 1

    @property
    def num_free(self) -> int:
        """Blocks that can be handed out, published ones included."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Blocks with an owner."""
        return self.num_blocks - len(self._free)

    def find_prefix(
        self, token_ids: TokenIds[int], *, max_tokens: int, root: int = ROOT, before: PrefixHit = _NOTHING
    ) -> PrefixHit:
        """The longest run of blocks published from this root on that starts `token_ids`, of at most `max_tokens`.

        `before` is what an earlier look found of the same ids: what is still there of it is not hashed again.
        """
        size = self.block_size
        num_known = min(self._num_still_published(before), max_tokens // size)
        block_ids, chains = list(before.block_ids[:num_known]), list(before.chains[:num_known])
        for end in range((num_known + 1) * size, max_tokens + 1, size):
            found = self._published.get((chains[-1] if chains else root, tuple(token_ids[end - size : end])))
            if found is None:
                break
            block_ids.append(found[0])
            chains.append(found[1])
        return PrefixHit(block_ids=tuple(block_ids), chains=tuple(chains))

    def _num_still_published(self, hit: PrefixHit) -> int:
        """How many of the hit's first blocks hold what they held: a chain's number is never given again."""
        for index, (block_id, chain) in enumerate(zip(hit.block_ids, hit.chains, strict=True)):
            if self._chain_of.get(block_id) != chain:
                return index
        return len(hit.block_ids)

    def num_allocatable_beside(self, hit: PrefixHit) -> int:
        """How many blocks could be allocated once `hit` is acquired."""
        return len(self._free) - sum(1 for block_id in hit.block_ids if block_id in self._free)

    def acquire(self, hit: PrefixHit) -> list[int]:
        """Become an owner of the hit's blocks."""
        for block_id in hit.block_ids:
            self._num_owners[block_id] += 1
            self._free.pop(block_id, None)
        return list(hit.block_ids)

    def allocate(self, num_blocks: int) -> list[int]:
        """Hand out blocks whose content is forgotten. `num_blocks` may not exceed `num_free`."""
        assert num_blocks <= len(self._free)
        block_ids = [self._free.popitem(last=False)[0] for _ in range(num_blocks)]
        for block_id in block_ids:
            self._num_owners[block_id] = 1
            key = self._key_of.pop(block_id, None)
            if key is not None:
                del self._published[key], self._chain_of[block_id]
        return block_ids

    def release(self, block_ids: Iterable[int]) -> None:
        """Give up one ownership of each. Later blocks are reused first: a prefix is worth more than its end."""
        for block_id in reversed(list(block_ids)):
            assert self._num_owners[block_id] > 0
            self._num_owners[block_id] -= 1
            if self._num_owners[block_id] == 0:
                self._free[block_id] = None

    def publish(self, block_id: int, *, chain: int, token_ids: TokenIds[int]) -> int:
        """Let later prompts find this owned, full block, and return the chain that ends with it.

        Where the same content is published already, that block stays the one found.
        """
        assert self._num_owners[block_id] > 0
        assert len(token_ids) == self.block_size
        key = (chain, tuple(token_ids))
        if key in self._published:
            return self._published[key][1]
        new_chain = self._next_chain
        self._next_chain += 1
        self._published[key] = (block_id, new_chain)
        self._key_of[block_id] = key
        self._chain_of[block_id] = new_chain
        return new_chain

    def check_integrity(self, owned: Iterable[Iterable[int]]) -> None:
        """Assert that the owners given account for every block that is not free, and the cache for its own."""
        counted = Counter(block_id for block_ids in owned for block_id in block_ids)
        assert [counted[block_id] for block_id in range(self.num_blocks)] == self._num_owners
        assert set(self._free) == {b for b, n in enumerate(self._num_owners) if n == 0}
        assert self._published == {
            key: (block_id, self._chain_of[block_id]) for block_id, key in self._key_of.items()
        }
        assert self._chain_of.keys() == self._key_of.keys()


def salted_root(salt: str) -> int:
    """Where chains of blocks begin that are shared among those who know the salt; below all others' numbers."""
    return -int.from_bytes(hashlib.sha256(salt.encode()).digest()) if salt else ROOT


def num_publishable(*, num_computed: int, block_size: int) -> int:
    """How many of a sequence's blocks may be published: those full of tokens computed in all layers.

    The last committed token has been chosen but not computed, so it is not counted; neither is a draft.
    """
    return num_computed // block_size
