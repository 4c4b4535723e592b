"""Predictions of a tiny random head against decoding by hand and against full distributions."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.errors import PackError, UsageError
from edge_runtime.exits.baselines import (
    by_signal,
    cosine_stability,
    fixed_exits,
    logit_lens,
    slerp,
    slerp_lens,
)
from edge_runtime.exits.collect import top_of
from edge_runtime.exits.corpus import Shard, Text
from edge_runtime.exits.evaluate import Predictions, acceptance_bound, cosines, predict
from edge_runtime.exits.gate import fit_gate
from edge_runtime.exits.head import HeadContext, HeadShape, write_head
from edge_runtime.exits.ridge import rms_norm

N_EMBD, N_VOCAB, N_LISTED, TOP_K = 64, 200, 40, 12
LAYERS = (2, 3)
LENGTHS = (1, 40, 70)
STARTS = np.int32([0, 1, 5, 6, 20])


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    x = logits.astype(np.float64) / temperature
    p = np.exp(x - x.max(axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True)


@pytest.fixture(scope="module")
def shortlist() -> np.ndarray:
    """In no order of ids, as clusters have them."""
    return np.random.default_rng(1).permutation(N_VOCAB)[:N_LISTED].astype(np.int32)


@pytest.fixture(scope="module")
def full() -> np.ndarray:
    """The full model's logits (targets, n_vocab), from peaked to flat."""
    random = np.random.default_rng(2)
    n = sum(len(rows_of(length)) for length in LENGTHS)
    return (random.uniform(0.5, 5, (n, 1)) * random.standard_normal((n, N_VOCAB))).astype(np.float32)


