"""The text of the systemd units: a plan in, files out. See systemd.exec(5) for what each setting does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path

from ..config_load import API_KEY_CREDENTIAL, is_loopback
from ..errors import UsageError

SERVICE = "edge-runtime.service"
SOCKET = "edge-runtime.socket"
DEVICE_DROP_IN = f"{SERVICE}.d/50-device.conf"
UNIT_FILES = (SERVICE, SOCKET, DEVICE_DROP_IN)  # all that are ever written

NOTIFY_RELOAD_SINCE = 253  # systemd's version that has Type=notify-reload
OLDEST_SYSTEMD = 247  # Debian 11's; LoadCredential= and ProtectProc= are as old
# what has sensors that PrivateDevices= would hide: sensor of a profile → device and its group
_DEVICES = {"raspberry-pi-pmic": ("/dev/vcio", "video"), "raspberry-pi": ("/dev/vcio", "video")}


@dataclass(frozen=True, slots=True)
class UnitPlan:
    """What the units are to say."""

    command: Path  # edge-run of the environment that is to serve
    user: bool = False  # a unit of the user's own manager, which may do less
    systemd: int = OLDEST_SYSTEMD
    host: str = "127.0.0.1"
    port: int = 8080
    socket: bool = False  # systemd opens the port
    allowed: tuple[str, ...] = ()  # networks that may ask, besides this machine; empty with another host: all
    api_key_file: Path | None = None
    memory_max_mib: int = 0  # 0: no limit
    bound: tuple[Path, ...] = ()  # folders and files to read below those that ProtectHome= hides
    environment: Mapping[str, str] = field(default_factory=dict)
    profile: str = "generic"
    sensors: tuple[str, ...] = ()


def unit_files(plan: UnitPlan) -> dict[str, str]:
    """Name below the folder of units → text. Raises UsageError for what a unit cannot say."""
    files = {SERVICE: _service(plan)}
    if plan.socket:
        files[SOCKET] = _socket(plan)
    device = _device(plan)
    return {**files, DEVICE_DROP_IN: device} if device else files


# ── the service ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _service(plan: UnitPlan) -> str:
    blocks = [_unit_section(plan), "[Service]\n" + _running(plan), _limits(plan)]
    blocks += [_FILTERS, _families(plan)]
    if not plan.user:
        blocks += [_NAMESPACES, _files(plan), _network(plan)]
    target = "default.target" if plan.user else "multi-user.target"
    also = f"Also={SOCKET}\n" if plan.socket else ""
    return "\n".join([*blocks, f"[Install]\nWantedBy={target}\n{also}"])


def _unit_section(plan: UnitPlan) -> str:
    lines = ["[Unit]", "Description=edge_runtime, language models on this device"]
    if plan.socket:
        lines += [f"Requires={SOCKET}", f"After={SOCKET}"]
    elif is_loopback(plan.host):
        lines += ["After=network.target"]
    else:
        lines += ["Wants=network-online.target", "After=network-online.target"]
    # a server that fails again and again is left alone, instead of wearing out the memory card
    return "\n".join([*lines, "StartLimitIntervalSec=600", "StartLimitBurst=5", ""])


def _running(plan: UnitPlan) -> str:
    reloads = plan.systemd >= NOTIFY_RELOAD_SINCE
    lines = [
        "Type=notify-reload" if reloads else "Type=notify",
        "NotifyAccess=main",
        f"ExecStart={exec_word(plan.command)} serve",
        *([] if reloads else ["ExecReload=/bin/kill -HUP $MAINPID"]),
        *(f"Environment={_quoted(f'{name}={value}')}" for name, value in sorted(plan.environment.items())),
        'Environment="EDGE_RUNTIME_CACHE=%C/edge-runtime" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1',
        "# each line of the log has its level; what has none is a last word",
        "SyslogLevel=err",
        "StateDirectory=edge-runtime",
        "CacheDirectory=edge-runtime",
    ]
    if not plan.user:
        lines += ["StateDirectoryMode=0700", "CacheDirectoryMode=0700", "WorkingDirectory=/"]
    if plan.api_key_file is not None and not plan.user:
        # the rest of the line is the path, as it stands
        lines += [f"LoadCredential={API_KEY_CREDENTIAL}:{_checked(plan.api_key_file).replace('%', '%%')}"]
    lines += [
        "# a large model comes slowly from a memory card; a slow board takes long for a part of a prompt",
        "TimeoutStartSec=15min",
        "TimeoutStopSec=60",
        "WatchdogSec=3min",
        "Restart=on-failure",
        "RestartSec=5",
        "# a wrong configuration does not become right by itself",
        "RestartPreventExitStatus=2",
        "",
    ]
    return "\n".join(lines)


def _limits(plan: UnitPlan) -> str:
    memory = f"MemoryMax={plan.memory_max_mib}M\n" if plan.memory_max_mib else ""
    return f"{memory}OOMPolicy=stop\nTasksMax=512\nLimitCORE=0\nUMask=0077\n"


# what any process may give up
_FILTERS = """\
NoNewPrivileges=yes
LockPersonality=yes
MemoryDenyWriteExecute=yes
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallFilter=~@privileged @resources
# threads ask for their limits and where they may run, and are told so
SystemCallFilter=prlimit64 getrlimit ugetrlimit sched_setaffinity
SystemCallErrorNumber=EPERM
"""

# what only the system's manager can take away
_NAMESPACES = """\
DynamicUser=yes
CapabilityBoundingSet=
AmbientCapabilities=
DevicePolicy=closed
RemoveIPC=yes
KeyringMode=private
PrivateTmp=yes
PrivateDevices=yes
PrivateMounts=yes
ProtectSystem=strict
ProtectClock=yes
ProtectControlGroups=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectProc=invisible
# memory and load are read in /proc
ProcSubset=all
"""


def _files(plan: UnitPlan) -> str:
    if not plan.bound:
        return "ProtectHome=yes\n"
    return f"ProtectHome=tmpfs\nBindReadOnlyPaths={' '.join(map(_listed, plan.bound))}\n"


def _families(plan: UnitPlan) -> str:
    """A socket that systemd opened needs no other."""
    internet = "" if plan.socket else "AF_INET AF_INET6 "
    return f"RestrictAddressFamilies={internet}AF_UNIX\n"


def _network(plan: UnitPlan) -> str:
    return ("PrivateNetwork=yes\n" if plan.socket else "") + _addresses(plan)


def _addresses(plan: UnitPlan) -> str:
    if not is_loopback(plan.host) and not plan.allowed:
        return ""
    return f"IPAddressDeny=any\nIPAddressAllow={' '.join(['localhost', *plan.allowed])}\n"


# ── the others ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _socket(plan: UnitPlan) -> str:
    host = "127.0.0.1" if plan.host == "localhost" else plan.host
    try:
        address = ip_address(host)
    except ValueError:
        raise UsageError(f"a socket unit cannot listen on the name {host!r}", "set server.host to an address") from None
    if plan.port == 0:
        raise UsageError("a socket unit cannot choose a port by itself", "set server.port to one from 1 to 65535")
    at = f"[{address}]:{plan.port}" if address.version == 6 else f"{address}:{plan.port}"
    filters = "" if plan.user else _addresses(plan)
    return f"""[Unit]
