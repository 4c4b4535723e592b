"""Options about what is measured and held while a model answers, as Typer sees them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer


@dataclass(frozen=True)
class SensingArguments:
    """What is read and held while a model answers: the options of `generate` and `chat`, one field each."""

    energy: Annotated[
        bool, typer.Option("--energy", help="Say what energy an answer used, where sensors know the power.")
    ] = False
    idle_power: Annotated[
        float | None,
        typer.Option(
            "--idle-power",
            help="With --energy: power of the idle machine in watts.",
            show_default="measured before",
            metavar="WATT",
        ),
    ] = None
    target: Annotated[
        str | None,
        typer.Option("--target", help="Hold the profile's targets of this name: battery, quiet, balanced or fast."),
    ] = None
    power_cap: Annotated[
        float | None, typer.Option("--power-cap", help="Hold the board's power at or below this.", metavar="WATT")
    ] = None
    temp_ceiling: Annotated[
        float | None, typer.Option("--temp-ceiling", help="Hold the temperature at or below this.", metavar="CELSIUS")
    ] = None
    latency: Annotated[
        float | None, typer.Option("--latency", help="Take at most so long for a token.", metavar="MS")
    ] = None
    explain: Annotated[bool, typer.Option("--explain", help="Say what is changed to hold the targets, and why.")] = (
        False
    )
    control_log: Annotated[
        Path | None, typer.Option("--control-log", help="Append each change to this file, as JSON.", metavar="FILE")
    ] = None
    replay: Annotated[
        Path | None,
        typer.Option(
            "--replay",
            help="With --energy or a target: believe this recording, made by `sensors --record`, instead of the "
            "machine's sensors. It begins when the program does, goes at its own pace, and is not repeated: after its "
            "end nothing is known, as if the sensors had died.",
            metavar="FILE",
        ),
    ] = None