def rows_of(length: int) -> np.ndarray:
    """Positions of a text that are targets: some of it is a prompt."""
    return np.arange(length // 3, length)


@pytest.fixture(scope="module")
def texts(full: np.ndarray) -> list[Text]:
    """Three texts of one shard, longer than a batch, shorter, and of one token."""
    random = np.random.default_rng(3)
    offsets = np.cumsum([0, *LENGTHS])
    kept = [top_of(row, TOP_K) for row in full]
    arrays = {
        "tokens": random.integers(0, N_VOCAB, offsets[-1]).astype(np.int32),
        "offsets": offsets,
        "prompts": np.int32([7, 3, 9]),
        "rows": np.concatenate([rows_of(n) + s for n, s in zip(LENGTHS, offsets, strict=False)]),
        "top_ids": np.stack([ids for ids, _ in kept]),
        "top_logp": np.stack([logp for _, logp in kept]).astype(np.float16),
    }
    for layer in LAYERS:
        arrays[f"layer_{layer}"] = random.standard_normal((offsets[-1], N_EMBD)).astype(np.float16)
    return list(Shard(Path("nowhere"), arrays).texts())


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    random = np.random.default_rng(4)
    shape = HeadShape(N_EMBD, 2, 1, 64, N_LISTED + 1)
    tensors = {n: (random.standard_normal(s) / 8).astype(np.float32) for n, s in shape.matrices.items()}
    tensors |= {name: np.ones(N_EMBD, np.float32) for name in shape.norms}
    table = (random.standard_normal((shape.n_rows, N_EMBD)) * 0.4).astype(np.float32)
    path = tmp_path_factory.mktemp("head") / "head.gguf"
    write_head(path, shape, tensors, table, "Q8_0")
    return path


@pytest.fixture(scope="module")
def by_hand(head: Path, texts: list[Text]) -> np.ndarray:
    """Logits (targets, n_rows): each text in a context of its own, one state at a time."""
    found = []
    for text in texts:
        with HeadContext(head, 128, 1) as context:
            for position, state in enumerate(text.states(3)):
                wanted = position in text.target_rows
                context.decode(state[None].astype(np.float32), position, [0] if wanted else [])
                if wanted:
                    found.append(context.logits(0).copy())
    return np.stack(found)


@pytest.fixture(scope="module")
def made(head: Path, texts: list[Text], shortlist: np.ndarray) -> Predictions:
    return predict(head, texts, 3, shortlist, STARTS, 2, groups={3: "chat", 9: "code"})


def test_signals_are_those_of_each_text_decoded_alone(made: Predictions, by_hand: np.ndarray) -> None:
    p = softmax(by_hand)
    ranked = np.sort(p, axis=1)[:, ::-1]
    assert len(made) == len(p) == sum(len(rows_of(n)) for n in LENGTHS)
    near = {"abs": 2e-3}
    assert made.values["entropy"] == pytest.approx(-(p * np.log(p)).sum(axis=1), **near)
    assert made.values["other"] == pytest.approx(p[:, -1], **near)
    named = p[:, :-1].max(axis=1)
    assert made.values["top1"] == pytest.approx(named, **near)
    plain = p[:, :-1].argmax(axis=1) == p.argmax(axis=1)  # else "other" is the likeliest
    assert 0 < (~plain).sum() < len(p) / 2
    assert made.values["margin"][plain] == pytest.approx((named - ranked[:, 1])[plain], **near)
    mass = np.add.reduceat(p, [*STARTS, N_LISTED], axis=1)
    assert made.values["clusters"] == pytest.approx(-(mass * np.log(mass)).sum(axis=1), **near)


def test_agreement_is_with_the_likeliest_token_that_has_a_row(
    made: Predictions, by_hand: np.ndarray, full: np.ndarray, shortlist: np.ndarray
) -> None:
    best = full.argmax(axis=1)
    guessed = shortlist[by_hand[:, :-1].argmax(axis=1)]
    assert made.agree.tolist() == (guessed == best).tolist()
    assert made.in_shortlist.tolist() == np.isin(best, shortlist).tolist()
    assert 0 < made.in_shortlist.sum() < len(made)


def test_order_prompts_and_groups(made: Predictions, texts: list[Text]) -> None:
    expected = [text.prompt for text in texts for _ in text.target_rows]
    assert made.prompts.tolist() == expected
    assert made.group_names == ("", "chat", "code")
    assert [made.group_names[g] for g in made.groups] == [{7: "", 3: "chat", 9: "code"}[p] for p in expected]
    assert made.layer == 3


def test_stability_is_the_cosine_with_the_boundary_before(
    made: Predictions, head: Path, texts: list[Text], shortlist: np.ndarray
) -> None:
    a, b = (np.concatenate([t.states(x)[t.target_rows] for t in texts]).astype(np.float64) for x in LAYERS)
    expected = (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert made.values["stability"] == pytest.approx(expected, abs=1e-5)
    first = predict(head, texts, 2, shortlist, STARTS)
    assert np.isnan(first.values["stability"]).all()
    assert "stability" not in first.signals
    assert np.isnan(cosines(np.zeros((1, 4), np.float32), np.ones((1, 4), np.float32)))[0]


@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.0])
def test_acceptance_is_below_what_the_full_distributions_give(
    head: Path, texts: list[Text], shortlist: np.ndarray, by_hand: np.ndarray, full: np.ndarray, temperature: float
) -> None:
    found = predict(head, texts, 3, shortlist, STARTS, temperature=temperature).acceptance
    q = np.zeros_like(full, np.float64)
    q[:, shortlist] = softmax(by_hand[:, :-1], temperature)
    overlap = np.minimum(softmax(full, temperature), q).sum(axis=1)
    # batches sum in another order than single rows
    assert (found <= overlap + 1e-3).all()
    assert found.mean() > 0.3 * overlap.mean()
    peaked = softmax(full, temperature).max(axis=1) > 0.8
    assert peaked.any()
    assert found[peaked] == pytest.approx(overlap[peaked], abs=0.12)


