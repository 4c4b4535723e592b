"""Where a server's configuration comes from, the weakest first: defaults, the device's profile, files, the service
manager, the environment, the command line."""

from __future__ import annotations

import ipaddress
import os
import platform
import reprlib
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .config import BY_NAME, ENV_PREFIX, KEYS, NO_TARGET, TABLES, Config, Key, Place, config_of, values_of
from .errors import EdgeError, UsageError
from .profile_schema import Profile, read_toml, unknown
from .profiles import Detected, Files, choose_profile
from .sensors.machine import Machine

SYSTEM_FILE = Path("/etc/edge-runtime/config.toml")
API_KEY_CREDENTIAL = "api-key"  # its name below $CREDENTIALS_DIRECTORY
COMMAND_LINE = "the command line"
# variables of the prefix that are no key: where models, caches, libraries and test data are
OTHER_VARIABLES = tuple(ENV_PREFIX + name for name in ("MODELS", "CACHE", "LIB", "STOCK_LIB", "DATA"))
_MAX_KEY_BYTES = 4096
_MAKE_KEY = "`(umask 077; openssl rand -hex 32 > FILE)`"


@dataclass(frozen=True, slots=True)
class Sources:
    """All that a configuration is made of; nothing else is looked at."""

    files: tuple[Path, ...] = ()  # a later one wins; one that is not there is passed over
    environment: Mapping[str, str] = field(default_factory=dict)
    given: Mapping[str, Any] = field(default_factory=dict)  # of the command line, by dotted key; None: not given
    folder: Path = Path("/")  # what relative paths of environment and command line are relative to
    machine: Files = field(default_factory=Machine)
    system: str = "Linux"  # both as `uname` has them
    machine_arch: str = ""


@dataclass(frozen=True, slots=True)
class LoadedConfig:
    """A configuration and where each of its values comes from, in words."""

    config: Config
    origins: Mapping[str, str]  # by dotted key
    profile: Profile
    files: tuple[Path, ...]  # that were read
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Reload:
    """What a second look gave: `loaded` is the configuration to go on with."""

    loaded: LoadedConfig
    changed: tuple[str, ...] = ()  # dotted keys that have another value now
    error: EdgeError | None = None  # why the old one stays

    @property
    def needs_restart(self) -> tuple[str, ...]:
        """Of those that changed, the ones that only a restart puts into force."""
        return tuple(name for name in self.changed if BY_NAME[name].restart)


@dataclass(frozen=True, slots=True)
class _Setting:
    value: Any
    origin: str


def standard_files(environment: Mapping[str, str]) -> tuple[Path, ...]:
    """The system's file, then the user's; the user's only where there is a home."""
    base, home = environment.get("XDG_CONFIG_HOME", ""), environment.get("HOME", "")
    if base.startswith("/"):  # by its specification, a relative one is to be ignored
        return SYSTEM_FILE, Path(base) / "edge-runtime" / "config.toml"
    own = (Path(home) / ".config" / "edge-runtime" / "config.toml",) if home.startswith("/") else ()
    return SYSTEM_FILE, *own


def standard_sources(given: Mapping[str, Any] | None = None, files: tuple[Path, ...] | None = None) -> Sources:
    """This process's sources; `files` instead of the standard ones."""
    return Sources(
        files=standard_files(os.environ) if files is None else files,
        environment=dict(os.environ),
        given=given or {},
        folder=Path.cwd(),
        system=platform.system(),
        machine_arch=platform.machine(),
    )


