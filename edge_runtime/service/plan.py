"""From a configuration and this machine to a plan of the units: what the service must read, and how much it may use."""

from __future__ import annotations

import ipaddress
import stat
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .. import _library
from ..config_load import COMMAND_LINE, LoadedConfig, is_loopback
from ..errors import EdgeError, UsageError
from ..exits.packs import find_exit_pack
from ..memory import MemoryNeed, estimate_need
from ..models import DEMO_MODEL, ENV_MODELS, find_model
from ..native import ContextOptions, KvType, read_header
from ..profiles import DEVICE_ENV, profiles_dir
from ..resolve import DEFAULT_CAP
from .unit import OLDEST_SYSTEMD, UnitPlan

_HIDDEN = (Path("/home"), Path("/root"), Path("/run/user"))  # by ProtectHome=
_PRIVATE = (Path("/tmp"), Path("/var/tmp"))  # by PrivateTmp=
_DEFAULT_CTX = 2048
_SLICES, _OUTPUTS = 3, 16  # two boundaries, and drafts of 15 tokens: what is usual
_N_BATCH = 128
_MARGIN = 1.25  # the need is an estimate
_INTERPRETER_MIB = 512  # Python, its libraries and the bodies of requests
_STEP_MIB = 64


@dataclass(frozen=True, slots=True)
class InstallRequest:
    """What `edge-run service install` was asked for."""

    user: bool
    socket: bool = False
    allowed: tuple[str, ...] = ()
    root: Path | None = None  # a system that is not running; its files are below this folder
    command: Path | None = None  # edge-run on that system; None: this environment's
    systemd: int = OLDEST_SYSTEMD


@dataclass(frozen=True, slots=True)
class Planned:
    """A plan, and what a person should know about it."""

    plan: UnitPlan
    notes: tuple[str, ...]


def plan_units(request: InstallRequest, loaded: LoadedConfig) -> Planned:
    """Raises UsageError for what cannot be a service, with what to do about it."""
    config, notes = loaded.config, list(loaded.warnings)
    command = request.command or Path(sys.prefix) / "bin" / "edge-run"
    _check_command(request, command)
    allowed = _networks(request.allowed)
    if allowed and is_loopback(config.server.host):
        hint = "set server.host to an address of this machine, or to 0.0.0.0"
        raise UsageError(f"--allow means nothing where only this machine can ask: {config.server.host}", hint)
    model = _model(request, loaded)
    notes += model.notes
    key_file = config.server.api_key_file
    if key_file is not None:
        key_file = _in_root(request.root, key_file)
        if not _below(request.root, key_file).exists():
            notes.append(f"the service cannot start yet: there is no API key in {key_file}")
    mib = config.service.memory_max_mib or (_memory_mib(model.need) if model.need is not None else 0)
    if not mib:
        notes.append("MemoryMax= is left out: what the model needs is not known")
    read = [*_environment_paths(request, command), *_configured_paths(request, loaded), *model.paths]
    plan = UnitPlan(
        command=command,
        user=request.user,
        systemd=request.systemd,
        host=config.server.host,
        port=config.server.port,
        socket=request.socket,
        allowed=allowed,
        api_key_file=key_file,
        memory_max_mib=mib,
        bound=() if request.user else _bound(request, read),
        environment={**model.environment, **_device(loaded)},
        profile=loaded.profile.name,
        sensors=loaded.profile.sensors,
    )
    return Planned(plan, tuple(notes))


def _below(root: Path | None, path: Path) -> Path:
    return path if root is None else root / path.relative_to("/")


def _in_root(root: Path | None, path: Path) -> Path:
    """A path as the system below `root` will see it."""
    return Path("/") / path.relative_to(root) if root is not None and path.is_relative_to(root) else path


def _check_command(request: InstallRequest, command: Path) -> None:
    """Raises UsageError unless `command` is a program there."""
    if not command.is_absolute():
        raise UsageError(f"{command} is no whole path", "give one, as in --exec /opt/edge-runtime/bin/edge-run")
    path = _below(request.root, command)
    try:
        mode = path.stat().st_mode
    except OSError as error:
        hint = "install the package there, or name the program with --exec"
        raise UsageError(f"{path} cannot be started: {error.strerror}", hint) from None
    if not stat.S_ISREG(mode) or not mode & stat.S_IXUSR:
        raise UsageError(f"{path} is no program", "name edge-run of the environment that is to serve with --exec")


def _environment_paths(request: InstallRequest, command: Path) -> list[Path]:
    """What Python, this package and its library are made of."""
    if request.command is not None:
        return [command.parent.parent]
    package = Path(__file__).resolve().parent.parent
    return [Path(sys.prefix), Path(sys.base_prefix), package, profiles_dir(), _library.library_dir().absolute()]