def test_at_temperature_zero_acceptance_is_agreement(head: Path, texts: list[Text], shortlist: np.ndarray) -> None:
    found = predict(head, texts, 3, shortlist, STARTS, temperature=0.0)
    assert found.acceptance.tolist() == found.agree.astype(float).tolist()


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.1, 1.0), st.floats(0.1, 6.0), st.integers(1, 20))
def test_the_bound_is_a_bound(seed: int, temperature: float, sharpness: float, k: int) -> None:
    random = np.random.default_rng(seed)
    p_logits, q_logits = (sharpness * random.standard_normal((2, 60))).astype(np.float32)
    ids, logp = top_of(p_logits, k)
    q = softmax(q_logits, temperature)
    found = acceptance_bound(logp[None].astype(np.float16), q[ids][None].astype(np.float32), temperature)
    p = softmax(p_logits, temperature)
    overlap = np.minimum(p, q).sum()
    assert found.shape == (1,)
    assert -1e-9 <= found[0] <= overlap + 1e-6
    kept = np.minimum(p, q)[ids].sum()
    if k == 20 and temperature < 0.8:
        assert found[0] >= 0.5 * kept - 1e-6  # both may vanish: q is kept in float32


def test_the_bound_is_exact_where_nothing_is_missing() -> None:
    random = np.random.default_rng(0)
    logits = random.standard_normal(30).astype(np.float32)
    ids, logp = top_of(logits, 30)
    q = softmax(random.standard_normal(30))
    found = acceptance_bound(logp[None], q[ids][None].astype(np.float32), 0.7)
    assert found[0] == pytest.approx(np.minimum(softmax(logits, 0.7), q).sum(), abs=5e-3)


def test_one_row_at_a_time_says_the_same(
    made: Predictions, head: Path, texts: list[Text], shortlist: np.ndarray
) -> None:
    """An open head with room for one row of logits, as the engine has it; used again, it starts anew."""
    with HeadContext(head, 128, 1) as context:
        for _ in range(2):
            found = predict(context, texts, 3, shortlist, STARTS, 2)
            assert found.agree.tolist() == made.agree.tolist()
            for name, column in found.values.items():
                assert column == pytest.approx(made.values[name], abs=2e-3)


def test_rows_are_reported_as_they_are_computed(head: Path, texts: list[Text], shortlist: np.ndarray) -> None:
    done: list[int] = []
    predict(head, texts, 3, shortlist, STARTS, advance=done.append)
    assert done == list(LENGTHS)


def test_what_cannot_be_measured(head: Path, texts: list[Text], shortlist: np.ndarray) -> None:
    with pytest.raises(UsageError, match="no texts"):
        predict(head, [], 3, shortlist, STARTS)
    for n in (N_LISTED - 1, N_LISTED + 2):
        with pytest.raises(PackError, match="does not speak a shortlist"):
            predict(head, texts, 3, np.arange(n, dtype=np.int32), None)
    for temperature in (-0.1, 1.1, math.nan):
        with pytest.raises(UsageError, match="temperature"):
            predict(head, texts, 3, shortlist, STARTS, temperature=temperature)


def test_a_gate_becomes_a_signal(made: Predictions) -> None:
    gate = fit_gate(made.values, ~made.agree, made.prompts)
    gated = made.with_gate(gate)
    assert "gate" not in made.values
    said = made.guessed
    assert gated.uncertainty("gate")[said].tolist() == gate.probabilities(made.values)[said].tolist()
    assert "gate" in gated.signals


def test_what_is_not_asked_or_cannot_be_named_never_exits(made: Predictions) -> None:
    """As at run time: there is no guess where the head expects a token outside the shortlist."""
    expected = made.values["other"] <= made.values["top1"]
    assert made.guessed.tolist() == expected.tolist()
    assert not made.guessed.all()
    half = np.arange(len(made)) % 2 == 0
    asked = made.asked(half)
    for signal in ("entropy", "top1", "margin"):
        assert np.isnan(asked.uncertainty(signal)).tolist() == (~(made.guessed & half)).tolist()
    assert asked.take(half).guessed.tolist() == made.guessed[half].tolist()


# baselines


@pytest.fixture(scope="module")
def own() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A model's final norm and output rows, and a lens."""
    random = np.random.default_rng(5)
    norm = random.uniform(0.5, 2, N_EMBD).astype(np.float32)
    rows = (random.standard_normal((N_VOCAB, N_EMBD)) * 0.5).astype(np.float32)
    return norm, rows, random.standard_normal((N_EMBD, N_EMBD)).astype(np.float32) / 8


