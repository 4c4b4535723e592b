"""The parts of the label benchmark that need no data set: rivals, certificates over splits, the stock side's timing."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.bench.label_quality import balanced_rows, certification, difference, qualities, rivals_of
from edge_runtime.bench.stock import StockProcess
from edge_runtime.labels import LabelPack, find_pack
from edge_runtime.labels.thresholds import Evidence, Guarantee, Setting, apply, certify
from edge_runtime.labels.train import Trained
from edge_runtime.types import Floats

from .conftest import TinyMaker

HARMLESS = 1


def evidence(n: int, seed: int) -> Evidence:
    """Three stages of five that know more and more of three labels, and a full depth that knows most."""
    random = np.random.default_rng(seed)
    truth = random.choice(3, n, p=[0.1, 0.5, 0.4])

    def stage(strength: float) -> Floats:
        powers = np.exp(strength * np.eye(3)[truth] + random.standard_normal((n, 3)))
        return (powers / powers.sum(axis=1, keepdims=True)).astype(np.float32)

    stages = [stage(strength) for strength in (1, 2, 3, 3.5, 4)]
    nobody = np.zeros(n, np.bool_)
    return Evidence(stages, stage(4.5), stage(2), [nobody] * len(stages), None, truth)


@pytest.fixture(scope="module")
def trained() -> Trained:
    """The bundled pack's labels and layers, with made-up evidence and thresholds."""
    pack = LabelPack.load(find_pack("moderation"))
    n_stages = len(pack.layers)
    never = np.full((n_stages, 3), np.inf, np.float32)
    never[-1] = 0
    settings = [Setting(np.minimum(never, t).astype(np.float32), 0.0, t) for t in (2.0, 0.99, 0.95, 0.9, 0.8, 0.6)]
    pack = dataclasses.replace(pack, weights=np.ones(3, np.float32), thresholds=settings[2].thresholds)
    return Trained(pack, evidence(1500, 1), evidence(1500, 2), settings, Path("unused"))


def test_more_knowledge_is_more_quality(trained: Trained) -> None:
    rivals = rivals_of(trained, HARMLESS)
    found = {q.name: q for q in qualities(rivals, trained.test.truth, HARMLESS, seed=0)}
    assert len(found) == 5 + 2 + 1
    assert found["stage 0, n-grams"].auroc < found["stage 4, layer 8"].auroc
    assert found["full-depth probe"].macro_f1 < found["cascade"].macro_f1
    assert found["cascade"].accuracy > 0.8


def test_a_balanced_part_has_as_many_of_both() -> None:
    truth = np.array([HARMLESS] * 30 + [0] * 80 + [2] * 200)
    rows = balanced_rows(truth, HARMLESS, seed=3)
    assert len(rows) == len(set(rows)) == 60
    assert (truth[rows] == HARMLESS).sum() == 30


def test_an_interval_of_a_rival_with_itself_is_nothing(trained: Trained) -> None:
    rival = rivals_of(trained, HARMLESS)[0]
    assert difference(rival, rival, trained.test.truth, HARMLESS, 0) == {"auroc": (0.0, 0.0), "macro_f1": (0.0, 0.0)}


@pytest.fixture(scope="module")
def tight(trained: Trained) -> Guarantee:
    """A bound that the fourth setting breaks by a hair, over all the messages."""
    wrong = [
        apply(trained.settings[3], rows, trained.pack.weights)[0].labels != rows.truth for rows in held_out(trained)
    ]
    return Guarantee("error", 0.99 * float(np.concatenate(wrong).mean()))


def held_out(trained: Trained) -> tuple[Evidence, Evidence]:
    return trained.calibration, trained.test


def test_certified_bounds_hold_as_often_as_they_say(trained: Trained, tight: Guarantee) -> None:
    for guarantee in (tight, Guarantee("depth", 0.03), Guarantee("depth", 0.01)):
        result = certification(trained, guarantee, trained.settings, 200, seed=0)
        # 5%, and three standard errors of 200 splits
        assert result.broken_in_pool / result.n_splits <= 0.05 + 3 * (0.05 * 0.95 / 200) ** 0.5
    assert certification(trained, tight, trained.settings, 50, seed=1).certified > 0


def test_the_empirical_risk_alone_would_break_its_bound(
    trained: Trained, tight: Guarantee, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the test before this one can see: without the certificate's margin, splits break the bound."""

    def naive(errors: int, n: int, bound: float) -> float:
        return 0.0 if errors <= n * bound else 1.0

    monkeypatch.setattr("edge_runtime.labels.thresholds.binomial_p_value", naive)
    result = certification(trained, tight, trained.settings, 200, seed=0)
    assert result.broken_in_pool > 0.15 * result.n_splits


def test_the_boldest_certified_setting_is_chosen(trained: Trained) -> None:
    weights = trained.pack.weights
    chosen, certificate = certify(trained.settings, trained.test, weights, Guarantee("error", 0.5))
    assert (chosen, certificate.holds) == (len(trained.settings) - 1, True)
    chosen, certificate = certify(trained.settings, trained.test, weights, Guarantee("error", 0.0001))
    assert (chosen, certificate.holds) == (0, False)


@pytest.mark.stock
@pytest.mark.parametrize("kind", ["cached", "plain", "batched"])
def test_stock_takes_messages_behind_a_prefix(stock: StockProcess, tiny_path: TinyMaker, kind: str) -> None:
    path: Path = tiny_path("llama")
    stock.open(path, n_ctx=256, n_batch=128, n_seq_max=5, n_threads=1)
    messages = [[7, 8, 9], [10] * 40, [11]]
    assert stock.call("time_messages", prefix=[1, 2, 3], messages=messages, kind=kind)["seconds"] > 0
