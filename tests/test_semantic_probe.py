"""Fitting a semantic entropy probe: what it learns on other prompts, where high begins, what it refuses."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from edge_runtime.errors import BoundaryError, PromptError, UsageError
from edge_runtime.metrics import auroc
from edge_runtime.native import ContextOptions, Model
from edge_runtime.semantic.probe import FEWEST_PROMPTS, Probe, best_split, fit_probe
from edge_runtime.semantic.prompt_states import PromptStates, prompt_states
from edge_runtime.slices import open_slices
from edge_runtime.types import Floats

from .conftest import TinyMaker

OPTIONS = ContextOptions(n_ctx=64, n_batch=16, n_threads=1)


def sample(n: int = 240, width: int = 12, seed: int = 0, noise: float = 0.5) -> tuple[Floats, Floats]:
    """States of which one direction tells high entropies from low, dimensions of very different size."""
    random = np.random.default_rng(seed)
    states = random.normal(size=(n, width))
    score = states[:, 0] - states[:, 1] + noise * random.normal(size=n)
    entropies = np.where(score > 0, 1.6, 0.3) + 0.1 * random.normal(size=n)
    sizes = np.random.default_rng(99).uniform(0.01, 100, (2, width))
    return (states * sizes[0] + sizes[1]).astype(np.float32), np.clip(entropies, 0, None).astype(np.float32)


def made(**changes: Any) -> Probe:
    values: dict[str, Any] = {
        "layer": 2,
        "weights": np.array([1.0, -1.0], np.float32),
        "bias": 0.5,
        "mean": np.zeros(2, np.float32),
        "scale": np.ones(2, np.float32),
        "threshold": 1.0,
        "penalty": 1.0,
        "n_prompts": 30,
        "n_high": 10,
        "loss": 0.5,
        "auroc": 0.8,
    }
    return Probe(**(values | changes))


# ── where high begins ───────────────────────────────────────────────────────────────────────────────────────────────


def squares(values: Floats) -> float:
    return float(((values - values.mean()) ** 2).sum())


@pytest.mark.parametrize("seed", range(5))
def test_the_best_split_leaves_the_least_variance(seed: int) -> None:
    values = np.random.default_rng(seed).choice([0.0, 0.4, 0.7, 1.1, 1.9, 2.08], 40)
    edges = [(a + b) / 2 for a, b in itertools.pairwise(np.unique(values))]
    costs = [squares(values[values <= edge]) + squares(values[values > edge]) for edge in edges]
    assert best_split(values) == pytest.approx(edges[int(np.argmin(costs))])


@pytest.mark.parametrize("values", [[], [1.0], [0.7] * 9, [0.1, float("nan")], [0.1, float("inf")]])
def test_what_cannot_be_split_is_refused(values: list[float]) -> None:
    with pytest.raises(UsageError, match="equally uncertain"):
        best_split(np.array(values, np.float32))


# ── fitting ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("width", [12, 400])
def test_a_probe_ranks_prompts_it_has_not_seen(width: int) -> None:
    states, entropies = sample(400, width)
    probe = fit_probe(states[:240], entropies[:240], layer=5)
    high = entropies[240:] > probe.threshold
    found = auroc(high, probe.predict(states[240:]))
    assert found > (0.9 if width == 12 else 0.65)
    assert probe.auroc == pytest.approx(found, abs=0.1)
    assert (probe.layer, probe.n_embd, probe.n_prompts) == (5, width, 240)
    assert 0.5 < probe.threshold < 1.4


def test_probabilities_are_calibrated_where_the_probe_cannot_know() -> None:
    states, entropies = sample(seed=3)
    entropies = np.random.default_rng(4).permutation(entropies)
    probe = fit_probe(states, entropies, layer=1)
    share = (entropies > probe.threshold).mean()
    assert probe.predict(states) == pytest.approx(np.full(len(states), share), abs=0.1)
    assert probe.penalty == 100.0


def test_the_weights_minimise_the_penalised_loss() -> None:
    """By its definition, with more prompts than dimensions and with fewer."""
    for width in (6, 60):
        states, entropies = sample(40, width)
        probe = fit_probe(states, entropies, layer=1)
        assert probe.penalty == fit_probe(states, entropies, layer=1, penalty=probe.penalty).penalty < 100
        inputs = np.clip((states - probe.mean) / probe.scale, -8, 8).astype(np.float64)
        high = entropies > probe.threshold
        n_high = high.sum()
        targets = np.where(high, (n_high + 1) / (n_high + 2), 1 / (len(high) - n_high + 2))
        p = 1 / (1 + np.exp(-(inputs @ probe.weights.astype(np.float64) + probe.bias)))
        assert inputs.T @ (p - targets) + probe.penalty * width * probe.weights == pytest.approx(
            np.zeros(width), abs=1e-3
        )
        assert float((p - targets).sum()) == pytest.approx(0, abs=1e-3)


def test_equal_input_gives_an_equal_probe_and_the_seed_deals_the_folds() -> None:
    states, entropies = sample(60)
    one, two, other = (fit_probe(states, entropies, 1, seed=seed) for seed in (0, 0, 1))
    assert one.weights.tobytes() == two.weights.tobytes()
    assert (one.loss, one.auroc) == (two.loss, two.auroc)
    assert one.loss != other.loss


def test_a_given_threshold_and_penalty_are_used() -> None:
    states, entropies = sample()
    probe = fit_probe(states, entropies, 1, threshold=0.3, penalty=7.0)
    assert (probe.threshold, probe.penalty, probe.n_high) == (0.3, 7.0, int((entropies > 0.3).sum()))


def test_dimensions_that_never_change_get_no_say() -> None:
    states, entropies = sample()
    states[:, 3] = 1234.5
    probe = fit_probe(states, entropies, 1)
    assert probe.weights[3] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s, e: (s[: FEWEST_PROMPTS - 1], e[: FEWEST_PROMPTS - 1]), "too few to fit"),
        (lambda s, e: (np.where(s == s[3, 3], np.nan, s), e), "no numbers"),
        (lambda s, e: (s, np.ones_like(e)), "equally uncertain"),
        (lambda s, e: (s, np.where(np.arange(len(e)) < 3, 2.0, 0.1)), "too few of one kind"),
    ],
)
def test_what_cannot_be_learned_from_is_refused(change: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        fit_probe(*change(*sample()), layer=1)


# ── predictions ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_predictions_are_those_of_the_formula_and_far_states_are_cut() -> None:
    probe = made(mean=np.array([1.0, 0.0], np.float32), scale=np.array([2.0, 1.0], np.float32))
    found = probe.predict(np.array([[3.0, 0.5], [1e9, 0.0], [np.inf, 0.0], [np.nan, 0.0]], np.float32))
    assert found[0] == pytest.approx(1 / (1 + np.exp(-(1.0 - 0.5 + 0.5))))
    assert found[1] == found[2] == pytest.approx(1 / (1 + np.exp(-8.5)))
    assert np.isnan(found[3])
    assert found.dtype == np.float32


@pytest.mark.parametrize(
    "changes",
    [
        {"weights": np.zeros(3, np.float32)},
        {"weights": np.zeros((1, 2), np.float32)},
        {name: np.zeros(0, np.float32) for name in ("weights", "mean", "scale")},
        {"bias": float("nan")},
        {"mean": np.array([0, np.inf], np.float32)},
        {"scale": np.array([1, 0], np.float32)},
        {"layer": 0},
        {"threshold": -0.1},
    ],
)
def test_numbers_that_do_not_fit_together_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"its|not all"):
        made(**changes)


def test_states_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match="of width 2"):
        made().predict(np.zeros((1, 3), np.float32))
    with pytest.raises(ValueError, match="of width 2"):
        made().predict(np.zeros(2, np.float32))


# ── states ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_states_are_those_of_the_last_token_at_each_boundary(tiny_path: TinyMaker) -> None:
    prompts = [[5 + (i * 7 + k) % 60 for i in range(n)] for k, n in enumerate((1, 9, 16, 40))]
    with Model(str(tiny_path("llama"))) as model:
        found = prompt_states(model, prompts, (2, 5), OPTIONS)
        assert found.shape == (4, 2, model.n_embd)
        slices = open_slices(model, (2, 5), OPTIONS)
        for prompt, states in zip(prompts, found, strict=True):
            hidden: Floats | None = None
            for i, piece in enumerate(slices[:2]):
                piece.remove(0)
                rows = []
                for start in range(0, len(prompt), 16):
                    batch = prompt[start : start + 16]
                    if hidden is None:
                        piece.decode_tokens(batch, start)
                    else:
                        piece.decode_states(hidden[start : start + 16], start)
                    rows.append(piece.hidden(len(batch)).copy())
                hidden = np.concatenate(rows)
                assert states[i].tobytes() == hidden[-1].tobytes()
        assert prompt_states(model, [], (2, 5), OPTIONS).shape == (0, 2, model.n_embd)


def test_prompts_that_do_not_fit_and_boundaries_that_are_not_there(tiny_path: TinyMaker) -> None:
    with Model(str(tiny_path("llama"))) as model:
        for boundaries in ((), (7,), (5, 2)):
            with pytest.raises(BoundaryError):
                PromptStates(model, boundaries, OPTIONS)
        with PromptStates(model, (3,), OPTIONS) as reader:
            with pytest.raises(PromptError, match="empty"):
                reader.read([])
            with pytest.raises(PromptError, match="65 tokens long"):
                reader.read([5] * 65)
            assert reader.read([5] * 64).shape == (1, model.n_embd)