def states_of(texts: list[Text], layer: int) -> np.ndarray:
    return rms_norm(np.concatenate([t.states(layer)[t.target_rows] for t in texts]).astype(np.float32))


def test_the_logit_lens_by_definition(
    texts: list[Text], own: tuple[np.ndarray, np.ndarray, np.ndarray], full: np.ndarray
) -> None:
    norm, rows, _ = own
    found = logit_lens(texts, 3, norm, rows, previous_layer=2)
    p = softmax((states_of(texts, 3) * norm) @ rows.T)
    assert found.agree.tolist() == (p.argmax(axis=1) == full.argmax(axis=1)).tolist()
    assert found.in_shortlist.all()
    assert found.values["entropy"] == pytest.approx(-(p * np.log(p)).sum(axis=1), abs=1e-3)
    assert found.values["top1"] == pytest.approx(p.max(axis=1), abs=1e-4)
    assert not found.values["other"].any()
    assert np.isfinite(found.values["stability"]).all()
    overlap = np.minimum(softmax(full, 0.7), softmax((states_of(texts, 3) * norm) @ rows.T, 0.7)).sum(axis=1)
    assert (found.acceptance <= overlap + 1e-5).all()


def test_slerp_ends_at_the_plain_lens_and_at_the_tuned_one(
    texts: list[Text], own: tuple[np.ndarray, np.ndarray, np.ndarray], shortlist: np.ndarray, full: np.ndarray
) -> None:
    norm, rows, lens = own
    plain = logit_lens(texts, 3, norm, rows[shortlist], shortlist)
    start = slerp_lens(texts, 3, 0.0, lens, norm, rows[shortlist], shortlist)
    assert start.values["entropy"] == pytest.approx(plain.values["entropy"], abs=1e-4)
    assert start.agree.tolist() == plain.agree.tolist()
    end = slerp_lens(texts, 3, 1.0, lens, norm, rows[shortlist], shortlist)
    logits = states_of(texts, 3) @ lens.T @ rows[shortlist].T
    assert end.values["top1"] == pytest.approx(softmax(logits).max(axis=1), abs=1e-4)
    assert end.agree.tolist() == (shortlist[logits.argmax(axis=1)] == full.argmax(axis=1)).tolist()
    half = slerp_lens(texts, 3, 0.5, lens, norm, rows[shortlist], shortlist)
    assert np.abs(half.values["entropy"] - end.values["entropy"]).mean() > 1e-2


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 1000), st.floats(0, 1))
def test_slerp_turns_evenly(seed: int, weight: float) -> None:
    random = np.random.default_rng(seed)
    a, b = random.standard_normal((2, 3, 8)).astype(np.float32)
    found = slerp(a, b, weight)
    angle = np.arccos(np.clip(cosines(a, b), -1, 1))
    assert np.arccos(np.clip(cosines(a, found), -1, 1)) == pytest.approx(weight * angle, abs=2e-3)
    length = np.linalg.norm(a, axis=1) * (1 - weight) + np.linalg.norm(b, axis=1) * weight
    assert np.linalg.norm(found, axis=1) == pytest.approx(length, rel=1e-3)


def test_slerp_of_equal_and_opposite_directions_is_finite() -> None:
    a = np.float32([[1, 0], [2, 0], [0, 0], [1, 0]])
    b = np.float32([[1, 0], [-2, 0], [0, 1], [1e-20, 0]])
    assert np.isfinite(slerp(a, b, 0.5)).all()
    assert slerp(a, b, 0.5)[0].tolist() == [1, 0]


def test_exits_by_stability_and_exits_without_asking(made: Predictions) -> None:
    stable = cosine_stability(made)
    assert stable.agree.tolist() == made.agree.tolist()
    said = made.guessed
    assert stable.uncertainty[said].tolist() == (np.float32(1) - made.values["stability"][said]).tolist()
    fixed = fixed_exits(made)
    assert not fixed.uncertainty.any()
    assert fixed.prompts.tolist() == made.prompts.tolist()
    assert np.array_equal(by_signal("head", made, "margin").uncertainty, made.uncertainty("margin"), equal_nan=True)
