"""What a server is told: the frozen tree of its configuration, and what each key may hold.

A key has one name everywhere: `limits.queue_length` is `queue_length` in the table [limits] of a file and
$EDGE_RUNTIME_QUEUE_LENGTH in the environment.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .models import DEMO_MODEL
from .profile_schema import TARGET_NAMES

ENV_PREFIX = "EDGE_RUNTIME_"
NO_TARGET = "none"  # nothing is held, whatever the profile says

# ── the tree ────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """What answers."""

    name: str = DEMO_MODEL  # name or path of a GGUF model
    mode: str = "auto"  # or one of types.Mode
    pack: str | None = None  # name or path of an exit pack, for mode exit
    max_disagreement: float | None = None  # mode exit: certified by the pack; None: what the target allows
    audit_rate: float = 0.1  # of exits, at least
    ctx: int = 0  # tokens; 0: 2048 at most
    threads: int = 0  # 0: one per physical core
    kv_type: str = "f16"
    kernels: str = "edge"


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """Who may ask, and where."""

    host: str = "127.0.0.1"
    port: int = 8080
    api_key_file: Path | None = None  # the key itself never stands in a configuration
    cors_origins: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LimitsConfig:
    """How much may be asked."""

    max_conversations: int = 4  # whose KV cache is kept
    max_body_bytes: int = 2**20
    max_tokens: int = 1024  # of one answer
    queue_length: int = 16  # requests that may wait
    deadline_s: float | None = 300.0  # for one request; None: none
    stall_s: float | None = 60.0  # that a client may take nothing of its answer; None: for ever


@dataclass(frozen=True, slots=True)
class DeviceConfig:
    """What the board is and what is held on it."""

    profile: str | None = None  # name or path; None: the one that fits. A loaded configuration names it
    target: str = "balanced"  # of the profile, or NO_TARGET
    power_cap_w: float | None = None
    temp_ceiling_c: float | None = None


@dataclass(frozen=True, slots=True)
class ServiceConfig:
    """How it runs in the background."""

    state_dir: Path = Path(".")  # learnt state; a loaded configuration has an absolute path
    log_level: str = "info"
    memory_max_mib: int = 0  # of the whole service; 0: estimated from the model when it is installed


@dataclass(frozen=True, slots=True)
class Config:
    """All a server needs to be told."""

    model: ModelConfig = ModelConfig()
    server: ServerConfig = ServerConfig()
    limits: LimitsConfig = LimitsConfig()
    device: DeviceConfig = DeviceConfig()
    service: ServiceConfig = ServiceConfig()


# ── what each key may hold ──────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Place:
    """What a relative path or `~` of a source is relative to."""

    folder: Path
    home: Path | None = None

    def path(self, text: str) -> Path:
        """Raises ValueError for `~` where there is no home."""
        if text == "~" or text.startswith("~/"):
            if self.home is None:
                raise ValueError(f"{text!r} needs $HOME, which is not set")
            return self.home / text[2:]
        return self.folder / text


@dataclass(frozen=True, slots=True)
class Kind:
    """A sort of value: what is allowed in words, whether a TOML value is, and how it is held and read from a text."""

    allowed: str
    fits: Callable[[Any], bool]
    held: Callable[[Any, Place], Any] = lambda value, _place: value
    read: Callable[[str], Any] = str  # of the environment; raises ValueError


def _whole(low: int, high: int) -> Kind:
    def fits(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high

    return Kind(f"a whole number from {low} to {high}", fits, read=int)


def _number_or_none(low: float, high: float) -> Kind:
    def fits(value: Any) -> bool:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and (value == 0 or low <= value <= high)  # nan is neither

    return Kind(
        f"a number from {low:g} to {high:g}, or 0 for none", fits, lambda value, _place: float(value) or None, float
    )


def _number(low: float, high: float) -> Kind:
    def fits(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high

    return Kind(f"a number from {low:g} to {high:g}", fits, lambda value, _place: float(value), float)


def _choice(*names: str) -> Kind:
    return Kind(", ".join(names[:-1]) + f" or {names[-1]}", lambda value: isinstance(value, str) and value in names)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip()) and value.isprintable()


def _resolved(value: str, place: Place) -> str:
    """A path is made absolute; a name stays."""
    is_path = "/" in value or value.endswith((".gguf", ".toml"))
    return str(place.path(value)) if is_path else value


_NAMED = Kind("a name or a path", _is_text, _resolved)
_NAMED_OR_NONE = Kind(
    'a name or a path, or "" for none',
    lambda value: value == "" or _is_text(value),
    lambda value, place: _resolved(value, place) if value else None,
)
_PATH = Kind("a path with a /", lambda value: _is_text(value) and "/" in value, lambda value, place: place.path(value))
_KEY_FILE = Kind(
    'the path of a file that holds the key, beginning with / or ~/ or ./ , or "" for none',
    lambda value: value == "" or (_is_text(value) and value.startswith(("/", "~/", "./", "../"))),
    lambda value, place: place.path(value) if value else None,
)


def _is_host(value: Any) -> bool:
    if not isinstance(value, str) or len(value) > 253:
        return False
    try:
        ipaddress.ip_address(value)
    except ValueError:
        part = r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
        # four numbers that are no address are no name either
        return bool(re.fullmatch(rf"{part}(\.{part})*", value)) and not re.fullmatch(r"[0-9.]+", value)
    return True


_ORIGIN = re.compile(r"https?://[A-Za-z0-9.\-\[\]:]+")


def _are_origins(value: Any) -> bool:
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
        return False
    return all(item == "*" or _ORIGIN.fullmatch(item) for item in value)


_ORIGINS = Kind(
    'a list of origins, each like "https://example.org" without a path, or "*"',
    _are_origins,
    lambda value, _place: tuple(value),
    lambda text: [part.strip() for part in text.split(",") if part.strip()],
)


@dataclass(frozen=True, slots=True)
class Key:
    """One setting of the tree."""

    table: str
    name: str
    kind: Kind
    environment: str = ""  # the variable's name after the prefix, where it is not the key's
    restart: bool = True  # a running server cannot take another value
    secret: bool = False  # a wrong value may be a key, and is not repeated

    @property
    def dotted(self) -> str:
        return f"{self.table}.{self.name}"

    @property
    def variable(self) -> str:
        return ENV_PREFIX + (self.environment or self.name.upper())


KEYS = (
    Key("model", "name", _NAMED, "MODEL"),
    Key("model", "mode", _choice("auto", "full", "exit", "verified", "margin")),
    Key("model", "pack", _NAMED_OR_NONE),
    Key("model", "max_disagreement", _number_or_none(0.0001, 0.9999)),
    Key("model", "audit_rate", _number(0, 1)),
    Key("model", "ctx", _whole(0, 2**31 - 1)),
    Key("model", "threads", _whole(0, 512)),
    Key("model", "kv_type", _choice("f16", "f32", "q8_0")),
    Key("model", "kernels", _choice("edge", "stock")),
    Key("server", "host", Kind("an address or a host's name", _is_host)),
    Key("server", "port", _whole(0, 65535)),
    Key("server", "api_key_file", _KEY_FILE, restart=False, secret=True),
    Key("server", "cors_origins", _ORIGINS, restart=False),
    Key("limits", "max_conversations", _whole(1, 256)),
    Key("limits", "max_body_bytes", _whole(1024, 2**30), restart=False),
    Key("limits", "max_tokens", _whole(1, 2**31 - 1), restart=False),
    Key("limits", "queue_length", _whole(0, 65536), restart=False),
    Key("limits", "deadline_s", _number_or_none(0.1, 86400), restart=False),
    Key("limits", "stall_s", _number_or_none(0.1, 86400), restart=False),
    Key("device", "profile", _NAMED_OR_NONE, "DEVICE"),
    Key("device", "target", _choice(NO_TARGET, *TARGET_NAMES), restart=False),
    Key("device", "power_cap_w", _number_or_none(0.1, 2000), restart=False),
    Key("device", "temp_ceiling_c", _number_or_none(30, 125), restart=False),
    Key("service", "state_dir", _PATH),
    Key("service", "log_level", _choice("debug", "info", "warning", "error"), restart=False),
    Key("service", "memory_max_mib", _whole(0, 2**24)),
)
TABLES = tuple(dict.fromkeys(key.table for key in KEYS))
BY_NAME: Mapping[str, Key] = {key.dotted: key for key in KEYS}


def values_of(config: Config) -> dict[str, Any]:
    """Dotted key → value."""
    return {key.dotted: getattr(getattr(config, key.table), key.name) for key in KEYS}


def config_of(values: Mapping[str, Any]) -> Config:
    """The tree of all these values, by dotted key."""
    by_table = {t: {key.name: values[key.dotted] for key in KEYS if key.table == t} for t in TABLES}
    tables = {f.name: type(getattr(Config(), f.name))(**by_table[f.name]) for f in dataclasses.fields(Config)}
    return Config(**tables)


def plain(key: Key, value: Any) -> Any:
    """A value as a TOML file would say it: a path is a text, and None is what the key takes for none."""
    if value is None:
        return "" if key.kind.fits("") else 0
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and math.isfinite(value) and value == int(value):
        return int(value)
    return list(value) if isinstance(value, tuple) else value
