"""The look at a hidden state that decides whether its head is run."""

from __future__ import annotations

import numpy as np
import pytest

from edge_runtime.errors import UsageError
from edge_runtime.exits.asking import Asker, ask_always, fit_asker, likely_exits


def _world(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """States of all lengths; those that lean to one side exit, mostly."""
    random = np.random.default_rng(seed)
    states = random.standard_normal((n, 24)) * random.uniform(0.1, 50, (n, 1))
    lean = states[:, 3] / np.sqrt((states**2).mean(axis=1)) + 0.3 * random.standard_normal(n)
    return states.astype(np.float32), lean > 1.0


def test_few_are_asked_and_most_exits_kept() -> None:
    asker = fit_asker(*_world(6000, 0))
    states, exits = _world(6000, 1)
    marks = asker.marks(states)
    assert marks[exits].mean() > 0.9
    assert marks.mean() < 2.2 * exits.mean()
    # by chance, as many marks would keep as many exits
    assert marks[exits].mean() > 2 * marks.mean()


def test_one_state_is_judged_as_many_are() -> None:
    asker = fit_asker(*_world(2000, 2))
    states, _ = _world(300, 3)
    # a state at the very floor may fall on either side of it by rounding
    margin = np.abs(states @ asker.weights / np.sqrt((states**2).mean(axis=1)) - asker.floor)
    clear = margin > 1e-4
    one_by_one = np.asarray([asker.worth_asking(state) for state in states])
    assert np.array_equal(one_by_one[clear], asker.marks(states)[clear])
    assert clear.sum() > 290
    assert 0 < one_by_one.sum() < 300


@pytest.mark.parametrize("n_exits", [0, 5, 295, 300])
def test_too_little_to_learn_from_means_always(n_exits: int) -> None:
    states, _ = _world(300, 4)
    asker = fit_asker(states, np.arange(300) < n_exits)
    assert asker.marks(states).all()
    assert asker.worth_asking(np.zeros(24, np.float32))


def test_floor_keeps_the_share_asked_for() -> None:
    states, exits = _world(6000, 5)
    kept = [fit_asker(states, exits, share).marks(states)[exits].mean() for share in (0.5, 0.8, 1.0)]
    assert kept == pytest.approx([0.5, 0.8, 1.0], abs=0.01)


def test_always_and_without_states() -> None:
    assert ask_always(4).worth_asking(np.ones(4, np.float32))
    assert not Asker(np.zeros(4, np.float32), 1.0).worth_asking(np.ones(4, np.float32))
    with pytest.raises(UsageError, match="no states"):
        fit_asker(np.zeros((0, 4)), np.zeros(0, bool))


def test_likely_exits_are_the_surest() -> None:
    uncertainty = np.asarray([0.3, 0.1, np.nan, 0.2, 0.5, 0.4], np.float32)
    wrong = np.asarray([True, False, True, False, False, False])
    # in order of uncertainty: right, right, wrong, right, right; risks 0, 0, 1/3, 1/4, 1/5
    assert likely_exits(uncertainty, wrong, 0.0).tolist() == [False, True, False, True, False, False]
    assert likely_exits(uncertainty, wrong, 0.2).tolist() == [True, True, False, True, True, True]
    assert likely_exits(uncertainty, wrong, 0.24).sum() == 5
    assert not likely_exits(uncertainty, np.ones(6, bool), 0.5).any()
    assert not likely_exits(np.full(6, np.nan, np.float32), wrong, 1.0).any()
