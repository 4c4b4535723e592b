"""How sure an answer of `edge-run generate` is: found before it is given or after, and told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from . import display
from .confidence_options import ConfidencePlan
from .confident import Confident
from .encoder import DEFAULT_ENCODER
from .energy.request import Meter
from .generate import Runtime
from .semantic import Confidence


class ConfidenceRun:
    """The confidence in one answer. Close it, or use it in a `with`."""

    def __init__(
        self, plan: ConfidencePlan, runtime: Runtime, question: str, meter: Meter | None, say: Callable[[str], None]
    ) -> None:
        """Raises UnsupportedModelError if the model cannot compare answers as planned."""
        self._plan, self._question = plan, question
        self._confident = Confident(
            runtime,
            plan.settings,
            plan.same_by,
            DEFAULT_ENCODER if plan.encoder is None else plan.encoder.encode,
            meter=meter,
            note=lambda text: say(f"warning: {text}"),
        )
        if plan.why:
            say(plan.why)
        self.found: Confidence | None = None
        self._abstained = False
        self._agrees: bool | None = None  # None: there is no answer, or it is not known

    def allows(self, prompt: Sequence[int]) -> bool:
        """Whether the answer may be given; where it can be withheld, samples are drawn first. Raises as Confident."""
        self._confident.check(prompt, self._question)
        above = self._plan.abstain_above
        if above is not None:
            self.found = self._confident.of(prompt, self._question)
            self._abstained = self.found.empty or not self.found.sure(1 - above)
        return not self._abstained

    def finish(self, prompt: Sequence[int], answer: Sequence[str]) -> bool:
        """Draw samples, unless they are there, and compare them with the answer; False if Ctrl-C ended it.

        `answer` has one text per token; as many count as a sample has at most.
        """
        begins = "".join(answer[: self._plan.settings.sampling.max_tokens])
        try:
            if self.found is None:
                self.found = self._confident.of(prompt, self._question)
            self._agrees = self._confident.agrees(self.found, self._question, begins)
            return True
        except KeyboardInterrupt:
            return False

    def tell(self) -> None:
        """What is known, on stderr: with --quiet, too, since it was asked for."""
        if self.found is None:
            return
        above = self._plan.abstain_above
        if self._abstained and above is not None:
            lines = display.unsure_lines(self.found, above)
        else:
            lines = display.confidence_lines(self.found, agrees=self._agrees)
        if self._plan.show_clusters:
            lines += display.cluster_lines(self.found)
        for line in lines:
            display.tell(line)

    def record(self) -> dict[str, Any] | None:
        """What is known, for JSON."""
        if self.found is None:
            return None
        return display.confidence_record(
            self.found,
            self._plan.same_by,
            above=self._plan.abstain_above,
            abstained=self._abstained,
            agrees=self._agrees,
        )

    def __enter__(self) -> ConfidenceRun:
        return self

    def __exit__(self, *_: object) -> None:
        self._confident.close()
