"""The verb `edge-run sensors`. It imports what it needs when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import DeviceOption, JsonOption

SENSORS_EPILOG = """\b
Examples:
  edge-run sensors
  edge-run sensors --once
  edge-run sensors --json --interval 0.5 --count 20 | jq .power_w
  edge-run sensors --record day.jsonl --interval 5
  edge-run sensors --replay day.jsonl

\b
On a terminal, a table that is renewed until Ctrl-C; elsewhere, a line per reading. - is: not known.
Power is measured by a sensor, calibrated (fitted to a power meter) or estimated by a model, and says which.
With --json: one object per reading; null is not known, and throttled_now is a list of reasons, empty if there are none.
A recording has the same objects, one a line, after a line that says what machine it is from. `generate`, `chat` and
`doctor` take one instead of the sensors, too: --replay."""


def sensors(
    interval: Annotated[float, typer.Option(min=0.1, max=3600, help="Seconds from reading to reading.")] = 1.0,
    count: Annotated[
        int | None, typer.Option(min=1, help="Readings to show.", show_default="until Ctrl-C", metavar="N")
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Show one reading and leave.")] = False,
    record: Annotated[
        Path | None, typer.Option("--record", help="Also write readings into this file.", metavar="FILE")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file of --record.")] = False,
    replay: Annotated[
        Path | None, typer.Option("--replay", help="Show a recording, at its own pace.", metavar="FILE")
    ] = None,
    root: Annotated[
        Path | None, typer.Option("--root", help="A recorded tree of files instead of /.", metavar="FOLDER")
    ] = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show temperature, power, clock, load, throttling and battery."""
    from .sensors_view import SensorsRequest, show_sensors

    show_sensors(
        SensorsRequest(
            interval_s=interval,
            count=count,
            once=once,
            json=as_json,
            record=record,
            force=force,
            replay=replay,
            root=root,
            device=device,
        )
    )
