"""The verbs `edge-run service …`: the server as a service of systemd. They import what they need when they run."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .errors import EdgeError, UsageError
from .options import DeviceOption, JsonOption

if TYPE_CHECKING:
    from .config_load import LoadedConfig
    from .service.plan import Planned
    from .service.systemctl import ServiceStatus, Systemctl

NOT_ACTIVE = 3  # exit code of `status`, as systemctl's
_OUR_UNITS = "'edge-runtime.*'"  # for a shell: the service, and its socket where there is one

service_app = typer.Typer(
    help="Run the server in the background, under systemd.",
    epilog="""\b
Examples:
  edge-run service install --dry-run
  sudo edge-run service install --now
  edge-run service install --user
  edge-run service status
  sudo edge-run service uninstall""",
    rich_markup_mode=None,
)

UserOption = Annotated[
    bool | None,
    typer.Option(
        "--user/--system", help="A service of yours, or of the machine.", show_default="--system for root, else --user"
    ),
]
RootOption = Annotated[
    Path | None, typer.Option("--root", help="An image's folder instead of the running system.", metavar="FOLDER")
]
ForceOption = Annotated[bool, typer.Option("--force", help="Also where a unit was edited by hand.")]


@dataclass(frozen=True, slots=True)
class Install:
    """What `install` was asked for."""

    user: bool
    dry_run: bool = False
    now: bool = False
    socket: bool = False
    allow: tuple[str, ...] = ()
    root: Path | None = None
    command: Path | None = None
    device: str | None = None
    force: bool = False


@service_app.command(
    "install",
    epilog="""\b
Examples:
  edge-run service install --dry-run
  sudo edge-run service install --now
  sudo edge-run service install --socket --allow 192.168.1.0/24
  edge-run service install --user --now
  edge-run service install --root /mnt/image --exec /opt/edge-runtime/bin/edge-run --device pi5

\b
What is served stands in /etc/edge-runtime/config.toml (see `edge-run config`); host, port, API key, model and device
there shape the unit, so install again after a change of them. The system's service runs as a user of its own, sees no
home folder, and may write to its own state and cache alone; a user's service can give up less.""",
)
def install_verb(
    user: UserOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the units, and write nothing.")] = False,
    now: Annotated[bool, typer.Option("--now", help="Also start it, now and at each boot.")] = False,
    socket: Annotated[
        bool, typer.Option("--socket", help="Let systemd open the port; the service then has no network at all.")
    ] = False,
    allow: Annotated[
        list[str] | None,
        typer.Option("--allow", help="A network that may ask, besides this machine; repeatable.", metavar="NETWORK"),
    ] = None,
    root: RootOption = None,
    command: Annotated[
        Path | None,
        typer.Option("--exec", help="The edge-run to start.", show_default="this one", metavar="PATH"),
    ] = None,
    device: DeviceOption = None,
    force: ForceOption = False,
) -> None:
    """Write the units of the server."""
    wanted = _wants_user(user)
    networks = tuple(allow or ())
    install(Install(wanted, dry_run, now, socket, networks, root, command, device, force), _manager(wanted))


@service_app.command(
    "uninstall",
    epilog="""\b
Examples:
  edge-run service uninstall --dry-run
  sudo edge-run service uninstall

\b
Stops the service and removes the files that `install` wrote. Your own drop-ins, the configuration and what the service
has learnt stay.""",
)
def uninstall_verb(
    user: UserOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be removed.")] = False,
    root: RootOption = None,
    force: ForceOption = False,
) -> None:
    """Stop the service and remove its units."""
    wanted = _wants_user(user)
    uninstall(_manager(wanted), root=root, force=force, dry_run=dry_run)


@service_app.command(
    "status",
    epilog="""\b
Examples:
  edge-run service status
  edge-run service status --user --json | jq .memory_bytes

\b
Exit code 0 if it runs, 3 if it does not, 1 if it is not installed or systemd is not there. A wrong configuration is not
tried again, and after five failures within ten minutes nothing is: mend it, then `systemctl reset-failed
'edge-runtime.*'` and start it, or install it again with --now, which does both.""",
)
def status_verb(user: UserOption = None, as_json: JsonOption = False) -> None:
    """Show whether the service runs, what it said last, its watchdog and its memory."""
    if not status(_manager(_wants_user(user)), as_json=as_json):
        raise typer.Exit(NOT_ACTIVE)


