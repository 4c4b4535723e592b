"""Which sequence a prompt gets: what is shared, copied, kept and given up."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.batching.pool import WORTH_KEEPING, Place, SequencePool
from edge_runtime.prefix import common_prefix

SYSTEM = list(range(100, 100 + 2 * WORTH_KEEPING))


def pool_of(*held: list[int], busy: tuple[int, ...] = ()) -> SequencePool:
    """A pool whose sequences hold these texts; they were used in this order."""
    pool = SequencePool(len(held))
    for sequence, text in zip(pool.sequences, held, strict=True):
        sequence.held = list(text)
        pool.take(sequence)
        pool.release(sequence)
        if sequence.number in busy:
            pool.take(sequence)
    return pool


def place(pool: SequencePool, prompt: list[int]) -> tuple[int, int, int | None, bool]:
    """(sequence, shared, copied from, evicted)"""
    found = pool.find(prompt)
    assert found is not None
    source = None if found.source is None else found.source.number
    return found.sequence.number, found.n_shared, source, found.evicted


def test_a_conversation_that_goes_on_keeps_its_sequence() -> None:
    text = [*SYSTEM, *range(40)]
    pool = pool_of([], [*SYSTEM, 7, 7], text, [])
    assert place(pool, [*text, 1, 2]) == (2, len(text), None, False)
    # … also where its end was written in another way
    assert place(pool, [*text[:-5], 1, 2]) == (2, len(text) - 5, None, False)


def test_the_same_prompt_again_leaves_its_last_token_to_be_run() -> None:
    assert place(pool_of(SYSTEM), SYSTEM) == (0, len(SYSTEM) - 1, None, False)


def test_a_common_beginning_is_copied_and_its_owner_keeps_all() -> None:
    other = [*SYSTEM, *range(WORTH_KEEPING)]
    assert place(pool_of(other, []), [*SYSTEM, 1, 1]) == (1, len(SYSTEM), 0, False)
    assert place(pool_of(other, [1] * 50, [2] * 50), [*SYSTEM, 1, 1]) == (1, len(SYSTEM), 0, True)
    assert place(pool_of(other, [], busy=(0,)), [*SYSTEM, 1, 1]) == (1, len(SYSTEM), 0, False)


def test_where_there_is_no_other_place_the_owner_gives_up_its_own_end() -> None:
    other = [*SYSTEM, *range(WORTH_KEEPING)]
    assert place(pool_of(other, [5], busy=(1,)), [*SYSTEM, 1, 1]) == (0, len(SYSTEM), None, True)


def test_a_few_common_tokens_are_no_reason_to_take_a_conversation() -> None:
    assert place(pool_of([1, *range(50, 90)], []), [1, 2, 3]) == (1, 0, None, False)
    assert place(pool_of([1, *range(50, 90)], [1, *range(60)]), [1, 2, 3]) == (0, 1, None, True)


def test_a_short_conversation_is_continued_in_place() -> None:
    assert place(pool_of([], [1, 2, 3, 4]), [1, 2, 3, 4, 5]) == (1, 4, None, False)


def test_the_one_not_used_for_the_longest_time_goes() -> None:
    pool = pool_of([1] * 40, [2] * 40, [3] * 40)
    assert place(pool, [9]) == (0, 0, None, True)
    pool.take(pool.sequences[0])
    pool.release(pool.sequences[0])
    assert place(pool, [9]) == (1, 0, None, True)


def test_no_place_while_all_are_busy() -> None:
    pool = pool_of([1], [2], busy=(0, 1))
    assert pool.n_free == 0
    assert pool.find([1, 2]) is None
    pool.release(pool.sequences[1])
    assert pool.n_free == 1


def test_what_is_cut_off_is_still_in_the_cache() -> None:
    (sequence,) = pool_of([1, 2, 3]).sequences
    sequence.keep(3)
    assert not sequence.dirty
    sequence.keep(1)
    assert (sequence.held, sequence.dirty) == ([1], True)


TEXTS = st.lists(st.integers(0, 1), max_size=6).map(lambda blocks: [n for b in blocks for n in [b] * 20])


@given(st.lists(TEXTS, min_size=1, max_size=4), st.sets(st.integers(0, 3)), TEXTS.map(lambda t: [*t, 0]))
def test_any_place_is_sound(held: list[list[int]], busy: set[int], prompt: list[int]) -> None:
    pool = pool_of(*held, busy=tuple(busy))
    found = pool.find(prompt)
    idle = [s for s in pool.sequences if not s.busy]
    if not idle:
        assert found is None
        return
    assert isinstance(found, Place)
    assert found.sequence in idle
    owner = found.source or found.sequence
    assert owner.held[: found.n_shared] == prompt[: found.n_shared]
    assert found.n_shared == common_prefix(owner.held, prompt[:-1])
    best = max(common_prefix(s.held, prompt[:-1]) for s in pool.sequences)
    assert best - found.n_shared < WORTH_KEEPING
    assert found.source is not found.sequence
    # an idle conversation is given up only if nothing is empty
    if found.evicted and len(idle) > 1:
        assert all(s.held or s is owner for s in idle)
