"""The verbs `edge-run energy …`. They import what they need when they run."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import UsageError
from .options import JsonOption, QuietOption

if TYPE_CHECKING:
    from .energy.fit import Fit, Point

_MAX_SHOWN = 20  # points; more are summed up

energy_app = typer.Typer(
    help="Fit the power model of a device without a power sensor.",
    epilog="""\b
Examples:
  edge-run energy calibrate --meter plug.csv --recording readings.jsonl --traffic 60:120:3.2
  edge-run energy calibrate --point 0:0:2.7 --point 1:0:5.9 --point 1:3.2:6.6

\b
`edge-run generate --energy` shows what an answer used.""",
    rich_markup_mode=None,
)


@energy_app.callback()
def _group() -> None:
    """Keep `calibrate` a verb of its own, although it is the only one."""


@dataclass(frozen=True, slots=True)
class EnergyRequest:
    """What to fit, and where to put it."""

    meter: Path | None
    recording: Path | None
    points: tuple[str, ...]
    traffic: tuple[str, ...]
    shift_s: float
    time: str | None
    power: str | None
    cores: int  # 0: this machine's
    out: Path | None
    force: bool
    json: bool
    quiet: bool


@energy_app.command(
    "calibrate",
    epilog="""\b
Examples:
  edge-run energy calibrate --meter plug.csv --recording readings.jsonl --traffic 60:120:3.2
  edge-run energy calibrate --meter log.csv --time "Date" --power "P (W)" --recording pi.jsonl --traffic 60:120:3.2 \\
      --cores 4 --out power.toml
  edge-run energy calibrate --point 0:0:2.7 --point 1:0:5.9 --point 1:3.2:6.6

\b
Power = static_w + active_w_per_core × busy cores + joule_per_gb × GB/s of weights read. To tell the three apart, the
machine must have been idle for a part of the time, busy without a model for another, and generating for a third.
GB/s: tokens per second at full depth × the size of the model's file in 10⁹ bytes.
--meter: CSV with a header; times in seconds or ISO 8601, power in watts. --recording: from `edge-run sensors --record`,
made at the same time. The table [power] goes to stdout, or to --out, and then into a profile of the device.""",
)
def calibrate_verb(
    meter: Annotated[Path | None, typer.Option(help="A power meter's CSV file.", metavar="FILE")] = None,
    recording: Annotated[
        Path | None, typer.Option(help="Readings recorded while the meter ran.", metavar="FILE")
    ] = None,
    point: Annotated[
        list[str] | None,
        typer.Option(
            "--point",
            help="Share of all cores that is busy, GB/s of weights read, and the power for that; repeatable.",
            metavar="LOAD:GB_PER_S:WATT",
        ),
    ] = None,
    traffic: Annotated[
        list[str] | None,
        typer.Option(
            "--traffic",
            help="Weights read in a part of the recording, in seconds from its first reading; repeatable.",
            metavar="FROM:TO:GB_PER_S",
        ),
    ] = None,
    shift: Annotated[
        float, typer.Option(help="The meter's first row came this much after the recording's first reading.")
    ] = 0.0,
    time: Annotated[
        str | None, typer.Option(help="Column with the time.", show_default="time_s", metavar="COLUMN")
    ] = None,
    power: Annotated[
        str | None, typer.Option(help="Column with the power.", show_default="power_w", metavar="COLUMN")
    ] = None,
    cores: Annotated[
        int, typer.Option(min=0, max=4096, help="Cores of the machine that was measured.", show_default="this one's")
    ] = 0,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the table [power] into this file.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite that file.")] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Fit the power model's coefficients to a power meter, or to typed readings."""
    calibrate_power(
        EnergyRequest(
            meter=meter,
            recording=recording,
            points=tuple(point or ()),
            traffic=tuple(traffic or ()),
            shift_s=shift,
            time=time,
            power=power,
            cores=cores,
            out=out,
            force=force,
            json=as_json,
            quiet=quiet,
        )
    )


def calibrate_power(request: EnergyRequest) -> None:
    """Print or write the fitted table; how well it fits goes to stderr. Raises UsageError."""
    from . import display
    from .energy.fit import fit

    say: Callable[[str], None] = (lambda _text: None) if request.quiet else display.tell
    points = _points(request, say)
    n_cores = request.cores or os.cpu_count() or 1
    found = fit(points, n_cores)
    table = power_table(found)
    if request.out is not None:
        _write(request.out, table, force=request.force)
    if request.json:
        display.write_json(fit_record(found, points, n_cores))
    elif request.out is None:
        print(table, end="")
    for line in report(found, points, n_cores):
        say(line)


