"""Training of heads with PyTorch, which is an optional extra."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.errors import EdgeError, UsageError
from edge_runtime.exits.head import HeadContext, HeadShape, HeadWeights, write_head
from edge_runtime.exits.ridge import fit_ridge
from edge_runtime.exits.trainer import TrainedHead, TrainOptions, train_head
from edge_runtime.exits.trunk_block import fresh_block
from edge_runtime.reporter import Reporter

from .corpus_fakes import LAYER, Made, make_corpus

torch = pytest.importorskip("torch", reason="PyTorch is an optional extra (train)")

SHORTLIST = np.arange(0, 96, 2, dtype=np.int32)
OPTIONS = TrainOptions(epochs=3, batch_rows=128, learning_rate=3e-3, n_threads=1)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_corpus(tmp_path_factory.mktemp("corpus"), n_texts=100, noise=0.3)


def _start(made: Made, seed: int = 0) -> HeadWeights:
    ridge = fit_ridge(made.texts[:80], LAYER, made.final_norm, made.output[SHORTLIST], SHORTLIST)
    shape = HeadShape(32, 4, 2, 64, len(SHORTLIST) + 1)
    tensors = {**fresh_block(shape, seed), **{k: ridge.tensors[k] for k in ("output_norm.weight", "other")}}
    return HeadWeights(LAYER, shape, tensors, ridge.projection)


def _train(made: Made, checkpoint: Path, options: TrainOptions = OPTIONS) -> TrainedHead:
    return train_head(
        made.texts[:80],
        made.texts[80:],
        _start(made),
        SHORTLIST,
        made.output[SHORTLIST],
        made.final_norm,
        options,
        checkpoint,
        Reporter(),
    )


def _equal(a: HeadWeights, b: HeadWeights) -> bool:
    return np.array_equal(a.projection, b.projection) and all(
        np.array_equal(a.tensors[name], b.tensors[name]) for name in a.tensors
    )


@pytest.mark.parametrize("labels", ["soft", "hard"])
def test_training_lowers_the_loss(made: Made, tmp_path: Path, labels: str) -> None:
    trained = _train(made, tmp_path / "c.npz", dataclasses.replace(OPTIONS, labels=labels))  # type: ignore[arg-type]
    losses = [epoch["tune_loss"] for epoch in trained.history]
    assert len(losses) == 4
    assert min(losses[1:]) < losses[0] - 0.1
    assert trained.stopped == "all epochs are done"


def test_soft_loss_is_the_cross_entropy_of_the_coarsened_distribution(made: Made, tmp_path: Path) -> None:
    """Against a plain loop: kept listed tokens, kept others together, and the rest of the shortlist as one."""
    from edge_runtime.exits import trainer

    start = _start(made)
    training = trainer._Training(
        made.texts[:80], made.texts[80:], start, SHORTLIST, made.output[SHORTLIST], made.final_norm, OPTIONS, tmp_path
    )
    text = made.texts[3]
    targets = training._targets([text])
    logits = torch.randn(len(text.target_rows), len(SHORTLIST) + 1, generator=torch.Generator().manual_seed(1))
    found = training._losses(logits, targets).numpy()
    for row, expected_ids, logp in zip(
        range(len(found)), text.targets("top_ids"), text.targets("top_logp"), strict=True
    ):
        q = np.exp(logits[row].double().numpy())
        q /= q.sum()
        p = np.exp(logp.astype(np.float64))
        loss, kept = 0.0, q[-1]
        for token, share in zip(expected_ids, p, strict=True):
            if token % 2 == 0:
                loss -= share * np.log(q[token // 2])
                kept += q[token // 2]
            else:
                loss -= share * np.log(q[-1])
        loss -= max(0.0, 1 - p.sum()) * np.log(max(1 - kept, 1e-6))
        assert found[row] == pytest.approx(loss, rel=2e-3)


def test_llama_cpp_computes_what_was_trained(made: Made, tmp_path: Path) -> None:
    """The block in PyTorch and the GGUF in llama.cpp agree but for half precision and the KV cache's."""
    from edge_runtime.exits import trainer

    trained = _train(made, tmp_path / "c.npz").weights
    rows = made.output[SHORTLIST]
    training = trainer._Training(
        made.texts[:80], made.texts[80:], trained, SHORTLIST, rows, made.final_norm, OPTIONS, tmp_path
    )
    text = made.texts[90]
    with torch.no_grad():
        states = torch.tensor(text.states(LAYER).astype(np.float32))[None]
        expected = training._logits(training._block(states, training=False)[0]).numpy()
    write_head(tmp_path / "head.gguf", trained.shape, trained.tensors, trained.table(rows), "F16")
    head = HeadContext(tmp_path / "head.gguf", n_ctx=64, n_threads=1)
    try:
        for position in range(text.end - text.start):
            head.decode(text.states(LAYER)[position : position + 1].astype(np.float32), position, (0,))
            assert np.abs(head.logits(0) - expected[position]).max() < 0.02 * np.abs(expected[position]).max()
    finally:
        head.close()


