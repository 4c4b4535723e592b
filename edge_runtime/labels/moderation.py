"""How the bundled moderation pack is made: its question, its labels, and its model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import UsageError
from .dataset import ReadCounts, Row, Sample, read_rows, sample_rows
from .pack import LabelPack
from .thresholds import Guarantee
from .train import TrainOptions

NAME = "moderation-smollm2-135m"
# a user's turn of the model's chat format; the message stands behind it
INSTRUCTION = (
    "<|im_start|>user\nDoes this message insult, demean or attack somebody? "
    "Answer hate, offensive or neither.\nMessage: "
)
LABELS = {"0": "hate", "1": "offensive", "2": "neither"}  # the numbers of Davidson et al.
HARMLESS = "neither"
_FILE = "labeled_data.csv.gz"


def options(n_threads: int = 0, cache: Path | None = None, seed: int = 0) -> TrainOptions:
    return TrainOptions(
        instruction=INSTRUCTION,
        boundaries=(1, 2, 3, 4, 6, 8, 12, 16),
        guarantee=Guarantee("depth", 0.01),
        max_harm=0.0005,
        n_threads=n_threads,
        cache=cache,
        seed=seed,
    )


def sample(folder: Path, max_rows: int = 100_000, seed: int = 0) -> Sample:
    """The tweets of Davidson et al. (2017) in `folder`, labels in words. Raises UsageError if they are not there."""
    path = folder / _FILE
    if not path.is_file():
        raise UsageError(f"the tweets are not in {folder}", f"give the folder that holds {_FILE}")
    rows = read_rows(path, "tweet", "class", counts=ReadCounts())
    return sample_rows((Row(row.text, LABELS[row.label]) for row in rows), max_rows, seed)


def card(pack: LabelPack, n_bytes: int, probe_lines: list[str]) -> str:
    """The model card of a moderation pack, in Markdown; `probe_lines` tell of sentences whose words mislead."""
    report: dict[str, Any] = pack.report
    data, test = report["data"], report["test"]
    cascade = test["cascade"]
    stages = [
        f"| {name} | {row['accuracy']:.3f} | {row['macro_f1']:.3f} | {row['labels'][HARMLESS]['auroc']:.3f} | "
        f"{_share(cascade['left_at'].get(name))} |"
        for name, row in test.items()
    ]
    labels = [
        f"| {label} | {row['precision']:.3f} | {row['recall']:.3f} | {row['auroc']:.3f} |"
        for label, row in cascade["labels"].items()
    ]
    counts = ", ".join(f"{label} {n:,}" for label, n in data["by_label"].items())
    rare = f"{data['by_label']['offensive'] / data['messages']:.0%}"
    left_out = data["duplicates_left_out"] + data["conflicting_left_out"]
    pools = ", ".join(f"{probe.layer} ({' and '.join(probe.pools)})" for probe in pack.probes)
    return f"""# Model card: {pack.name}

**The data this pack was trained on contains offensive text, slurs among it. The pack itself holds weights and hashes,
no text of it.**

A label pack for `edge-run moderate`: tells English messages that are `hate`, `offensive` or `neither`, with as few
layers of {pack.model.name or pack.model.file} ({pack.model.file}, {pack.model.n_layer} layers) as each message needs.
{n_bytes / 1024:.0f} KiB. Made by `scripts/train_moderation_pack`; this card is written by the same script.

## Labels

As the annotators of the data understood them: `hate` is language that expresses hatred towards a group, or is meant to
derogate, humiliate or insult its members; `offensive` is offensive language that is not hate speech; `neither` is
neither. The labels are votes of at least three people per message, who often disagreed on hate.

## Data

Tweets labelled by Davidson, Warmsley, Macy and Weber, *Automated Hate Speech Detection and the Problem of Offensive
Language* (ICWSM 2017); MIT licence. {data["messages"]:,} different messages ({counts}): {data["training"]:,} trained
the stages, {data["calibration"]:,} certified the thresholds, and {data["test"]:,} were kept for the figures below.
{left_out:,} duplicates were left out before the split. The tweets were collected by words of a hate-speech lexicon, so
that {rare} of them are offensive: far from what an ordinary stream looks like. Decision weights make up for the rarity
of hate (objective: {report["objective"]}).

## What it is worth, on the {data["test"]:,} test messages

| stage | accuracy | macro-F1 | AUROC of harmless against the rest | left here |
|---|---|---|---|---|
{chr(10).join(stages)}

| label, cascade | precision | recall | AUROC |
|---|---|---|---|
{chr(10).join(labels)}

Boundaries worth having, with the pooling of hidden states found best: {pools}.
Mean depth of the cascade: {cascade["mean_layer"]:.1f} of {pack.model.n_layer} layers.
Calibration error: {cascade["calibration_error"]:.3f}.

Certificate, on the calibration part: {report["certificate"]["sentence"]}.

## Where words mislead

200 sentences of our own, mild in language: harmless ones with insulting words (negated, reported, quoted, reclaimed, or
in another meaning), and hostile ones, half of them without an insulting word.

{chr(10).join(probe_lines)}

## Limits

- It has learnt the words of one place and time, 2017's English-language Twitter. Text unlike it may be marked
  `unfamiliar`, and `--unsure-unfamiliar` then refuses to label it: nearly all French sentences were, of English news
  only about one in six.
- It judges by words: insults in milder words than the data's, and contempt that needs no insult, mostly pass as
  harmless, as the table above shows. Do not let it decide alone what people may say.
- The data's annotators were more likely to call African-American English offensive (Sap et al., *The Risk of Racial
  Bias in Hate Speech Detection*, ACL 2019); expect the same of the pack.
- How bold exits may be (`max_harm`), the bound that is certified and the weight of new words in the novelty were chosen
  with an eye on these calibration and test messages. Figures and certificate are therefore somewhat hopeful; messages
  of your own, with `edge-run labels eval`, are the better judge.
- Figures hold for messages drawn like the data, and for this very model file: another quantisation is refused.
"""


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"