def _configured_paths(request: InstallRequest, loaded: LoadedConfig) -> list[Path]:
    """Files that the configuration names, and its own. Raises PackError for a pack that there is not."""
    config = loaded.config
    found = [] if request.root is not None else list(loaded.files)
    if config.model.pack is not None:
        found.append(_in_root(request.root, find_exit_pack(config.model.pack).absolute()))
    if (config.device.profile or "").endswith(".toml"):
        found.append(_in_root(request.root, Path(config.device.profile or "")))
    return found


def _device(loaded: LoadedConfig) -> dict[str, str]:
    """What was asked for when installing is asked for when serving."""
    if loaded.origins["device.profile"] != COMMAND_LINE:
        return {}
    return {DEVICE_ENV: str(loaded.config.device.profile)}


def _networks(texts: Iterable[str]) -> tuple[str, ...]:
    """Raises UsageError for what is no network."""
    found = []
    for text in texts:
        try:
            found.append(str(ipaddress.ip_network(text, strict=False)))
        except ValueError:
            raise UsageError(f"{text!r} is no network", "give one as in --allow 192.168.1.0/24") from None
    return tuple(found)


# ── memory ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class _Model:
    """What serving the model takes; nothing where there is no such model yet, and `notes` say so."""

    paths: tuple[Path, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    need: MemoryNeed | None = None
    notes: tuple[str, ...] = ()


def _model(request: InstallRequest, loaded: LoadedConfig) -> _Model:
    name = loaded.config.model.name
    try:
        path = _in_root(request.root, find_model(name).absolute())
        need = _need(_below(request.root, path), loaded)
    except EdgeError as error:
        return _Model(notes=(f"the service cannot start yet: {error.message}",))
    by_folder = "/" not in name and name != DEMO_MODEL  # where, it may be, only this user looks
    return _Model((path,), {ENV_MODELS: str(path.parent)} if by_folder else {}, need)


def _need(path: Path, loaded: LoadedConfig) -> MemoryNeed:
    """What the model takes with all conversations open. Raises a ModelError."""
    header, config = read_header(str(path)), loaded.config
    n_ctx = config.model.ctx or min(_DEFAULT_CTX, header.n_ctx_train or _DEFAULT_CTX)
    n = config.limits.max_conversations
    rows = n * (DEFAULT_CAP + 1) if config.model.mode == "exit" else max(n, _OUTPUTS)  # that get logits
    cells = min(n_ctx * n, 2**31 - 1)
    options = ContextOptions(n_ctx=cells, n_batch=max(_N_BATCH, rows), kv_type=KvType(config.model.kv_type))
    return estimate_need(header, options, _SLICES, rows)


def _memory_mib(need: MemoryNeed) -> int:
    mib = need.total / 2**20 * _MARGIN + _INTERPRETER_MIB
    return -int(-mib // _STEP_MIB) * _STEP_MIB


# ── what ProtectHome= would hide ────────────────────────────────────────────────────────────────────────────────────


def _bound(request: InstallRequest, paths: Iterable[Path]) -> tuple[Path, ...]:
    """Of the paths, those that must be bound to be seen; one that lies in another is left out.

    Raises UsageError for a path that is private to other processes, or that the service's own user may not read.
    """
    both = set(paths)
    if request.root is None:  # links of another system cannot be followed from here
        both |= {path.resolve() for path in both}
    for path in sorted(both):
        if any(path.is_relative_to(folder) for folder in _PRIVATE):
            raise UsageError(f"a service cannot use {path}: it has a /tmp of its own", "move it, to /opt for example")
    hidden = sorted(path for path in both if any(path.is_relative_to(folder) for folder in _HIDDEN))
    bound = tuple(p for p in hidden if not any(p != other and p.is_relative_to(other) for other in hidden))
    if any(path in _HIDDEN for path in bound):
        raise UsageError(f"a service cannot have all of {bound[0]}", "make the environment in /opt, or in a folder")
    for path in sorted(both):
        below = [_below(request.root, p) for p in bound]
        closed = first_closed(_below(request.root, path), below, request.root or Path("/"))
        if closed is not None:
            hint = f"`chmod o+rX {closed}`, or make the environment in /opt; a --user service runs as you"
            raise UsageError(f"the service's own user may not read {closed}", hint)
    return bound


def first_closed(path: Path, bound: Iterable[Path], top: Path) -> Path | None:
    """The first folder on the way from `top` to `path`, or itself, that others may not enter or read.

    Above one of the `bound` folders, systemd makes the way itself.
    """
    start = next((b for b in bound if path.is_relative_to(b)), top)
    way = [p for p in (*reversed(path.parents), path) if p.is_relative_to(start)]
    for step in way:
        try:
            mode = step.stat().st_mode
        except OSError:
            return None  # not there; who reads it will say so
        needed = stat.S_IXOTH if stat.S_ISDIR(mode) else stat.S_IROTH
        if not mode & needed:
            return step
    return None
