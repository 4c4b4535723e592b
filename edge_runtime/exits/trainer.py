"""Self-distillation of boundary heads with PyTorch: the trunk stays frozen, its own distributions are the targets.

A head starts as the ridge lens (its block adds nothing) and is trained on whole texts, so that its attention sees what
it will see at run time. Soft labels are the full model's kept probabilities and their tail; hard labels its likeliest
token. Hinton, Vinyals, Dean 2015, "Distilling the Knowledge in a Neural Network", arXiv 1503.02531; on-policy text as
in Agarwal et al. 2023, arXiv 2306.13649.

The state after each pass over the texts is kept in a checkpoint; training goes on from there. PyTorch is the optional
extra `train`.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..cache import replacing
from ..errors import EdgeError, UsageError
from ..reporter import Reporter
from ..types import Floats, TokenIds
from .corpus import Text
from .head import HeadWeights
from .ridge import RIDGE_PENALTY, rms_norm

_BETAS = (0.9, 0.95)
_WARM_UP = 0.03  # of the whole training
_FINAL_RATE = 0.02  # of the first learning rate
_MAX_NORM = 1.0
_TARGETS_AT_ONCE = 1024
_VERSION = 1


@dataclass(frozen=True, slots=True)
class TrainOptions:
    """How a head is trained; it ends with `epochs` or `seconds`, whichever comes first."""

    labels: Literal["soft", "hard"] = "soft"
    epochs: int = 4
    seconds: float | None = None
    batch_rows: int = 2048
    learning_rate: float = 5e-4
    weight_decay: float = 0.05
    dropout: float = 0.05
    seed: int = 0
    device: str = "cpu"
    n_threads: int = 0  # 0: as PyTorch likes

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_rows < 1 or not self.learning_rate > 0:
            raise UsageError("training needs at least one epoch, one row per batch and a learning rate above 0")


@dataclass(slots=True)
class TrainedHead:
    """A head, and how it came about: per epoch its training loss, tune loss (nats) and tune agreement."""

    weights: HeadWeights
    history: list[dict[str, float]] = field(default_factory=list)
    stopped: str = ""  # why training ended


def torch_problem() -> str | None:
    """Why PyTorch cannot be used, None if it can."""
    try:
        import torch  # noqa: F401
    except ImportError as error:
        return f"PyTorch is not installed ({error})"
    return None


def train_head(
    train_texts: Sequence[Text],
    tune_texts: Sequence[Text],
    start: HeadWeights,
    shortlist: TokenIds,
    output_rows: Floats,
    final_norm: Floats,
    options: TrainOptions,
    checkpoint: Path,
    reporter: Reporter,
) -> TrainedHead:
    """Train the head `start`; the best epoch by tune loss is kept.

    Its projection is first fitted anew, by ridge regression from what its block gives onto the last layer's state.

    `output_rows` (n, n_embd) are the model's, of the sorted or unsorted `shortlist` (n,). The loss of a target is the
    cross-entropy, in nats, between the full model's distribution (or its likeliest token) and the head's, over the
    shortlist, "any other token", and what the kept probabilities leave over.
    A loss that is not a number ends the training; the last good state is kept, and `stopped` says so.
    Raises UsageError without PyTorch or texts, EdgeError if the checkpoint cannot be written.
    """
    problem = torch_problem()
    if problem:
        raise UsageError(problem, "pip install 'edge-runtime[train]', or use --trainer ridge")
    if not train_texts or not tune_texts:
        raise UsageError("there is no text to train a head on", "give more prompts")
    training = _Training(train_texts, tune_texts, start, shortlist, output_rows, final_norm, options, checkpoint)
    return training.run(reporter)


class _Training:
    """One head's training: parameters, optimiser, and the texts cut into batches."""

    def __init__(
        self,
        train_texts: Sequence[Text],
        tune_texts: Sequence[Text],
        start: HeadWeights,
        shortlist: TokenIds,
        output_rows: Floats,
        final_norm: Floats,
        options: TrainOptions,
        checkpoint: Path,
    ) -> None:
        import torch

        self._torch, self._options, self._shape, self._layer = torch, options, start.shape, start.layer
        self._final_norm = final_norm
        if options.n_threads:
            torch.set_num_threads(options.n_threads)
        try:
            self._device = torch.device(options.device)
            torch.zeros(1, device=self._device)
        except (RuntimeError, AssertionError) as error:
            raise UsageError(
                f"PyTorch cannot use the device '{options.device}': {error}", "use --device cpu"
            ) from error
        self._train = _batches(train_texts, options.batch_rows)
        self._tune = _batches(tune_texts, options.batch_rows)
        n_vocab = 1 + max(
            int(shortlist.max()), *(int(t.targets("top_ids").max(initial=0)) for t in [*train_texts, *tune_texts])
        )
        self._row_of = np.full(n_vocab, len(shortlist), np.int64)
        self._row_of[shortlist] = np.arange(len(shortlist))
        self._output_rows = torch.tensor(output_rows, device=self._device)
        torch.manual_seed(options.seed)
        self._parameters = self._first_parameters(start)
        decayed = [p for p in self._parameters.values() if p.ndim == 2]
        others = [p for p in self._parameters.values() if p.ndim == 1]
        self._optimiser = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": options.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=options.learning_rate,
            betas=_BETAS,
        )
        self._checkpoint = checkpoint
        self._identity = self._identify(train_texts, tune_texts, shortlist)
        self._epoch, self._seconds = 0, 0.0
        self._history: list[dict[str, float]] = []
        self._best: tuple[float, dict[str, Floats]] = (math.inf, self._numbers())

    def _first_parameters(self, start: HeadWeights) -> dict[str, Any]:
        numbers = {**start.tensors, "projection": start.projection}
        return {k: self._torch.tensor(v, device=self._device, requires_grad=True) for k, v in numbers.items()}

    def _fit_projection(self) -> None:
        """Ridge regression of the projection on what the block gives before training."""
        torch, width = self._torch, self._shape.n_embd
        inner, cross = torch.zeros(width, width).double(), torch.zeros(width, width).double()
        final_norm = torch.tensor(self._final_norm)
        with torch.no_grad():
            for batch in self._train:
                normed = self._normed(batch, training=False).cpu()
                final = np.concatenate([text.targets("final") for text in batch]).astype(np.float32)
                inner += (normed.T @ normed).double()
                cross += (normed.T @ (torch.tensor(rms_norm(final)) * final_norm)).double()
            inner += RIDGE_PENALTY * inner.trace() / width * torch.eye(width)
            self._parameters["projection"].copy_(torch.linalg.solve(inner, cross).T)

    # ── the head ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _block(self, states: Any, training: bool) -> Any:
        """States (texts, rows, n_embd) → normed outputs of the same shape; as llama.cpp computes a llama block."""
        torch, shape, p = self._torch, self._shape, self._parameters
        n_texts, n_rows, width = states.shape
        size = width // shape.n_head
        drop = torch.nn.functional.dropout
        rate = self._options.dropout

        def heads(x: Any, count: int) -> Any:
            return x.view(n_texts, n_rows, count, size).transpose(1, 2)

        x = self._norm(states, "blk.0.attn_norm.weight")
        cos, sin = self._rotations(n_rows, size)
        query = _rotate(heads(x @ p["blk.0.attn_q.weight"].T, shape.n_head), cos, sin)
        key = _rotate(heads(x @ p["blk.0.attn_k.weight"].T, shape.n_head_kv), cos, sin)
        value = heads(x @ p["blk.0.attn_v.weight"].T, shape.n_head_kv)
        repeats = shape.n_head // shape.n_head_kv
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
        mixed = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        mixed = mixed.transpose(1, 2).reshape(n_texts, n_rows, width)
        states = states + drop(mixed @ p["blk.0.attn_output.weight"].T, rate, training)
        x = self._norm(states, "blk.0.ffn_norm.weight")
        inner = torch.nn.functional.silu(x @ p["blk.0.ffn_gate.weight"].T) * (x @ p["blk.0.ffn_up.weight"].T)
        states = states + drop(inner @ p["blk.0.ffn_down.weight"].T, rate, training)
        return self._norm(states, "output_norm.weight")

    def _normed(self, batch: Sequence[Text], training: bool) -> Any:
        """What the output table is applied to, (m, n_embd), for the targets of a batch."""
        n_rows = max(text.end - text.start for text in batch)
        states = np.zeros((len(batch), n_rows, self._shape.n_embd), np.float32)
        for i, text in enumerate(batch):
            states[i, : text.end - text.start] = text.states(self._layer)
        wanted = np.concatenate([i * n_rows + text.target_rows for i, text in enumerate(batch)])
        normed = self._block(self._torch.tensor(states, device=self._device), training)
        return normed.reshape(-1, self._shape.n_embd)[self._torch.tensor(wanted, device=self._device)]

    def _norm(self, states: Any, weight: str) -> Any:
        mean_square = (states * states).mean(-1, keepdim=True)
        return states * mean_square.add(self._shape.norm_epsilon).rsqrt() * self._parameters[weight]

    def _rotations(self, n_rows: int, size: int) -> tuple[Any, Any]:
        torch = self._torch
        rates = self._shape.rope_base ** (-torch.arange(0, size, 2, device=self._device) / size)
        angles = torch.arange(n_rows, device=self._device)[:, None] * rates
        return angles.cos(), angles.sin()

    def _logits(self, normed: Any) -> Any:
        """(m, n_embd) → (m, n_rows)."""
        p = self._parameters
        listed = (normed @ p["projection"].T) @ self._output_rows.T
        return self._torch.cat([listed, (normed @ p["other"])[:, None]], dim=1)

    # ── loss ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _losses(self, logits: Any, targets: _Targets) -> Any:
        """Cross-entropy (m,) in nats."""
        torch = self._torch
        logq = torch.log_softmax(logits, dim=1)
        if self._options.labels == "hard":
            return -logq.gather(1, targets.rows[:, :1])[:, 0]
        named = logq.gather(1, targets.rows)
        other = logq[:, -1]
        loss = -(targets.listed * named).sum(1) - targets.unlisted * other
        # what neither the kept tokens nor "other" hold is the head's tail
        kept = (named.exp() * targets.is_listed).sum(1) + other.exp()
        return loss - targets.tail * torch.log((1 - kept).clamp_min(1e-6))

    def _targets(self, batch: Sequence[Text]) -> _Targets:
        torch = self._torch
        ids = np.concatenate([text.targets("top_ids") for text in batch])
        p = np.exp(np.concatenate([text.targets("top_logp") for text in batch]).astype(np.float32))
        rows = self._row_of[ids]
        is_listed = rows < len(self._output_rows)
        tail = np.clip(1 - p.sum(axis=1), 0, None)

        def tensor(values: NDArray[Any]) -> Any:
            return torch.tensor(values, device=self._device)

        return _Targets(
            tensor(rows),
            tensor((p * is_listed).astype(np.float32)),
            tensor(is_listed.astype(np.float32)),
            tensor((p * ~is_listed).sum(axis=1).astype(np.float32)),
            tensor(tail.astype(np.float32)),
        )

    def _batch(self, batch: Sequence[Text], training: bool) -> tuple[Any, Any]:
        """Summed loss and number of right guesses of a batch; with `training`, gradients are added up, too."""
        torch = self._torch
        targets = self._targets(batch)
        with torch.set_grad_enabled(training):
            normed = self._normed(batch, training)
            # the logits of a whole batch would be a gigabyte: they come and go in parts
            leaf = normed.detach().requires_grad_(training)
            total, right = 0.0, 0
            for first in range(0, len(normed), _TARGETS_AT_ONCE):
                part = slice(first, first + _TARGETS_AT_ONCE)
                logits = self._logits(leaf[part])
                some = targets.part(part)
                loss = self._losses(logits, some).sum()
                total += float(loss.detach())
                right += int((logits.detach().argmax(1) == some.rows[:, 0]).sum())
                if training:
                    (loss / len(normed)).backward()
            if training:
                normed.backward(leaf.grad)
        return total, right

    # ── training ────────────────────────────────────────────────────────────────────────────────────────────────────

    def run(self, reporter: Reporter) -> TrainedHead:
        self._load()
        if not self._history:
            self._fit_projection()
            self._history.append({"epoch": 0.0, **self._measure()})
            self._best = (self._history[0]["tune_loss"], self._numbers())
        stopped = ""
        while not stopped:
            stopped = self._why_stop() or self._run_epoch(reporter)
        best = dict(self._best[1])
        projection = best.pop("projection")
        return TrainedHead(HeadWeights(self._layer, self._shape, best, projection), self._history, stopped)

    def _why_stop(self) -> str:
        if self._epoch >= self._options.epochs:
            return "all epochs are done"
        if self._options.seconds is not None and self._seconds >= self._options.seconds:
            return "its time is up"
        return ""

    def _run_epoch(self, reporter: Reporter) -> str:
        """One pass over the texts; why training must end, "" if it goes on."""
        options, begin = self._options, time.monotonic()
        order = np.random.default_rng([options.seed, self._epoch]).permutation(len(self._train))
        self._torch.manual_seed(options.seed * 1000 + self._epoch)
        total, n, spent = 0.0, 0, self._seconds
        for i, which in enumerate(order):
            batch = self._train[which]
            share = self._share_done(i / len(order), spent)
            for group in self._optimiser.param_groups:
                group["lr"] = options.learning_rate * _rate(share)
            self._optimiser.zero_grad(set_to_none=True)
            loss, _ = self._batch(batch, training=True)
            if not math.isfinite(loss):
                return f"the loss became {loss} in epoch {self._epoch + 1}; the best state before it is kept"
            self._torch.nn.utils.clip_grad_norm_(list(self._parameters.values()), _MAX_NORM)
            self._optimiser.step()
            total += loss
            n += sum(len(text.target_rows) for text in batch)
            spent = self._seconds + time.monotonic() - begin
            reporter.progress(round(1000 * share), 1000)
            if options.seconds is not None and spent >= options.seconds:
                break
        self._epoch += 1
        self._seconds = spent
        found = self._measure()
        if not math.isfinite(found["tune_loss"]):
            return f"the loss became {found['tune_loss']} after epoch {self._epoch}; the best state before it is kept"
        self._history.append({"epoch": float(self._epoch), "train_loss": total / n, **found})
        if found["tune_loss"] < self._best[0]:
            self._best = (found["tune_loss"], self._numbers())
        self._save()
        return ""

    def _share_done(self, of_epoch: float, spent: float) -> float:
        share = (self._epoch + of_epoch) / self._options.epochs
        return min(1.0, share if self._options.seconds is None else max(share, spent / self._options.seconds))

    def _measure(self) -> dict[str, float]:
        total, right, n = 0.0, 0, 0
        for batch in self._tune:
            loss, hits = self._batch(batch, training=False)
            total, right, n = total + loss, right + hits, n + sum(len(text.target_rows) for text in batch)
        return {"tune_loss": total / n, "tune_agreement": right / n}

    # ── checkpoint ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _identify(self, train: Sequence[Text], tune: Sequence[Text], shortlist: TokenIds) -> str:
        """A name for all that decides the outcome, but for machine and time."""
        digest = hashlib.sha256(np.sort(shortlist).tobytes())  # a head does not know their order
        for texts in (train, tune):
            for text in texts:
                digest.update(f"{text.prompt} {text.end - text.start};".encode())
        options = {k: v for k, v in asdict(self._options).items() if k not in ("device", "n_threads", "seconds")}
        described = json.dumps([_VERSION, self._layer, asdict(self._shape), options], sort_keys=True)
        digest.update(described.encode())
        return digest.hexdigest()

    def _numbers(self) -> dict[str, Floats]:
        return {name: value.detach().cpu().numpy().copy() for name, value in self._parameters.items()}

    def _save(self) -> None:
        arrays: dict[str, Any] = {f"now {name}": value for name, value in self._numbers().items()}
        arrays |= {f"best {name}": value for name, value in self._best[1].items()}
        for name, value in self._parameters.items():
            arrays |= {f"{key} {name}": moment.cpu().numpy() for key, moment in self._optimiser.state[value].items()}
        state = {
            "identity": self._identity,
            "epoch": self._epoch,
            "seconds": self._seconds,
            "history": self._history,
            "best": self._best[0],
        }
        try:
            with replacing(self._checkpoint) as out:
                np.savez(out, state=np.frombuffer(json.dumps(state).encode(), np.uint8), **arrays)
        except OSError as error:
            raise EdgeError(
                f"the training state cannot be kept in {self._checkpoint.parent}: {error.strerror}",
                "make room; the state before it is kept",
            ) from error

    def _load(self) -> None:
        """Go on from the checkpoint, if there is a sound one of this very training."""
        torch = self._torch
        try:
            with self._checkpoint.open("rb") as file, np.load(file, allow_pickle=False) as kept:
                state = json.loads(kept["state"].tobytes())
                if state["identity"] != self._identity:
                    return
                now = {name: kept[f"now {name}"] for name in self._parameters}
                best = {name: kept[f"best {name}"] for name in self._parameters}
                moments = {
                    name: {key: kept[f"{key} {name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
                    for name in self._parameters
                }
        except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
            return
        with torch.no_grad():
            for name, value in self._parameters.items():
                value.copy_(torch.tensor(now[name]))
                self._optimiser.state[value] = {
                    key: torch.tensor(moment, device="cpu" if key == "step" else self._device)
                    for key, moment in moments[name].items()
                }
        self._epoch, self._seconds, self._history = state["epoch"], state["seconds"], state["history"]
        self._best = (state["best"], best)


@dataclass(frozen=True, slots=True)
class _Targets:
    """Tensors of m targets with k kept tokens each; `rows` are the table's, its last row for tokens not listed."""

    rows: Any  # (m, k)
    listed: Any  # (m, k) probabilities of listed tokens, else 0
    is_listed: Any  # (m, k) 1 or 0
    unlisted: Any  # (m,) probability of kept tokens that are not listed
    tail: Any  # (m,) probability of all tokens not kept

    def part(self, part: slice) -> _Targets:
        return _Targets(self.rows[part], self.listed[part], self.is_listed[part], self.unlisted[part], self.tail[part])


def _batches(texts: Sequence[Text], batch_rows: int) -> list[list[Text]]:
    """Texts of like length together, at most `batch_rows` rows with what they are padded by, one text at least."""
    batches: list[list[Text]] = []
    for text in sorted((t for t in texts if t.last > t.first), key=lambda t: t.end - t.start):
        # in this order the newest is the longest
        if not batches or (len(batches[-1]) + 1) * (text.end - text.start) > batch_rows:
            batches.append([])
        batches[-1].append(text)
    return batches


def _rotate(x: Any, cos: Any, sin: Any) -> Any:
    """Rotary positions, neighbouring values as pairs, as llama models in GGUF have them."""
    import torch

    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def _rate(share: float) -> float:
    """Of the learning rate, `share` of the training being done: a short rise, then a cosine down."""
    if share < _WARM_UP:
        return (share + 1e-3) / _WARM_UP
    return _FINAL_RATE + (1 - _FINAL_RATE) * (1 + math.cos(math.pi * share)) / 2