def without_ours(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without what would set a key."""
    ours = {key.variable for key in KEYS}
    return {name: text for name, text in environment.items() if name not in ours}


def load_config(sources: Sources) -> LoadedConfig:
    """The configuration that `sources` give together. Raises UsageError for anything wrong in one of them."""
    files = tuple(path for path in sources.files if _is_there(path))
    home = _home(sources.environment)
    settings: dict[str, _Setting] = {}
    for path in files:
        settings |= _of_file(path, home)
    place = Place(sources.folder, home)
    settings |= _of_service_manager(sources.environment)
    settings |= _of_environment(sources.environment, place)
    settings |= _of_command_line(sources.given, place)
    detected = _detect(settings.get("device.profile"), sources)
    settings = _of_profile(detected, settings) | settings
    settings |= _profile_setting(detected, settings.get("device.profile"))
    defaults = {name: _Setting(value, "default") for name, value in values_of(Config()).items()}
    defaults["service.state_dir"] = _default_state_dir(sources.environment, home)
    settings = defaults | settings
    config = config_of({name: setting.value for name, setting in settings.items()})
    origins = {name: settings[name].origin for name in BY_NAME}
    return LoadedConfig(config, origins, detected.profile, files, tuple(_warnings(config)))


def reload_config(current: LoadedConfig, sources: Sources) -> Reload:
    """Look again; if anything is wrong now, the current configuration stays and `error` says why."""
    try:
        loaded = load_config(sources)
    except EdgeError as error:
        return Reload(current, error=error)
    before, after = values_of(current.config), values_of(loaded.config)
    return Reload(loaded, tuple(name for name in BY_NAME if before[name] != after[name]))


def read_api_key(path: Path) -> str:
    """The key in its file: its first line, which must be the only one. No error repeats what the file says.

    Raises UsageError.
    """
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_KEY_BYTES + 1)
    except OSError as error:
        raise UsageError(f"the API key {path} cannot be read: {error.strerror}", "check its permissions") from None
    key = text.decode("ascii", "replace").strip()
    if not key or len(text) > _MAX_KEY_BYTES or not all("!" <= c <= "~" for c in key):
        raise UsageError(
            f"{path} holds no API key: one line of letters, digits and signs, without spaces", f"make one: {_MAKE_KEY}"
        )
    return key


# ── each source ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _home(environment: Mapping[str, str]) -> Path | None:
    home = environment.get("HOME", "")
    return Path(home) if home.startswith("/") else None


def _is_there(path: Path) -> bool:
    """Raises UsageError for what is there and no file: reading a pipe would wait for ever."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}", "check its path and permissions") from None
    if not stat.S_ISREG(mode):
        raise UsageError(f"{path} is not a file", "a configuration is a TOML file")
    return True


def _of_file(path: Path, home: Path | None) -> dict[str, _Setting]:
    place, settings = Place(path.absolute().parent, home), {}
    origin = str(path) if str(path).isprintable() else ascii(str(path))
    for table, values in read_toml(path).items():
        if table not in TABLES:
            raise _unknown_table(path, table)
        if not isinstance(values, dict):
            raise UsageError(f"{table!r} in {path} is not a table", f"write [{table}]")
        for name, value in values.items():
            key = BY_NAME.get(f"{table}.{name}")
            if key is None:
                known = [k.name for k in KEYS if k.table == table]
                raise unknown(f"unknown key {name!r} in [{table}] of {path}", name, known)
            settings[key.dotted] = _Setting(_held(key, value, place, f"[{table}] of {path}"), origin)
    return settings


def _unknown_table(path: Path, table: str) -> UsageError:
    """A key outside of its table is told where it belongs."""
    homes = [key.table for key in KEYS if key.name == table]
    if homes:
        return UsageError(f"{table!r} in {path} stands in no table", f"write it below [{homes[0]}]")
    return unknown(f"unknown table {table!r} in {path}", table, list(TABLES))


def _of_service_manager(environment: Mapping[str, str]) -> dict[str, _Setting]:
    """The API key as systemd hands it over: its own copy, which the service may read where it may not the file."""
    folder = environment.get("CREDENTIALS_DIRECTORY", "")
    path = Path(folder) / API_KEY_CREDENTIAL
    if not folder.startswith("/") or not os.path.isfile(path):
        return {}
    return {"server.api_key_file": _Setting(path, "systemd's LoadCredential=")}


def _of_environment(environment: Mapping[str, str], place: Place) -> dict[str, _Setting]:
    by_variable, settings = {key.variable: key for key in KEYS}, {}
    for variable, text in sorted(environment.items()):
        if not variable.startswith(ENV_PREFIX) or variable in OTHER_VARIABLES:
            continue
        if variable not in by_variable:
            what = f"unknown variable ${variable} in the environment"
            raise unknown(what, variable, [*by_variable, *OTHER_VARIABLES])
        if text:  # an empty one is as good as none
            key = by_variable[variable]
            settings[key.dotted] = _Setting(_read(key, text, place, f"${variable}"), f"${variable}")
    return settings