def _wants_user(asked: bool | None) -> bool:
    return os.geteuid() != 0 if asked is None else asked


def _manager(user: bool) -> Systemctl:
    from .service.systemctl import Systemctl

    return Systemctl(user=user)


# ── install ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def install(request: Install, manager: Systemctl) -> None:
    """Print or write the units; what to do next goes to stderr. Raises EdgeError."""
    from . import display
    from .service.files import write_units
    from .service.unit import unit_files

    _check(request)
    running = request.root is None and manager.is_running()
    if not request.dry_run and request.root is None and not running:
        raise _not_running(manager, "print the units with --dry-run, or install into an image with --root FOLDER")
    planned = _plan(request, manager if request.root is None else None)
    files, folder = unit_files(planned.plan), unit_folder(request.user, request.root, os.environ)
    for note in planned.notes:
        display.tell(f"warning: {note}")
    if request.dry_run:
        print("\n".join(f"# {folder / name}\n{text}" for name, text in files.items()), end="")
        return
    changed = write_units(folder, files, force=request.force)
    for path in changed:
        print(path)
    if not changed:
        display.tell(f"the units in {folder} are as they should be")
    names = [name for name in files if "/" not in name]
    if running:
        manager.must("daemon-reload")
    if request.now:
        manager.must("enable", *names)
        manager.reset_failed(*names)
        # a large model takes its time, and `status` tells of it
        manager.must("restart", "--no-block", *names)
    for line in next_steps(request, manager, names):
        display.tell(line)


def _check(request: Install) -> None:
    """Raises UsageError for options that do not go together."""
    if request.now and (request.dry_run or request.root is not None):
        other = "--dry-run" if request.dry_run else "--root"
        raise UsageError(f"--now starts a service, and {other} installs none here", "drop one of them")
    if request.root is not None and not (request.root.is_absolute() and request.root.is_dir()):
        raise UsageError(f"--root {request.root} is not the whole path of a folder", "name where the image is mounted")
    if request.allow and request.user:
        raise UsageError("a user's service cannot filter networks", "drop --allow, or install for the --system")


def _not_running(manager: Systemctl, hint: str) -> EdgeError:
    who = "your own systemd" if manager.user else "systemd"
    return EdgeError(f"{who} is not running here", hint)


def _plan(request: Install, manager: Systemctl | None) -> Planned:
    from .service.plan import InstallRequest, plan_units
    from .service.unit import OLDEST_SYSTEMD

    version = None
    if manager is not None:
        try:
            version = manager.version()
        except EdgeError:
            if not request.dry_run:
                raise
    return plan_units(
        InstallRequest(
            user=request.user,
            socket=request.socket,
            allowed=request.allow,
            root=request.root,
            command=request.command,
            systemd=version or OLDEST_SYSTEMD,
        ),
        service_config(request, os.environ),
    )


def service_config(request: Install, environment: Mapping[str, str]) -> LoadedConfig:
    """The configuration that the service will find: its files alone, for it sees no variable of this shell."""
    from .config_load import SYSTEM_FILE, load_config, standard_files, standard_sources, without_ours
    from .sensors.machine import Machine

    given = {"device.profile": request.device}
    if request.root is not None:
        # this machine is not the one that the image is for
        image = dataclasses.replace(
            standard_sources(given, (request.root / SYSTEM_FILE.relative_to("/"),)),
            environment={},
            machine=Machine(request.root),
            machine_arch="",
        )
        return load_config(image)
    files = standard_files(environment) if request.user else (SYSTEM_FILE,)
    visible = without_ours(environment) if request.user else {}
    return load_config(dataclasses.replace(standard_sources(given, files), environment=visible))


def unit_folder(user: bool, root: Path | None, environment: Mapping[str, str]) -> Path:
    """Where units are put. Raises UsageError for a user without a home."""
    if root is not None:
        return root / "etc/systemd" / ("user" if user else "system")
    if not user:
        return Path("/etc/systemd/system")
    base, home = environment.get("XDG_CONFIG_HOME", ""), environment.get("HOME", "")
    if not base.startswith("/") and not home.startswith("/"):
        raise UsageError("$HOME is not set, and a user's units are kept there", "set it, or install for the --system")
    return (Path(base) if base.startswith("/") else Path(home) / ".config") / "systemd" / "user"


