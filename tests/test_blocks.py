"""The block pool under random use against a model of it that remembers whole prefixes."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from decoding.blocks import ROOT, BlockPool, PrefixHit, num_publishable, salted_root

Prefix = tuple[int, ...]

TOKENS = st.lists(st.integers(0, 1), min_size=0, max_size=14)
"""Two ids only, so that different sequences share prefixes and blocks repeat within one."""


class Holder:
    """One sequence as the pool's caller keeps it: tokens, their blocks, and how many it published."""

    def __init__(self, tokens: list[int], block_ids: list[int], hit: PrefixHit) -> None:
        self.tokens = tokens
        self.block_ids = block_ids
        self.num_published = len(hit.block_ids)
        self.chain = hit.chain(ROOT)


class PoolMachine(RuleBasedStateMachine):
    """Holders allocate, publish, share and release; a block holds the prefix it was computed with."""

    @initialize(num_blocks=st.integers(1, 8), block_size=st.integers(1, 3))
    def start(self, num_blocks: int, block_size: int) -> None:
        self.pool = BlockPool(num_blocks=num_blocks, block_size=block_size)
        self.holders: list[Holder] = []
        self.content: dict[int, Prefix] = {}
        """The prefix that each published block was computed with, until the block is handed out anew."""
        self.has_evicted = False
        self.looks: list[tuple[list[int], PrefixHit]] = []
        """What was looked for, and what was found last."""
        self.freed: list[int] = list(range(num_blocks))
        """Blocks without an owner, the longest free first."""

    def prefix(self, tokens: list[int], num_blocks: int) -> Prefix:
        return tuple(tokens[: num_blocks * self.pool.block_size])

    def check_hit(self, hit: PrefixHit, tokens: list[int], max_tokens: int) -> None:
        """Each block found was computed with exactly the tokens up to its end, and nothing there is missed.

        Once blocks were evicted, what lies behind them may be missed: it hangs on a start that is gone.
        """
        for index, block_id in enumerate(hit.block_ids, start=1):
            assert self.content[block_id] == self.prefix(tokens, index)
        limit = max_tokens // self.pool.block_size
        assert len(hit.block_ids) <= limit
        if not self.has_evicted:
            known = set(self.content.values())
            missing = [n for n in range(1, limit + 1) if self.prefix(tokens, n) not in known]
            assert len(hit.block_ids) == min(missing, default=limit + 1) - 1

    @rule(tokens=TOKENS, data=st.data())
    def begin(self, tokens: list[int], data: st.DataObject) -> None:
        max_tokens = data.draw(st.integers(0, len(tokens)))
        hit = self.pool.find_prefix(tokens, max_tokens=max_tokens)
        self.check_hit(hit, tokens, max_tokens)
        self.looks.append((tokens, hit))
        num_missing = -(-len(tokens) // self.pool.block_size) - len(hit.block_ids)
        free_beside = [b for b in self.freed if b not in hit.block_ids]
        assert self.pool.num_allocatable_beside(hit) == len(free_beside)
        if num_missing > len(free_beside):
            return
        block_ids = self.pool.acquire(hit)
        self.freed = free_beside
        self.holders.append(Holder(tokens, block_ids + self.allocate(num_missing), hit))

    def allocate(self, num_blocks: int) -> list[int]:
        given_out = self.pool.allocate(num_blocks)
        assert given_out == self.freed[:num_blocks]
        self.freed = self.freed[num_blocks:]
        for block_id in given_out:
            self.has_evicted |= self.content.pop(block_id, None) is not None
        return given_out

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def publish_next(self, data: st.DataObject) -> None:
        holder = data.draw(st.sampled_from(self.holders))
        size, index = self.pool.block_size, holder.num_published
        if (index + 1) * size > len(holder.tokens):
            return
        holder.chain = self.pool.publish(
            holder.block_ids[index], chain=holder.chain, token_ids=holder.tokens[index * size :][:size]
        )
        holder.num_published += 1
        prefix = self.prefix(holder.tokens, index + 1)
        if self.has_evicted or prefix not in self.content.values():
            self.content[holder.block_ids[index]] = prefix

    @precondition(lambda self: self.looks)
    @rule(data=st.data(), more=TOKENS)
    def look_again(self, data: st.DataObject, more: list[int]) -> None:
        """Whatever was published and evicted in between, an earlier look changes nothing of what is found."""
        tokens, before = self.looks.pop(data.draw(st.integers(0, len(self.looks) - 1)))
        tokens = tokens + more
        max_tokens = data.draw(st.integers(0, len(tokens)))
        hit = self.pool.find_prefix(tokens, max_tokens=max_tokens, before=before)
        assert hit == self.pool.find_prefix(tokens, max_tokens=max_tokens)
        self.looks.append((tokens, hit))

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        holder = self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1)))
        self.pool.release(holder.block_ids)
        still_owned = {b for other in self.holders for b in other.block_ids}
        self.freed += [b for b in reversed(holder.block_ids) if b not in still_owned]

    @invariant()
    def every_block_is_accounted_for(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.pool.check_integrity([holder.block_ids for holder in self.holders])
        assert self.pool.num_free == len(self.freed)
        assert self.pool.num_used == self.pool.num_blocks - len(self.freed)


TestPoolUnderRandomUse = PoolMachine.TestCase
TestPoolUnderRandomUse.settings = settings(
    deadline=None, derandomize=True, max_examples=200, stateful_step_count=40
)


def publish_all(pool: BlockPool, block_ids: list[int], tokens: list[int]) -> None:
    chain = ROOT
    for index, block_id in enumerate(block_ids):
        part = tokens[index * pool.block_size : (index + 1) * pool.block_size]
        chain = pool.publish(block_id, chain=chain, token_ids=part)


def test_a_block_is_found_only_behind_the_prefix_it_was_computed_with() -> None:
    """Keys and values depend on everything before them, so equal tokens after other tokens are no hit."""
    pool = BlockPool(num_blocks=4, block_size=2)
    publish_all(pool, pool.allocate(2), [1, 2, 3, 4])
    assert pool.find_prefix([3, 4], max_tokens=2).block_ids == ()
    assert len(pool.find_prefix([1, 2, 3, 4], max_tokens=4).block_ids) == 2
    assert len(pool.find_prefix([1, 2, 9, 9, 3, 4], max_tokens=6).block_ids) == 1


def test_what_an_earlier_look_found_is_looked_up_anew_where_its_block_holds_something_else() -> None:
    """The block that starts the prefix has gone to another start, then to this one again, with another end."""
    pool = BlockPool(num_blocks=2, block_size=1)
    start, end = pool.allocate(2)
    publish_all(pool, [start, end], [5, 6])
    before = pool.find_prefix([5, 6], max_tokens=2)
    assert before.block_ids == (start, end)
    pool.release([start])
    assert pool.allocate(1) == [start]
    assert pool.find_prefix([5, 6], max_tokens=2, before=before) == PrefixHit()
    publish_all(pool, [start], [9])
    assert pool.find_prefix([5, 6], max_tokens=2, before=before) == PrefixHit()
    pool.release([start])
    assert pool.allocate(1) == [start]
    publish_all(pool, [start], [5])
    assert pool.find_prefix([5, 6], max_tokens=2, before=before).block_ids == (start,)


def test_blocks_are_shared_among_those_of_one_salt() -> None:
    pool, roots = BlockPool(num_blocks=4, block_size=1), [ROOT, salted_root("a"), salted_root("b")]
    assert len(set(roots)) == 3
    assert salted_root("a") == roots[1] < ROOT
    for root in roots:
        assert pool.find_prefix([7], root=root, max_tokens=1) == PrefixHit()
        (block_id,) = pool.allocate(1)
        pool.publish(block_id, chain=root, token_ids=[7])
        assert pool.find_prefix([7], root=root, max_tokens=1).block_ids == (block_id,)
    pool.check_integrity([[0], [1], [2]])


def test_a_hit_never_exceeds_the_tokens_allowed() -> None:
    pool = BlockPool(num_blocks=4, block_size=2)
    publish_all(pool, pool.allocate(2), [1, 2, 3, 4])
    assert [len(pool.find_prefix([1, 2, 3, 4], max_tokens=n).block_ids) for n in range(5)] == [0, 0, 1, 1, 2]


def test_a_freed_prefix_can_be_found_until_its_blocks_are_handed_out() -> None:
    pool = BlockPool(num_blocks=3, block_size=1)
    first = pool.allocate(2)
    publish_all(pool, first, [7, 8])
    pool.release(first)
    assert pool.find_prefix([7, 8], max_tokens=2).block_ids == tuple(first)
    # The never-used block goes first, then the prefix's end: its start is worth more.
    taken = pool.allocate(2)
    assert first[1] in taken
    assert pool.find_prefix([7, 8], max_tokens=2).block_ids == (first[0],)
    pool.check_integrity([taken])


def test_a_shared_block_is_free_only_when_its_last_owner_let_go() -> None:
    pool = BlockPool(num_blocks=2, block_size=1)
    block_ids = pool.allocate(1)
    publish_all(pool, block_ids, [5])
    pool.acquire(pool.find_prefix([5], max_tokens=1))
    pool.release(block_ids)
    assert pool.num_free == 1
    pool.release(block_ids)
    assert pool.num_free == 2
    pool.check_integrity([])


def test_content_published_twice_continues_one_chain() -> None:
    """Two sequences that computed the same prefix apart go on to share what follows."""
    pool = BlockPool(num_blocks=4, block_size=1)
    first, second = pool.allocate(1), pool.allocate(2)
    chain = pool.publish(first[0], chain=ROOT, token_ids=[5])
    assert pool.publish(second[0], chain=ROOT, token_ids=[5]) == chain
    pool.publish(second[1], chain=chain, token_ids=[6])
    assert pool.find_prefix([5, 6], max_tokens=2).block_ids == (first[0], second[1])


def test_a_chain_outlives_its_block_but_leads_nowhere_new() -> None:
    """After a prefix's block is reused for other content, what was published behind it is not found."""
    pool = BlockPool(num_blocks=2, block_size=1)
    start, end = pool.allocate(2)
    publish_all(pool, [start, end], [5, 6])
    pool.release([start])
    assert pool.allocate(1) == [start]
    pool.publish(start, chain=ROOT, token_ids=[9])
    assert pool.find_prefix([5, 6], max_tokens=2).block_ids == ()
    assert pool.find_prefix([9, 6], max_tokens=2).block_ids == (start,)


def test_the_integrity_check_notices_a_leak_and_a_double_owner() -> None:
    pool = BlockPool(num_blocks=2, block_size=1)
    block_ids = pool.allocate(1)
    pool.check_integrity([block_ids])
    for wrong in ([], [block_ids, block_ids], [[1 - block_ids[0]]]):
        with pytest.raises(AssertionError):
            pool.check_integrity(wrong)


@pytest.mark.parametrize(("num_computed", "expected"), [(0, 0), (3, 0), (4, 1), (7, 1), (8, 2)])
def test_only_blocks_full_of_computed_tokens_are_publishable(num_computed: int, expected: int) -> None:
    assert num_publishable(num_computed=num_computed, block_size=4) == expected