def _of_command_line(given: Mapping[str, Any], place: Place) -> dict[str, _Setting]:
    settings = {}
    for name, value in given.items():
        if value is None:
            continue
        if name not in BY_NAME:
            raise unknown(f"unknown key {name!r} on the command line", name, list(BY_NAME))
        settings[name] = _Setting(_held(BY_NAME[name], value, place, COMMAND_LINE), COMMAND_LINE)
    return settings


def _detect(asked: _Setting | None, sources: Sources) -> Detected:
    name = asked.value if asked is not None else None
    try:
        return choose_profile(sources.machine, sources.system, sources.machine_arch, name, {})
    except UsageError as error:
        if asked is None:
            raise
        raise UsageError(f"device.profile from {asked.origin}: {error.message}", error.hint) from None


def _profile_setting(detected: Detected, asked: _Setting | None) -> dict[str, _Setting]:
    """The profile by the name or path that others can load, and why it is this one."""
    if asked is not None and asked.value is not None and asked.value in (detected.profile.name, "native"):
        why = asked.origin if asked.value == detected.profile.name else f"{asked.origin}: native; {detected.why}"
        return {"device.profile": _Setting(detected.profile.name, why)}
    if asked is not None and asked.value is not None:
        return {"device.profile": asked}  # a path
    return {"device.profile": _Setting(detected.profile.name, f"detected: {detected.why}")}


def _of_profile(detected: Detected, settings: Mapping[str, _Setting]) -> dict[str, _Setting]:
    """Threads, and what the target holds, where the profile states them."""
    profile, target = detected.profile, settings.get("device.target")
    name = values_of(Config())["device.target"] if target is None else target.value
    of_device = f"device profile {profile.name}"
    found = {"model.threads": _Setting(profile.n_threads, of_device)} if profile.n_threads else {}
    if name == NO_TARGET:
        return found
    held = profile.targets[name]
    for key, value in (
        ("device.power_cap_w", held.power_cap_w),
        ("device.temp_ceiling_c", held.temp_ceiling_c),
    ):
        if value is not None:
            found[key] = _Setting(float(value), f"{of_device}, target {name}")
    return found


def _default_state_dir(environment: Mapping[str, str], home: Path | None) -> _Setting:
    """The service manager's, else the user's."""
    own = environment.get("STATE_DIRECTORY", "").split(":")[0]
    if own.startswith("/"):
        return _Setting(Path(own), "$STATE_DIRECTORY")
    base = environment.get("XDG_STATE_HOME", "")
    if base.startswith("/"):
        return _Setting(Path(base) / "edge-runtime", "default")
    return _Setting((home or Path("/var/lib")) / (".local/state" if home else "") / "edge-runtime", "default")


# ── values ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _read(key: Key, text: str, place: Place, where: str) -> Any:
    """A value out of a text."""
    try:
        value = key.kind.read(text)
    except ValueError:
        raise _wrong(key, text, where) from None
    return _held(key, value, place, where)


def _held(key: Key, value: Any, place: Place, where: str) -> Any:
    if isinstance(value, Path):
        value = str(value)
    if not key.kind.fits(value):
        raise _wrong(key, value, where)
    try:
        return key.kind.held(value, place)
    except ValueError as error:
        raise UsageError(f"{key.name} in {where}: {error}", "write the whole path") from None


def _wrong(key: Key, value: Any, where: str) -> UsageError:
    shown = "its value" if key.secret else reprlib.repr(value)
    at = where if where.startswith("$") else f"{key.name} in {where}"
    return UsageError(f"{at}: {shown} is not allowed", f"allowed: {key.kind.allowed}")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _warnings(config: Config) -> Iterator[str]:
    if not is_loopback(config.server.host) and config.server.api_key_file is None:
        yield f"server.host {config.server.host} can be reached by others, and no server.api_key_file is set"
    path = config.server.api_key_file
    try:
        if path is not None and path.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH):
            yield f"others on this machine can read the API key: chmod 600 {path}"
    except OSError:
        pass  # read_api_key says what is wrong with it