def test_interrupted_training_goes_on_as_if_it_had_not_been(made: Made, tmp_path: Path) -> None:
    whole = _train(made, tmp_path / "whole.npz")
    seen = 0

    def interrupt(done: int, _all: int) -> None:
        nonlocal seen
        seen += 1
        if seen == 14:  # in the second epoch
            raise KeyboardInterrupt

    arguments = (made.texts[:80], made.texts[80:], _start(made), SHORTLIST, made.output[SHORTLIST], made.final_norm)
    with pytest.raises(KeyboardInterrupt):
        train_head(*arguments, OPTIONS, tmp_path / "part.npz", Reporter(progress=interrupt))
    resumed = train_head(*arguments, OPTIONS, tmp_path / "part.npz", Reporter())
    assert _equal(resumed.weights, whole.weights)
    assert resumed.history == whole.history


def test_checkpoint_of_another_training_or_a_damaged_one_is_not_used(made: Made, tmp_path: Path) -> None:
    fresh = _train(made, tmp_path / "a.npz", dataclasses.replace(OPTIONS, seed=5))
    _train(made, tmp_path / "b.npz")
    other = _train(made, tmp_path / "b.npz", dataclasses.replace(OPTIONS, seed=5))
    assert _equal(other.weights, fresh.weights)
    (tmp_path / "b.npz").write_bytes((tmp_path / "b.npz").read_bytes()[:-5000])
    assert _equal(_train(made, tmp_path / "b.npz", dataclasses.replace(OPTIONS, seed=5)).weights, fresh.weights)


def test_loss_that_is_no_number_keeps_the_last_good_state(made: Made, tmp_path: Path) -> None:
    trained = _train(made, tmp_path / "c.npz", dataclasses.replace(OPTIONS, learning_rate=1e30))
    assert "best state before it is kept" in trained.stopped
    assert all(np.isfinite(value).all() for value in trained.weights.tensors.values())
    assert np.isfinite(trained.history[-1]["tune_loss"])


def test_time_ends_training(made: Made, tmp_path: Path) -> None:
    trained = _train(made, tmp_path / "c.npz", dataclasses.replace(OPTIONS, seconds=1e-6, epochs=50))
    assert trained.stopped == "its time is up"
    assert len(trained.history) == 2


def test_full_disk_is_an_error(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("edge_runtime.exits.trainer.np.savez", full)
    with pytest.raises(EdgeError, match="No space left on device"):
        _train(made, tmp_path / "c.npz")


def test_unknown_device_and_missing_texts_are_errors(made: Made, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="device 'nonsense'"):
        _train(made, tmp_path / "c.npz", dataclasses.replace(OPTIONS, device="nonsense"))
    with pytest.raises(UsageError, match="no text"):
        train_head([], made.texts, _start(made), SHORTLIST, made.output, made.final_norm, OPTIONS, tmp_path, Reporter())
