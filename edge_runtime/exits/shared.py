"""Calibration of the model's own output head, for checkpoints whose layers were trained to exit through it.

LayerSkip (Elhoushi et al. 2024, arXiv 2404.16710) trains such models. Nothing is learned here but gates and
thresholds, so that all prompts but those for tuning and testing certify.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import UnsupportedModelError
from .baselines import logit_lens
from .corpus import Text
from .evaluate import Predictions
from .head import final_norm, output_rows
from .stages import predictions_from_arrays, predictions_to_arrays

if TYPE_CHECKING:
    from .calibrate import _Calibration

# what comes between the output matrix and the logits in some models
_AFTER_OUTPUT = (".final_logit_softcapping", ".logit_scale")

# below this, exits are rare whatever the signal
_LEAST_AGREEMENT = 0.5


def check_model(path: Path) -> None:
    """Raise UnsupportedModelError if a model's head is more than a norm and a matrix."""
    from gguf import GGUFReader

    found = [key for key in GGUFReader(path).fields if key.endswith(_AFTER_OUTPUT)]
    if found:
        raise UnsupportedModelError(
            f"the output head of {path} cannot be calibrated: {found[0]} is not supported",
            "leave out --head shared: heads are trained then",
        )


def without_training(splits: dict[str, list[Text]]) -> dict[str, list[Text]]:
    """The same texts, those for training among those that certify."""
    return {**splits, "train": [], "certify": [*splits["train"], *splits["certify"]]}


def notes(found: Sequence[Predictions]) -> list[str]:
    """A warning, if by these predictions the model was not trained to exit through its own head."""
    best = max(float(p.agree.mean()) for p in found)
    if best >= _LEAST_AGREEMENT:
        return []
    return [
        f"the model's own head agrees with full depth on {best:.0%} of the tokens at most: this model was not trained "
        "to exit through it; leave out --head shared, and heads are trained"
    ]


class SharedLens:
    """What the model's own head says behind layers; its matrix (n_vocab, n_embd) is held as float32."""

    def __init__(self, run: _Calibration) -> None:
        """Raises ModelUnreadableError if the matrix or its norm cannot be read."""
        self._run = run
        self._norm = final_norm(run.path)
        self._rows = output_rows(run.path, np.arange(run.model.n_vocab, dtype=np.int32))

    def hear(self, layer: int, split: str) -> Predictions:
        """Predictions for a split over the whole vocabulary, text by text; see `logit_lens` on how exact they are."""
        run = self._run
        texts: Sequence[Text] = run.splits[split]

        def make() -> tuple[dict[str, Any], Any]:
            run.reporter.say(f"what the model's own head says behind layer {layer} ({split})")
            total, done = sum(text.end - text.start for text in texts), 0

            def advance(n_rows: int) -> None:
                nonlocal done
                done += n_rows
                run.reporter.progress(done, total)

            found = logit_lens(
                texts,
                layer,
                self._norm,
                self._rows,
                temperature=run.options.temperature,
                groups=run.groups,
                advance=advance,
            )
            return predictions_to_arrays(found)

        depends = {"split": split, "texts": len(texts), "temperature": run.options.temperature}
        return predictions_from_arrays(*run.stages.arrays(f"said-shared-{layer}-{split}", depends, make))