def next_steps(request: Install, manager: Systemctl, names: list[str]) -> list[str]:
    """What to type next."""
    sudo = "" if request.user else "sudo "
    if request.root is not None:
        return [f"next: systemctl --root={request.root} {'--global ' if request.user else ''}enable {' '.join(names)}"]
    lines = [] if request.now else [f"next: {sudo}{manager.words('enable', '--now', *names)}"]
    lines.append(f"then: edge-run service status {'--user' if request.user else '--system'}")
    lines.append(_log_of(names[0], user=request.user))
    if request.user:
        lines.append("to keep it running while you are not logged in: loginctl enable-linger")
    return lines


# ── uninstall, status ───────────────────────────────────────────────────────────────────────────────────────────────


def uninstall(manager: Systemctl, *, root: Path | None, force: bool, dry_run: bool) -> None:
    """Remove what install wrote, and print what that was. Raises EdgeError."""
    from . import display
    from .service.files import removable, remove_units

    folder = unit_folder(manager.user, root, os.environ)
    names = removable(folder, force=force or dry_run)
    if not names:
        raise EdgeError(
            f"there is nothing in {folder} that `edge-run service install` wrote", "see --user and --system"
        )
    if dry_run:
        for name in names:
            print(folder / name)
        return
    running = root is None and manager.is_running()
    if running:
        manager.must("disable", "--now", *(name for name in names if "/" not in name))
    for path in remove_units(folder, force=force):
        print(path)
    if running:
        manager.must("daemon-reload")
    display.tell("what the service has learnt and its configuration stay where they are")


def status(manager: Systemctl, *, as_json: bool) -> bool:
    """Print what systemd knows of the service; whether it runs. Raises EdgeError."""
    from . import display
    from .service.unit import SERVICE

    if not manager.is_running():
        raise _not_running(manager, "a service needs systemd; `edge-run serve` runs without it")
    found = manager.service()
    if not found.installed:
        where = "--user" if manager.user else "--system"
        raise EdgeError(f"{SERVICE} is not installed", f"`edge-run service install {where}` installs it")
    if as_json:
        display.write_json({**dataclasses.asdict(found), "active": found.active})
    else:
        for line in status_lines(found):
            print(display.harmless(line))
        if found.state == "failed":
            print("\n".join(after_failure(manager)))
    return found.active


def after_failure(manager: Systemctl) -> list[str]:
    """What to type once a service has failed, perhaps so often that systemd would start it no more."""
    from .service.unit import SERVICE

    sudo = "" if manager.user else "sudo "
    again = f"{sudo}{manager.words('reset-failed', _OUR_UNITS)} && {sudo}{manager.words('start', SERVICE)}"
    return [_log_of(SERVICE, user=manager.user), f"once that is mended: {again}"]


def _log_of(unit: str, *, user: bool) -> str:
    return f"its log: {'' if user else 'sudo '}journalctl {'--user ' if user else ''}-u {unit}"


def status_lines(found: ServiceStatus) -> list[str]:
    """The service in words."""
    since = f" since {found.since}" if found.since and found.active else ""
    lines = [f"state: {found.state} ({found.detail}){since}, {found.enabled or 'not enabled'}"]
    if found.status:
        lines.append(f"says: {found.status}")
    if found.pid:
        lines.append(f"process: {found.pid}")
    if found.watchdog_s is not None:
        heard = f", heard {found.watchdog_heard}" if found.watchdog_heard else ""
        lines.append(f"watchdog: within {found.watchdog_s:g} s{heard}")
    sizes = (("", found.memory_bytes), ("at most ", found.memory_peak_bytes), ("limit ", found.memory_max_bytes))
    memory = [f"{what}{size / 2**20:.0f} MiB" for what, size in sizes if size is not None]
    if memory:
        lines.append(f"memory: {', '.join(memory)}")
    if found.restarts or found.result not in ("", "success"):
        code = "" if found.exit_status is None else f", exit code {found.exit_status}"
        lines.append(f"last end: {found.result}{code}; restarted {found.restarts or 0} times")
    if found.needs_reload:
        lines.append("its unit has changed since systemd read it: systemctl daemon-reload")
    return lines