Description=Port of edge_runtime

[Socket]
ListenStream={at}
FileDescriptorName=http
NoDelay=yes
{filters}
[Install]
WantedBy=sockets.target
"""


def _device(plan: UnitPlan) -> str:
    """Opens what the profile's sensors need; "" if they need nothing that is closed."""
    needed = dict.fromkeys(_DEVICES[name] for name in plan.sensors if name in _DEVICES)
    if plan.user or not needed:
        return ""
    lines = [f"# sensors of the device profile {plan.profile}", "[Service]", "PrivateDevices=no"]
    lines += [f"DeviceAllow={device} rw" for device, _ in needed]
    groups = dict.fromkeys(group for _, group in needed)
    return "\n".join([*lines, f"SupplementaryGroups={' '.join(groups)}", ""])


# ── words as systemd reads them ─────────────────────────────────────────────────────────────────────────────────────


def exec_word(path: Path) -> str:
    """The program of ExecStart=. Raises UsageError for characters that systemd takes in no program's path."""
    text = _checked(path)
    if set(text) & set("\"'\\"):
        raise UsageError(f"systemd starts no program at {text!r}", "move it to a path without quotes and backslashes")
    return _quoted(text)


def _listed(path: Path) -> str:
    """A path among others, where a colon separates."""
    text = _checked(path)
    if ":" in text:
        raise UsageError(f"a unit cannot name {text!r}", "move it to a path without a colon")
    return _quoted(text)


def _checked(path: Path) -> str:
    text = str(path)
    if not text.startswith("/") or not text.isprintable() or text != text.strip():
        raise UsageError(f"a unit cannot name {text!a}", "it must be a whole path without control characters")
    return text


def _quoted(text: str) -> str:
    """One word: percent signs name nothing, spaces separate nothing."""
    text = text.replace("%", "%%")
    if not set(text) & set(" \"'\\;"):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