def _points(request: EnergyRequest, say: Callable[[str], None]) -> list[Point]:
    from .energy.meter_log import read_meter
    from .energy.points import parse_point, parse_traffic, recorded_points
    from .sensors.recording import read_recording

    _check(request)
    points = [parse_point(text) for text in request.points]
    traffic = [parse_traffic(text) for text in request.traffic]
    if request.meter is None or request.recording is None:
        return points
    recorded = read_recording(request.recording, lambda text: say(f"warning: {text}"))
    log = read_meter(request.meter, request.time, request.power)
    if log.n_skipped:
        say(f"warning: rows of {request.meter} without a time or a power were left out: {log.n_skipped}")
    return points + recorded_points(log.samples, recorded.readings, traffic, request.shift_s)


def _check(request: EnergyRequest) -> None:
    """Raises UsageError for options that do not go together."""
    if (request.meter is None) != (request.recording is None):
        missing = "--recording" if request.recording is None else "--meter"
        raise UsageError(
            f"{missing} is missing: a meter's file says what was used, a recording what was done for it", "give both"
        )
    if request.meter is None and not request.points:
        raise UsageError("there is nothing to fit to", "give --meter and --recording, or a --point for each reading")
    for name, given in (
        ("traffic", request.traffic),
        ("shift", request.shift_s),
        ("time", request.time),
        ("power", request.power),
    ):
        if given and request.meter is None:
            raise UsageError(f"--{name} is about a --meter, and there is none", "drop it, or give --meter")
    if not -1e9 < request.shift_s < 1e9:
        raise UsageError(f"--shift {request.shift_s} is no number of seconds", "give one as in --shift 2.5")


def _write(path: Path, text: str, *, force: bool) -> None:
    try:
        with path.open("w" if force else "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UsageError(f"{path} is there already", "name another file, or overwrite it with --force") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}", "name a file in a folder of yours") from None


def power_table(found: Fit) -> str:
    """The table [power] of a profile, as TOML."""
    model = found.model
    fitted = "" if found.r2 is None else f", R² {found.r2:.3f}"
    return f"""[power]
static_w = {model.static_w:.5g}
active_w_per_core = {model.active_w_per_core:.5g}
joule_per_gb = {model.joule_per_gb:.5g}
source = "fitted to {len(found.residuals_w)} points of a power meter{fitted}"
label = "{model.label.value}"
"""


def fit_record(found: Fit, points: list[Point], n_cores: int) -> dict[str, Any]:
    """A fit for JSON."""
    model = found.model
    return {
        "power": {
            "static_w": model.static_w,
            "active_w_per_core": model.active_w_per_core,
            "joule_per_gb": model.joule_per_gb,
            "label": model.label.value,
        },
        "n_cores": n_cores,
        "n_points": len(points),
        "r2": found.r2,
        "rms_w": found.rms_w,
        "worst_w": found.worst_w,
        "at_zero": list(found.at_zero),
        "points": [
            {"load": p.load, "gb_per_s": p.gb_per_s, "power_w": p.power_w, "residual_w": residual}
            for p, residual in zip(points, found.residuals_w, strict=True)
        ],
    }


def report(found: Fit, points: list[Point], n_cores: int) -> list[str]:
    """How well it fits, in words."""
    lines = [
        f"load {p.load:.2f}, {p.gb_per_s:.2f} GB/s: {p.power_w:.2f} W, by the model {p.power_w - residual:.2f} W"
        for p, residual in zip(points, found.residuals_w, strict=True)
        if len(points) <= _MAX_SHOWN
    ]
    r2 = "the power does not vary" if found.r2 is None else f"R² {found.r2:.4f}"
    lines.append(
        f"{len(points)} points, {n_cores} cores: {r2}, residuals {found.rms_w:.2g} W rms, {found.worst_w:.2g} W at most"
    )
    lines += [f"warning: {name} would be below 0 by these points, and is held at 0" for name in found.at_zero]
    if len(points) == 3:
        lines.append("warning: three points leave nothing to judge the fit by: give more")
    return lines
