"""The verb `edge-run config`: what a server would be told, and by whom."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import JsonOption

if TYPE_CHECKING:
    from .config_load import LoadedConfig

CONFIG_EPILOG = """\b
Examples:
  edge-run config
  edge-run config --json | jq .limits
  edge-run config --check /etc/edge-runtime/config.toml
  EDGE_RUNTIME_PORT=9090 edge-run config
  edge-run config > config.toml

\b
The effective configuration of `edge-run serve`, as TOML, each value with where it comes from. The weakest source first:
defaults, the device's profile, /etc/edge-runtime/config.toml, ~/.config/edge-runtime/config.toml, $EDGE_RUNTIME_…,
the command line of `serve`. The API key is never shown, only the file it is in."""


def show_config(
    config: Annotated[
        Path | None, typer.Option("--config", help="Read this file instead of the two.", metavar="FILE")
    ] = None,
    check: Annotated[
        Path | None, typer.Option("--check", help="Only say whether this file is right.", metavar="FILE")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show the configuration of the server, and where each value comes from."""
    from . import display
    from .config_load import load_config, standard_sources
    from .errors import UsageError

    if check is not None and config is not None:
        raise UsageError("--check looks at one file, and --config names another", "drop one of them")
    if check is not None:
        check_file(check, as_json=as_json)
        return
    if config is not None:
        _must_exist(config)
    loaded = load_config(standard_sources(files=None if config is None else (config,)))
    if as_json:
        display.write_json(config_record(loaded))
    else:
        print("\n".join(config_lines(loaded)))
    for warning in loaded.warnings:
        display.tell(f"warning: {warning}")


def check_file(path: Path, *, as_json: bool) -> None:
    """Say that `path` by itself is a right configuration. Raises UsageError if it is not."""
    from . import display
    from .config_load import load_config, standard_sources, without_ours

    _must_exist(path)
    sources = standard_sources(files=(path,))
    loaded = load_config(replace(sources, environment=without_ours(sources.environment)))
    if as_json:
        display.write_json({"file": str(path), "ok": True, "warnings": list(loaded.warnings)})
    else:
        print(f"{path}: ok")
    for warning in loaded.warnings:
        display.tell(f"warning: {warning}")


def _must_exist(path: Path) -> None:
    from .errors import UsageError

    if not path.exists():
        raise UsageError(f"there is no file {path}", "check its path")


def config_lines(loaded: LoadedConfig) -> Iterator[str]:
    """TOML that would give the same configuration."""
    from .config import KEYS, TABLES, plain, values_of

    values = values_of(loaded.config)
    for number, table in enumerate(TABLES):
        yield f"[{table}]" if number == 0 else f"\n[{table}]"
        for key in KEYS:
            if key.table == table:
                value = toml_value(plain(key, values[key.dotted]))
                yield f"{key.name} = {value}  # {loaded.origins[key.dotted]}"


def config_record(loaded: LoadedConfig) -> dict[str, Any]:
    """The configuration for JSON: {table: {key: {"value": …, "from": …}}}, what is not set as null."""
    from .config import KEYS, TABLES, values_of

    values = values_of(loaded.config)
    record: dict[str, Any] = {table: {} for table in TABLES}
    for key in KEYS:
        value = values[key.dotted]
        value = str(value) if isinstance(value, Path) else value
        record[key.table][key.name] = {"value": value, "from": loaded.origins[key.dotted]}
    return {**record, "files": [str(path) for path in loaded.files], "warnings": list(loaded.warnings)}


def toml_value(value: str | int | float | list[str]) -> str:
    """A value as TOML writes it; texts hold no control characters."""
    if isinstance(value, list):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
