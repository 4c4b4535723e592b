"""The verb `edge-run serve`: options that stand for keys of the configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from .errors import UsageError
from .options import VerboseOption

SERVE_EPILOG = """\b
Examples:
  edge-run serve
  edge-run serve --model ./model.gguf --port 9090 --max-conversations 8
  edge-run serve --host 0.0.0.0 --api-key-file ~/.config/edge-runtime/key
  edge-run serve --mode exit --pack smollm2-135m --max-disagreement 0.02
  edge-run serve --device pi5 --target quiet --power-cap 6
  curl http://127.0.0.1:8080/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{"model": "smollm2-135m", "messages": [{"role": "user", "content": "Hello"}]}'

\b
Endpoints: /v1/chat/completions, /v1/completions, /v1/moderations, /v1/models, /health, /ready, /metrics. What is not
given comes from the configuration, which `edge-run config` shows. Ctrl-C and SIGTERM let answers come to their end, a
second one does not; SIGHUP reads the configuration again. Anything but loopback needs an API key. `edge-run service
install` runs it in the background."""

_MISSING = "the server needs packages that are not installed"
_HINT = "pip install 'edge-runtime[serve]'"


def serve(
    model: Annotated[str | None, typer.Option("--model", "-m", help="Name or path of a GGUF model.")] = None,
    mode: Annotated[
        Literal["auto", "full", "verified", "margin", "exit"] | None,
        typer.Option(
            help="auto and verified: drafts from the text where they pay. full: none. The text is the same. margin: "
            "drafts that full depth finds nearly as likely are taken. exit: tokens leave early."
        ),
    ] = None,
    pack: Annotated[str | None, typer.Option(help="Mode exit: name or path of an exit pack.", metavar="PACK")] = None,
    max_disagreement: Annotated[
        float | None,
        typer.Option(
            help="Mode exit: share of exits that may differ from full depth, certified; 0: the usual.", metavar="SHARE"
        ),
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Port; 0: any that is free.")] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="File that holds the key which clients must send.", metavar="FILE")
    ] = None,
    max_conversations: Annotated[
        int | None, typer.Option(min=1, max=256, help="Answered side by side; their KV caches are kept.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Length of an answer at most.")] = None,
    queue_length: Annotated[int | None, typer.Option(min=0, max=65536, help="Requests that may wait.")] = None,
    deadline: Annotated[
        float | None, typer.Option(help="Seconds for one request; 0: no limit.", metavar="SECONDS")
    ] = None,
    ctx: Annotated[int | None, typer.Option(min=0, help="Tokens of each conversation.")] = None,
    threads: Annotated[int | None, typer.Option(min=0, max=512, help="CPU threads; 0: all physical cores.")] = None,
    device: Annotated[str | None, typer.Option(help="Device profile: a name, or a .toml file.")] = None,
    target: Annotated[
        Literal["none", "battery", "quiet", "balanced", "fast"] | None,
        typer.Option(help="Hold the profile's targets of this name."),
    ] = None,
    power_cap: Annotated[
        float | None, typer.Option(help="Hold the board's power at or below this; 0: none.", metavar="WATT")
    ] = None,
    temp_ceiling: Annotated[
        float | None, typer.Option(help="Hold the temperature at or below this; 0: none.", metavar="CELSIUS")
    ] = None,
    log_level: Annotated[Literal["debug", "info", "warning", "error"] | None, typer.Option()] = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="Read this file instead of the two.", metavar="FILE")
    ] = None,
    verbose: VerboseOption = False,
) -> None:
    """Serve a model to clients of the OpenAI interface."""
    from .config_load import load_config, standard_sources

    if config is not None and not config.exists():
        raise UsageError(f"there is no file {config}", "check its path")
    given = {
        "model.name": model,
        "model.mode": mode,
        "model.pack": pack,
        "model.max_disagreement": max_disagreement,
        "model.ctx": ctx,
        "model.threads": threads,
        "server.host": host,
        "server.port": port,
        "server.api_key_file": None if api_key_file is None else api_key_file.absolute(),
        "limits.max_conversations": max_conversations,
        "limits.max_tokens": max_tokens,
        "limits.queue_length": queue_length,
        "limits.deadline_s": deadline,
        "device.profile": device,
        "device.target": target,
        "device.power_cap_w": power_cap,
        "device.temp_ceiling_c": temp_ceiling,
        "service.log_level": log_level,
    }
    sources = standard_sources(given, None if config is None else (config,))
    loaded = load_config(sources)
    _check_packages()
    from .options import start_library
    from .serving.server import serve as run

    start_library(verbose=verbose)
    run(loaded, sources)


def _check_packages() -> None:
    """Raises UsageError if the packages of the extra are not there."""
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UsageError(f"{_MISSING}: {error.name}", _HINT) from None
