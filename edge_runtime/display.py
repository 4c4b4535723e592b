"""What a person or a program sees of an answer: painted tokens, footers, JSON lines."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import sys
from collections.abc import Mapping
from typing import Any, TextIO

from .generate import Chunk
from .semantic import Confidence
from .summary import Finish, Summary
from .types import Mode

_RESET = "\x1b[0m"
_REFUSED = "\x1b[30;48;5;217m"
_RELAXED = "\x1b[30;48;5;215m"
# black on light backgrounds, which also show spaces: green for the earliest boundary, then towards yellow
_EXIT_COLOURS = tuple(f"\x1b[30;48;5;{n}m" for n in (120, 123, 159, 183, 223, 229))
_WELL_COVERED = 0.95  # share of an answer's time; below it, its energy comes with the share
_ROUNDING = 1e-9  # a difference of two energies that is smaller than this share of them is none
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def tell(text: str) -> None:
    """A line for the person, not for a program."""
    print(text, file=sys.stderr, flush=True)


def wants_colour(stream: TextIO, environment: Mapping[str, str] = os.environ) -> bool:
    """Colour on a terminal, unless NO_COLOR says no or FORCE_COLOR says yes."""
    if environment.get("NO_COLOR"):
        return False
    return bool(environment.get("FORCE_COLOR")) or (stream.isatty() and environment.get("TERM") != "dumb")


def harmless(text: str) -> str:
    """`text` without the control characters that could command a terminal."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


class ExitPainter:
    """Marks each token with the depth it came from, by colour or, without colour, by a sign behind it."""

    def __init__(self, mode: Mode, boundaries: tuple[int, ...], n_layer: int, *, colour: bool, unicode: bool) -> None:
        self._mode, self._verified = mode, mode.verifies
        # without boundaries, drafts come from before the first layer
        boundaries = boundaries or ((0,) if mode.verifies else ())
        self._boundaries, self._n_layer, self._colour = boundaries, n_layer, colour
        signs = ("⌄", "✓", "✗", "≈") if unicode else ("^", "+", "!", "~")
        self._left, self._accepted, self._corrected, self._relaxed = signs

    def legend(self) -> str:
        """One line that explains the marks."""
        sign = self._accepted if self._verified else self._left
        what = "drafted {} and accepted" if self._verified else "left {}"
        entries = []
        for i, layer in enumerate(self._boundaries):
            words = what.format(f"after layer {layer}" if layer else "by the text so far")
            entries.append(self._entry(_colour_of(i), f"{sign}{layer or ''}", words))
        if self._verified:
            entries.append(self._entry(_REFUSED, self._corrected, "draft refused, corrected"))
        if self._mode is Mode.MARGIN:
            entries.append(self._entry(_RELAXED, self._relaxed, "draft accepted, full depth's second choice"))
        return "; ".join([*entries, f"no mark: full depth, {self._n_layer} layers"])

    def _entry(self, colour: str, sign: str, words: str) -> str:
        return f"{colour}{words}{_RESET}" if self._colour else f"{sign} {words}"

    def paint(self, chunk: Chunk) -> str:
        """The chunk's text with its mark; line ends stay outside of it."""
        body = chunk.text.rstrip("\n")
        step, tail = chunk.step, chunk.text[len(body) :]
        if not chunk.text or (step.boundary is None and not step.corrected):
            return chunk.text
        if self._colour:
            earlier = sum(layer < (step.boundary or 0) for layer in self._boundaries)
            start = _REFUSED if step.corrected else _RELAXED if step.relaxed else _colour_of(earlier)
            return f"{start}{body or ' '}{_RESET}{tail}"
        if step.corrected:
            return f"{body}{self._corrected}{tail}"
        if step.relaxed:
            return f"{body}{self._relaxed}{tail}"
        return f"{body}{self._accepted if self._verified else self._left}{step.boundary or ''}{tail}"


def _colour_of(index: int) -> str:
    return _EXIT_COLOURS[min(index, len(_EXIT_COLOURS) - 1)]


