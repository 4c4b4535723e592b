"""N-gram drafts: what is found, what is drafted, when the source is silent, and that it survives any change of text."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Sequence
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.draft import BoundaryView
from edge_runtime.engine import Engine
from edge_runtime.ngram import GAIN, LEVELS, SIZES, Acceptance, NGramIndex, NGrams, draft_length
from edge_runtime.sampling import Sampler
from edge_runtime.slices import Slice
from edge_runtime.types import EngineSettings, Mode, Thresholds

from .fakes import FakeSlice, GreedySampler, Interrupted, fake_slices, oracle_logits

FREE = (1.0,) * 16  # a batch costs what a token does: any hope is worth a draft
LINEAR = tuple(float(k) for k in range(1, 17))
CPU = (1.0, 1.84, 2.07, 2.47, 3.04, 3.61, 3.8, 3.98, 4.4, 4.9, 5.3, 5.77, 6.2, 6.6, 7.0, 7.4)

chances = st.floats(0, 1)
costs = st.lists(st.floats(0, 2), min_size=1, max_size=15).map(lambda more: tuple(itertools.accumulate([1.0, *more])))


# ── how much to draft ───────────────────────────────────────────────────────────────────────────────────────────────


def published_per_time(p: float, k: int, cost: Sequence[float]) -> float:
    expected = k + 1 if p == 1 else (1 - p ** (k + 1)) / (1 - p)
    return expected / cost[k]


@given(chances, costs)
def test_the_length_is_the_best_by_the_formula(p: float, cost: tuple[float, ...]) -> None:
    chosen = draft_length([p] * 15, cost)
    rates = [published_per_time(p, k, cost) for k in range(len(cost))]
    if chosen:
        assert rates[chosen] == pytest.approx(max(rates))
        assert rates[chosen] > 1 + GAIN - 1e-9
    else:
        assert max(rates) <= 1 + GAIN + 1e-9


@given(chances, chances, costs)
def test_surer_drafts_are_no_shorter(p: float, q: float, cost: tuple[float, ...]) -> None:
    low, high = sorted((p, q))
    assert draft_length([low] * 15, cost) <= draft_length([high] * 15, cost)


@given(st.lists(chances, max_size=15), costs)
def test_the_length_against_all_lengths_tried(shares: list[float], cost: tuple[float, ...]) -> None:
    """Chances that differ: the expected number of tokens, summed over every way a draft can end."""

    def rate(k: int) -> float:
        ends = [math.prod(shares[:i]) * (1 - shares[i]) * (i + 1) for i in range(k)]
        return (sum(ends) + math.prod(shares[:k]) * (k + 1)) / cost[k]

    lengths = range(min(len(shares), len(cost) - 1) + 1)
    chosen = draft_length(shares, cost)
    assert chosen in lengths
    assert rate(chosen) == pytest.approx(max([rate(k) for k in lengths if rate(k) > 1 + GAIN], default=1.0), abs=1e-6)


@given(chances)
def test_where_a_batch_costs_as_much_as_its_tokens_no_draft_pays(p: float) -> None:
    assert draft_length([p] * 15, LINEAR) == 0


def test_lengths_on_a_processor_with_dear_batches() -> None:
    assert [draft_length([p] * 15, CPU) for p in (0.5, 0.8, 0.95, 1.0)] == [0, 3, 7, 15]
    assert draft_length([0.3] * 15, FREE) == 15
    assert draft_length([0.0] * 15, FREE) == 0
    assert draft_length([], CPU) == draft_length([1.0], (1.0,)) == 0


# ── what is learned ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("length", [2, 3, 4, 7, 8, 16, 300])
def test_acceptance_follows_what_is_seen_and_forgets(length: int) -> None:
    acceptance = Acceptance()
    others = [n for n in LEVELS if n > length or (n <= length and n != max(m for m in LEVELS if m <= length))]
    before = {n: acceptance.chance(n) for n in others}
    seen = []
    for right in [True] * 200 + [False] * 200 + [True] * 200:
        acceptance.count(length, right)
        seen.append(acceptance.chance(length))
    assert seen[199] > 0.96
    assert seen[399] < 0.04
    assert seen[599] > 0.96
    assert all(a < b for a, b in zip(seen[:150], seen[1:150], strict=False))
    assert {n: acceptance.chance(n) for n in others} == before


# ── the index ───────────────────────────────────────────────────────────────────────────────────────────────────────


def slow_find(text: Sequence[int], index_places: int = 4) -> tuple[int, int] | None:
    """By looking at every place of the text."""
    for size in SIZES:
        places = [p for p in range(len(text) - 1, size - 1, -1) if list(text[p - size : p]) == list(text[-size:])]
        if not places or len(text) <= size:
            continue

        def agree(place: int) -> int:
            most = min(place, LEVELS[-1])
            return next((i for i in range(most) if text[place - 1 - i] != text[len(text) - 1 - i]), most)

        # the first of the best: the most recent
        return max(((p, agree(p)) for p in places[:index_places]), key=lambda found: found[1])
    return None


TEXTS = st.lists(st.integers(0, 2), max_size=40)


@given(TEXTS)
def test_the_longest_match_is_found_and_of_equals_the_latest(text: list[int]) -> None:
    index = NGramIndex()
    index.follow(text)
    assert index.find() == slow_find(text)


@given(st.lists(TEXTS, min_size=1, max_size=8))
def test_after_any_change_of_text_the_index_is_a_fresh_one(texts: list[list[int]]) -> None:
    index, fresh = NGramIndex(), NGramIndex()
    for text in texts:
        index.follow(text)
        if index.text != text:  # the last tokens were the same, and hid the change
            assert index.text[-4:] == text[-4:]
            index.follow(())
            index.follow(text)
    fresh.follow(texts[-1])
    assert (index.text, index._latest, index._before) == (fresh.text, fresh._latest, fresh._before)


def test_the_work_for_a_token_does_not_grow_with_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise AssertionError("the whole text was looked at")

    for n in (100, 10_000):
        text = [i % 7 for i in range(n)]
        index = NGramIndex()
        index.follow(text)
        with monkeypatch.context() as patched:
            patched.setattr("edge_runtime.ngram.common_prefix", refuse)
            for token in range(20):
                text.append(token)
                index.follow(text)
                index.find()
        assert index.text == text


# ── the source, asked by hand ───────────────────────────────────────────────────────────────────────────────────────


def drafted(source: NGrams, text: Sequence[int], cap: int = 100) -> list[int]:
    """The whole draft that the source makes for a text."""
    tokens = list(text)
    while len(tokens) < len(text) + cap and (guess := source.guess(BoundaryView(0, tokens, None, None))) is not None:
        assert guess.ids is not None
        assert guess.signals.gate == guess.uncertainty
        assert 0 <= guess.uncertainty < 1
        tokens.append(int(guess.ids[0]))
    return tokens[len(text) :]


def test_a_draft_is_what_followed_before() -> None:
    assert drafted(NGrams(FREE[:5]), [1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2]) == [3, 4, 5, 6]


def test_the_latest_place_counts_unless_another_agrees_further_back() -> None:
    assert drafted(NGrams(FREE[:2]), [1, 2, 8, 0, 1, 2, 9, 0, 0, 1, 2]) == [9]
    assert drafted(NGrams(FREE[:2]), [5, 1, 2, 3, 4, 8, 6, 1, 2, 3, 4, 9, 5, 1, 2, 3, 4]) == [8]


def test_a_repetition_is_continued_beyond_the_end_of_the_text() -> None:
    assert drafted(NGrams(FREE), [7, 1, 2, 3, 1, 2, 3, 1, 2]) == [3, *[1, 2, 3] * 4, 1, 2]


@pytest.mark.parametrize("text", [[1], [1, 2], [1, 2, 1], list(range(50)), [1, 1]])
def test_where_nothing_was_said_before_there_is_no_draft(text: list[int]) -> None:
    assert drafted(NGrams(FREE), text) == []


def test_it_stands_before_the_first_slice_and_follows_no_states() -> None:
    source = NGrams(FREE)
    assert [source.speaks_at(b) for b in range(3)] == [True, False, False]
    assert not source.wants_logits
    assert not source.wants_states


def copying(n: int) -> list[int]:
    """Text that says everything twice."""
    return [*range(n), *range(n)]


def test_drafts_grow_with_what_is_accepted_and_shrink_with_what_is_not() -> None:
    source, text = NGrams(CPU), [*range(400), 0, 1]
    lengths = []
    while len(text) < 700:
        draft = drafted(source, text)
        lengths.append(len(draft))
        text += range(text[-1] + 1, text[-1] + len(draft) + 2)  # all accepted, and a token of full depth's
    assert lengths[-1] == 15
    # from here on the text is another: each match is followed by something else
    wrong, places = 0, iter(range(0, 380, 3))
    for _ in range(120):
        place = next(places)
        text += [place, place + 1, place + 2]
        wrong += len(drafted(source, text))
        text.append(1000 + place)
    assert drafted(source, [*text, 10, 11, 12]) == []
    assert wrong < 60


def test_silence_costs_no_draft_and_yet_it_learns_when_drafts_would_pay() -> None:
    """A text that begins to copy is noticed by what would have been drafted."""
    source = NGrams(CPU)
    text, silent = [*range(300), 0, 1], 0
    while not drafted(source, text):
        text.append(text[-1] + 1)
        silent += 1
        assert silent < 200
    assert silent > 1
    linear, text = NGrams(LINEAR), [*range(300), 0, 1]
    for token in range(2, 299):
        assert drafted(linear, text) == []
        text.append(token)


def test_a_forced_settle_cuts_a_draft_and_the_rest_of_it_is_no_loss() -> None:
    source, text = NGrams(FREE), [*range(60), 0, 1]
    assert drafted(source, text, cap=3) == [2, 3, 4]
    text += [2, 3, 4, 5]
    assert drafted(source, text)[:3] == [6, 7, 8]


def test_a_refused_draft_is_not_gone_on_with() -> None:
    source, text = NGrams(FREE[:5]), [*range(60), 0, 1]
    assert drafted(source, text) == [2, 3, 4, 5]
    assert drafted(source, [*text, 2, 3, 4, 20, 21, 22]) == [23, 24, 25, 26]
    assert drafted(source, [*text, 2]) == [3, 4, 5, 6]


def test_what_a_prompt_adds_is_not_taken_for_what_the_model_said() -> None:
    source, text = NGrams(FREE), [*range(60), 0, 1]
    drafted(source, text)
    before = list(source._acceptance._seen)
    drafted(source, [*text, *range(100, 140)])
    assert source._acceptance._seen == before


# ── the source in the engine ────────────────────────────────────────────────────────────────────────────────────────

PERIOD = [3, 1, 4, 1, 5, 9, 2, 6]


class PeriodicSlice(FakeSlice):
    """A model that mostly says what stood one period before, and something else now and then."""

    text: list[int]

    def logits(self, row: int):  # type: ignore[no-untyped-def]
        real = super().logits(row)
        at = len(self.inputs) - self.rows + row + 1
        if at >= len(PERIOD) and at % 17 != 3:
            real[self.tokens[at - len(PERIOD)]] += 100
        return real

    def decode_tokens(self, tokens, first_pos, want=(), route=None):  # type: ignore[no-untyped-def]
        self.rows = len(tokens)
        self.tokens = [*getattr(self, "tokens", [])[:first_pos], *tokens]
        super().decode_tokens(tokens, first_pos, want, route)


def periodic_logits(text: Sequence[int]):  # type: ignore[no-untyped-def]
    logits = oracle_logits(text, 2)
    if len(text) >= len(PERIOD) and len(text) % 17 != 3:
        logits[text[len(text) - len(PERIOD)]] += 100
    return logits


def full_depth(prompt: Sequence[int], n: int, noisy: bool) -> list[int]:
    sampler, text = GreedySampler(noisy), list(prompt)
    sampler.history = list(prompt)
    for _ in range(n):
        text.append(sampler.sample(periodic_logits(text)))
        sampler.accept(text[-1])
    return text[len(prompt) :]


def make_engine(cap: int = 15, noisy: bool = False, n_ctx: int | None = None) -> tuple[Engine, PeriodicSlice]:
    piece = PeriodicSlice(0, 2, 2, n_batch=8, n_outputs_max=cap + 1, has_hidden=False)
    engine = Engine(
        cast(list[Slice], [piece]),
        cast(Sampler, GreedySampler(noisy)),
        EngineSettings(Mode.VERIFIED, cap),
        lambda: Thresholds(()),
        NGrams(FREE[: cap + 1]),
        n_ctx=n_ctx,
    )
    return engine, piece


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("cap", [1, 2, 5, 15])
def test_the_text_is_full_depths(cap: int, noisy: bool) -> None:
    engine, _ = make_engine(cap, noisy)
    engine.extend(PERIOD)
    steps = list(engine.generate(60))
    assert [s.token for s in steps] == full_depth(PERIOD, 60, noisy)
    assert engine.stats.accepted > 20
    assert engine.stats.accepted < engine.stats.drafted
    assert engine.stats.settles < 45 if cap > 1 else True
    assert {s.boundary for s in steps} == {None, 0}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("generate"), st.integers(1, 30), st.integers(1, 30)),
            st.tuples(st.just("extend"), st.lists(st.integers(0, 12), min_size=1, max_size=14)),
            st.tuples(st.just("rollback"), st.integers(1, 60)),
            st.tuples(st.just("interrupt"), st.integers(0, 4), st.integers(1, 20)),
            st.tuples(st.just("reset"), st.integers(0, 3)),
        ),
        max_size=8,
    ),
    st.booleans(),
    st.integers(1, 15),
)
def test_turns_rollbacks_stops_and_interruptions(actions: list[tuple[object, ...]], noisy: bool, cap: int) -> None:
    engine, piece = make_engine(cap, noisy)
    engine.extend(PERIOD)
    for action in actions:
        text = list(engine.tokens)
        match action:
            case ("generate", int(n), int(taken)):
                steps = engine.generate(n)
                seen = [s.token for s in itertools.islice(steps, taken)]
                steps.close()
                assert seen == full_depth(text, min(n, taken), noisy)
                assert engine.tokens == text + seen
            case ("extend", list(tokens)):
                engine.extend(tokens)
            case ("rollback", int(length)):
                engine.rollback(length)
            case ("reset", int(shift)):
                engine.reset()
                engine.extend([(token + shift) % 13 for token in PERIOD])
            case ("interrupt", int(after), int(n)):
                piece.interrupt_in = after
                seen = []
                with contextlib.suppress(Interrupted):
                    seen.extend(step.token for step in engine.generate(n))
                piece.interrupt_in = None
                assert engine.tokens[: len(text)] == text
    text = list(engine.tokens)
    assert [s.token for s in engine.generate(40)] == full_depth(text, 40, noisy)


def test_no_draft_goes_beyond_the_context() -> None:
    engine, _ = make_engine(n_ctx=29)
    engine.extend(PERIOD)
    assert [s.token for s in engine.generate(100)] == full_depth(PERIOD, 21, False)


def test_a_random_text_is_left_alone() -> None:
    """No batch is ever larger than one token where drafts would not pay."""
    slices = fake_slices((), 6, n_outputs_max=16)
    engine = Engine(
        cast(list[Slice], slices),
        cast(Sampler, GreedySampler()),
        EngineSettings(Mode.VERIFIED, 15),
        lambda: Thresholds(()),
        NGrams(CPU),
    )
    engine.extend([1])
    list(engine.generate(80))
    assert engine.stats.drafted <= 4
    assert slices[0].largest_batch <= 5


@pytest.mark.parametrize("after", range(0, 40, 3))
def test_an_interrupted_change_is_made_again(after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C at any token of a longer text, or of a shorter one."""
    text = [1, 2, 3, 4] * 12
    for start, end in ((text[:8], text), (text, [*text[:20], 9, 9, 1, 2])):
        index, left = NGramIndex(), [after]
        index.follow(start)
        real = NGramIndex._append

        def interrupted(self: NGramIndex, token: int, left: list[int] = left, real: Any = real) -> None:
            left[0] -= 1
            real(self, token)
            if left[0] < 0:
                self.text.pop()  # half of it is done
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(NGramIndex, "_append", interrupted)
            with contextlib.suppress(KeyboardInterrupt):
                index.follow(end)
        index.follow(end)
        fresh = NGramIndex()
        fresh.follow(end)
        assert (index.text, index._latest, index._before) == (fresh.text, fresh._latest, fresh._before)