def speaks_unicode(stream: TextIO) -> bool:
    """Whether a stream can show the signs of the painter."""
    try:
        "⌄✓✗≈".encode(stream.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def json_line(value: Any) -> str:
    """One line of valid JSON, with its end; what is not a finite number becomes null."""
    return json.dumps(_finite(value), allow_nan=False) + "\n"


def write_json(value: Any) -> None:
    """Print one line of JSON. One write, so that Ctrl-C finds the line whole or not there."""
    sys.stdout.write(json_line(value))
    sys.stdout.flush()


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return value


def chunk_record(chunk: Chunk) -> dict[str, Any]:
    """A chunk for JSON."""
    step = chunk.step
    return {
        "token": step.token,
        "text": chunk.text,
        "position": step.position,
        "depth": step.depth,
        "boundary": step.boundary,
        "signals": [{"layer": layer, **dataclasses.asdict(signals)} for layer, signals in step.signals],
        "drafted": step.drafted,
        "accepted": step.accepted,
        "relaxed": step.relaxed,
        "corrected": step.corrected,
        "audits": [dataclasses.asdict(audit) for audit in step.audits],
    }


def footer(summary: Summary, *, seeded: bool) -> list[str]:
    """The summary in words, one line each for the speed, the depth, and an end that is not the answer's own."""
    speed = [f"{summary.generated_tokens} tokens"]
    if summary.time_to_first_token_ms is not None:
        speed.append(f"first after {summary.time_to_first_token_ms:.0f} ms")
    if summary.prefill_tokens_per_s is not None:
        new = summary.prompt_tokens - summary.reused_tokens
        speed.append(f"prefill {summary.prefill_tokens_per_s:.1f} tokens/s of {new}")
    if summary.reused_tokens:
        speed.append(f"{summary.reused_tokens} reused")
    if summary.decode_tokens_per_s is not None:
        speed.append(f"decode {summary.decode_tokens_per_s:.1f} tokens/s")
    if seeded:
        speed.append(f"seed {summary.seed}")
    left = [f"left: {summary.left}"] if summary.left else []
    uncertain = summary.prompt_uncertainty
    probed = [] if uncertain is None else [f"probe: answers to this differ with a probability of {uncertain:.2f}"]
    return [", ".join(speed), *_depth_line(summary), *probed, *left, *_energy_line(summary), *_end_line(summary)]


def _depth_line(summary: Summary) -> list[str]:
    if summary.mean_depth is None:
        return []
    mode = Mode(summary.played or summary.mode)
    name = f"auto, {mode.value}" if summary.mode == Mode.AUTO.value else mode.value
    depth = f"mode {name}: mean depth {summary.mean_depth:.1f} of {summary.n_layer} layers"
    if mode is Mode.FULL:
        return [depth]
    if mode.verifies:
        share = "" if summary.acceptance is None else f" ({summary.acceptance:.0%})"
        drafts = f"{summary.accepted} of {summary.drafted} drafts accepted{share}"
        if mode is Mode.VERIFIED:
            return [f"{depth}, every token confirmed there, {drafts}"]
        changed = "" if summary.changed is None else f" ({summary.changed:.1%})"
        relaxed = f"{summary.relaxed} of {summary.generated_tokens} tokens{changed}"
        return [f"{depth}, {drafts}, {relaxed} are full depth's second choice"]
    if summary.disagreement is None:
        return [f"{depth}, {summary.exits} left early, none of them compared with full depth"]
    audits = f"{summary.disagreed} of {summary.audited} audited ({summary.disagreement:.0%})"
    return [f"{depth}, {summary.exits} left early, full depth disagreed with {audits}"]


def _energy_line(summary: Summary) -> list[str]:
    if summary.energy_j is None:
        return []
    parts = []
    if summary.energy_per_token_j is not None:
        gross, net = summary.energy_per_token_j, summary.net_energy_per_token_j
        if net is not None and abs(net) < _ROUNDING * gross:
            net = 0.0
        above = "" if net is None else f", {_short(net, 2)} above idle"
        parts.append(f"{_short(gross, 2)} J per token{above}")
    if summary.prefill_energy_j is not None:
        parts.append(f"prefill {_short(summary.prefill_energy_j, 3)} J")
    if summary.energy_covered is not None and summary.energy_covered < _WELL_COVERED:
        parts.append(f"the power was known for {summary.energy_covered:.0%} of the time")
    return [f"energy {_short(summary.energy_j, 3)} J {summary.energy_source} ({'; '.join(parts)})"]


def _short(value: float, digits: int) -> str:
    """`digits` significant digits, more before the decimal point; no exponent for what is large."""
    return f"{value:.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"


def confidence_lines(found: Confidence, *, agrees: bool | None) -> list[str]:
    """A confidence in words; `agrees`: whether the answer says what most samples do."""
    alone = len(found.clusters) == len(found.samples)
    otherwise = ", the answer says something else" if agrees is False and not alone else ""
    said = f"{_agreement(found)}{otherwise}"
    semantic = f"semantic entropy {found.entropy:.2f} nats"
    return [f"confidence {found.score:.2f}: {said} ({semantic}, {_cost(found)})", *_cut_line(found)]


def unsure_lines(found: Confidence, above: float) -> list[str]:
    """Why there is no answer, in words."""
    entropy = f"normalised semantic entropy {found.normalised_entropy:.3f}"
    if found.normalised_entropy > above:
        entropy += f" is above {above:g}"
    return [f"unsure: {_agreement(found)}; {entropy} ({found.entropy:.2f} nats, {_cost(found)})", *_cut_line(found)]


def cluster_lines(found: Confidence) -> list[str]:
    """What the samples say, the commonest first: how many, and the likeliest wording."""
    of = len(found.samples)
    return [f"  {len(c.members):>2} of {of}  {harmless(c.answer) or '(empty)'}" for c in found.clusters]


def _agreement(found: Confidence) -> str:
    largest, of = len(found.clusters[0].members), len(found.samples)
    if found.empty:
        return f"{largest} of {of} samples are empty"
    if largest == of:
        return f"all {of} samples say the same"
    return f"no two of {of} samples say the same" if largest == 1 else f"{largest} of {of} samples say the same"


def _cost(found: Confidence) -> str:
    cost = found.cost
    parts = [f"{cost.generated_tokens} tokens", f"{cost.ms:.0f} ms"]
    if cost.joules is not None:
        parts.append(f"{_short(cost.joules, 2)} J {cost.energy_source}")
    if cost.energy_covered is not None and cost.energy_covered < _WELL_COVERED:
        parts.append(f"the power was known for {cost.energy_covered:.0%} of the time")
    return ", ".join(parts)


def _cut_line(found: Confidence) -> list[str]:
    cut = [sample for sample in found.samples if not sample.ended]
    if 2 * len(cut) <= len(found.samples):
        return []
    n_tokens = max(len(sample.tokens) for sample in cut)
    words = f"{len(cut)} of {len(found.samples)} samples were cut after {n_tokens} tokens"
    return [f"note: {words}: this is about how answers begin"]


def confidence_record(
    found: Confidence, same_by: str, *, above: float | None = None, abstained: bool = False, agrees: bool | None = None
) -> dict[str, Any]:
    """A confidence for JSON; where there is no answer to be given, its `answer` is None."""
    return {
        "score": found.score,
        "entropy": found.entropy,
        "normalised_entropy": found.normalised_entropy,
        "likelihood_entropy": found.likelihood_entropy,
        "consistency": found.consistency,
        "answer": None if abstained else found.answer,
        "agrees": agrees,
        "abstain_above": above,
        "abstained": abstained,
        "grouping": same_by,
        "stopped": found.stopped.value,
        "planned": found.planned,
        "clusters": [dataclasses.asdict(cluster) for cluster in found.clusters],
        "samples": [
            {
                "text": sample.text,
                "tokens": len(sample.tokens),
                "ended": sample.ended,
                "mean_log_likelihood": sample.mean_log_likelihood,
                "mean_entropy": sample.mean_entropy,
            }
            for sample in found.samples
        ],
        "cost": dataclasses.asdict(found.cost),
    }


def _end_line(summary: Summary) -> list[str]:
    words = {
        Finish.MAX_TOKENS: f"the answer was cut after {summary.generated_tokens} tokens: give a larger --max-tokens",
        Finish.CONTEXT_FULL: "the answer was cut because the context is full: give a larger --ctx",
        Finish.INTERRUPTED: "the answer was interrupted",
    }
    return [words[Finish(summary.finish)]] if Finish(summary.finish) in words else []
