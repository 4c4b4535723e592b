"""`edge-run service install`, `uninstall` and `status`, with a systemd that is a table of answers."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path

import pytest

from edge_runtime import service_cli
from edge_runtime.config_load import LoadedConfig, Sources, load_config
from edge_runtime.errors import EdgeError, UsageError
from edge_runtime.service.files import Owner, owner_of, write_units
from edge_runtime.service.plan import InstallRequest, first_closed, plan_units
from edge_runtime.service.systemctl import Done, Systemctl, parse_status
from edge_runtime.service.unit import DEVICE_DROP_IN, OLDEST_SYSTEMD, SERVICE, SOCKET, unit_files
from edge_runtime.service_cli import Install, install, status, status_lines, uninstall, unit_folder

from .cli_helpers import RunCli, assert_clean, runner
from .conftest import TinyMaker
from .service_helpers import FakeSystemd

ALL = {SERVICE: "[Service]\nExecStart=/bin/true\n", SOCKET: "[Socket]\n", DEVICE_DROP_IN: "[Service]\n"}


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("EDGE_RUNTIME_MODELS", str(tmp_path / "models"))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> RunCli:
    return runner(capsys, monkeypatch)


@pytest.fixture
def systemd() -> FakeSystemd:
    return FakeSystemd()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a user's units go."""
    return tmp_path / "config" / "systemd" / "user"


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """An edge-run to start."""
    path = tmp_path / "venv" / "bin" / "edge-run"
    path.parent.mkdir(parents=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A system that is not running, with an edge-run in /opt."""
    root = tmp_path / "image"
    path = root / "opt/edge/bin/edge-run"
    path.parent.mkdir(parents=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return root


# ── files ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_was_written_is_ours_and_is_not_written_again(tmp_path: Path) -> None:
    changed = write_units(tmp_path, ALL, force=False)
    assert changed == [tmp_path / name for name in ALL]
    assert {owner_of(path) for path in changed} == {Owner.OURS}
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in changed)
    assert write_units(tmp_path, ALL, force=False) == []


def test_what_is_no_longer_wanted_goes(tmp_path: Path) -> None:
    write_units(tmp_path, ALL, force=False)
    assert write_units(tmp_path, {SERVICE: ALL[SERVICE]}, force=False) == [tmp_path / SOCKET, tmp_path / DEVICE_DROP_IN]
    assert os.listdir(tmp_path) == [SERVICE]


@pytest.mark.parametrize("name", ALL)
def test_an_edited_unit_is_kept_unless_forced(tmp_path: Path, name: str) -> None:
    write_units(tmp_path, ALL, force=False)
    with (tmp_path / name).open("a") as file:
        file.write("# mine\n")
    new = {other: f"{text}# new\n" for other, text in ALL.items()}
    before = {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    for texts in (new, {SERVICE: new[SERVICE]}):
        with pytest.raises(UsageError, match=f"{name} was edited by hand"):
            write_units(tmp_path, texts, force=False)
        assert {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()} == before
    write_units(tmp_path, new, force=True)
    assert owner_of(tmp_path / name) is Owner.OURS
    assert "# mine" not in (tmp_path / name).read_text()


def test_another_ones_unit_and_a_masked_one_are_kept_unless_forced(tmp_path: Path) -> None:
    (tmp_path / SERVICE).write_text("[Service]\n")
    (tmp_path / SOCKET).symlink_to("/dev/null")
    with pytest.raises(UsageError, match=r"edge-runtime\.service is not from edge-run"):
        write_units(tmp_path, ALL, force=False)
    write_units(tmp_path, {SERVICE: ALL[SERVICE]}, force=True)
    assert (tmp_path / SOCKET).is_symlink()  # not asked for, not touched


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EdgeError, match="cannot be written: File exists"):
        write_units(tmp_path / "file", ALL, force=False)


def test_a_unit_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_path: Path) -> bool:
        raise PermissionError(13, "Permission denied")

    for name in ("is_symlink", "read_bytes"):
        with monkeypatch.context() as patched:
            patched.setattr(Path, name, refuse)
            with pytest.raises(UsageError, match="cannot be read: Permission denied"):
                owner_of(tmp_path / SERVICE)


# ── what a plan says ────────────────────────────────────────────────────────────────────────────────────────────────


def configured(text: str, tmp_path: Path, **given: object) -> LoadedConfig:
    path = tmp_path / "c.toml"
    path.write_text(text)
    return load_config(Sources((path,), given={name.replace("__", "."): value for name, value in given.items()}))


def test_memory_is_from_the_model_unless_it_is_configured(tmp_path: Path, tiny_path: TinyMaker, program: Path) -> None:
    request = InstallRequest(user=True, command=program)
    text = f"[model]\nname = '{tiny_path()}'\n"
    small = plan_units(request, configured(text, tmp_path))
    large = plan_units(request, configured(text + "ctx = 2000000\n", tmp_path))
    told = plan_units(request, configured(text + "[service]\nmemory_max_mib = 77\n", tmp_path))
    assert small.notes == ()
    assert 512 < small.plan.memory_max_mib < 1024
    assert small.plan.memory_max_mib % 64 == 0
    assert large.plan.memory_max_mib > small.plan.memory_max_mib + 64
    assert told.plan.memory_max_mib == 77


def test_a_model_that_is_not_there_yet_is_a_warning(tmp_path: Path, program: Path) -> None:
    planned = plan_units(InstallRequest(user=True, command=program), configured("[model]\nname = 'none'\n", tmp_path))
    assert planned.plan.memory_max_mib == 0
    assert planned.notes == (
        "the service cannot start yet: no model is named 'none'",
        "MemoryMax= is left out: what the model needs is not known",
    )


def test_a_model_by_name_is_found_by_the_service_too(tmp_path: Path, tiny_path: TinyMaker, program: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "mine.gguf").symlink_to(tiny_path())
    loaded = configured("[model]\nname = 'mine'\n", tmp_path)
    plan = plan_units(InstallRequest(user=True, command=program), loaded).plan
    assert plan.environment == {"EDGE_RUNTIME_MODELS": str(tmp_path / "models")}


def test_a_board_that_was_asked_for_is_the_services_too(tmp_path: Path, program: Path) -> None:
    request = InstallRequest(user=True, command=program)
    asked = plan_units(request, configured("", tmp_path, device__profile="pi5")).plan
    assert asked.environment == {"EDGE_RUNTIME_DEVICE": "pi5"}
    assert "raspberry-pi-pmic" in asked.sensors
    assert plan_units(request, configured("[device]\nprofile = 'pi5'\n", tmp_path)).plan.environment == {}


def test_a_missing_key_is_a_warning(tmp_path: Path, program: Path) -> None:
    loaded = configured(f"[server]\napi_key_file = '{tmp_path}/none'\n", tmp_path)
    notes = plan_units(InstallRequest(user=True, command=program), loaded).notes
    assert f"the service cannot start yet: there is no API key in {tmp_path}/none" in notes


@pytest.mark.parametrize(
    ("text", "allowed", "problem"),
    [
        ("", ("10.0.0.0/8",), "--allow means nothing where only this machine can ask: 127.0.0.1"),
        ("[server]\nhost = '0.0.0.0'\n", ("pi",), "'pi' is no network"),
        ("[model]\npack = 'none'\n", (), "no exit pack is named 'none'"),
    ],
)
def test_what_cannot_be_a_service_is_refused(
    tmp_path: Path, program: Path, text: str, allowed: tuple[str, ...], problem: str
) -> None:
    with pytest.raises(EdgeError, match=problem):
        plan_units(InstallRequest(user=True, command=program, allowed=allowed), configured(text, tmp_path))


def test_a_program_that_is_none_is_refused(tmp_path: Path, program: Path) -> None:
    loaded = configured("", tmp_path)
    for command, problem in (
        (Path("edge-run"), "is no whole path"),
        (tmp_path / "none", "cannot be started: No such file"),
        (tmp_path, "is no program"),
    ):
        with pytest.raises(UsageError, match=problem):
            plan_units(InstallRequest(user=True, command=command), loaded)
    program.chmod(0o644)
    with pytest.raises(UsageError, match="is no program"):
        plan_units(InstallRequest(user=True, command=program), loaded)


def test_an_environment_in_a_home_is_bound_and_nothing_else_of_it(image: Path, tmp_path: Path) -> None:
    venv = image / "home/ada/my venv"
    (venv / "bin").mkdir(parents=True)
    (image / "opt/edge/bin/edge-run").rename(venv / "bin/edge-run")
    (image / "home/ada").chmod(0o700)
    loaded = configured("[model]\nname = '/home/ada/models/a.gguf'\n", tmp_path)
    request = InstallRequest(user=False, root=image, command=Path("/home/ada/my venv/bin/edge-run"))
    assert plan_units(request, loaded).plan.bound == (Path("/home/ada/my venv"),)
    venv.chmod(0o700)
    with pytest.raises(UsageError, match=r"the service's own user may not read .*my venv\n.*chmod o\+rX"):
        plan_units(request, loaded)


@pytest.mark.parametrize(
    ("folder", "problem"), [("tmp/venv", "it has a /tmp of its own"), ("home", "cannot have all of /home")]
)
def test_an_environment_that_a_service_cannot_see_is_refused(
    image: Path, tmp_path: Path, folder: str, problem: str
) -> None:
    (image / folder / "bin").mkdir(parents=True)
    (image / "opt/edge/bin/edge-run").rename(image / folder / "bin/edge-run")
    request = InstallRequest(user=False, root=image, command=Path("/") / folder / "bin/edge-run")
    with pytest.raises(UsageError, match=problem):
        plan_units(request, configured("", tmp_path))


def test_the_first_closed_door_is_found(tmp_path: Path) -> None:
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    file = inner / "file"
    file.write_text("")
    tmp_path.chmod(0o755)
    assert first_closed(file, [], tmp_path) is None
    tmp_path.chmod(0o700)
    assert first_closed(file, [], tmp_path) == tmp_path
    bound = [tmp_path / "a"]  # systemd makes the way to it
    assert first_closed(file, bound, tmp_path) is None
    file.chmod(0o640)
    assert first_closed(file, bound, tmp_path) == file
    inner.chmod(0o750)
    assert first_closed(file, bound, tmp_path) == inner
    assert first_closed(file, [file], tmp_path) == file
    assert first_closed(inner / "none" / "x", [inner / "none"], tmp_path) is None


# ── install ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_install_writes_and_says_what_is_next(
    systemd: FakeSystemd, tmp_path: Path, folder: Path, program: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install(Install(user=True, command=program), systemd.manager(tmp_path, user=True))
    out, err = capsys.readouterr()
    assert out == f"{folder / SERVICE}\n"
    assert owner_of(folder / SERVICE) is Owner.OURS
    assert f"ExecStart={program} serve" in (folder / SERVICE).read_text().splitlines()
    assert "next: systemctl --user enable --now edge-runtime.service" in err
    assert "loginctl enable-linger" in err
    assert systemd.commands[-1] == "--user daemon-reload"


def test_install_now_starts_it(systemd: FakeSystemd, tmp_path: Path, program: Path) -> None:
    install(Install(user=True, command=program, now=True, socket=True), systemd.manager(tmp_path, user=True))
    assert systemd.commands[-4:] == [
        "--user daemon-reload",
        "--user enable edge-runtime.service edge-runtime.socket",
        "--user reset-failed edge-runtime.service edge-runtime.socket",
        "--user restart --no-block edge-runtime.service edge-runtime.socket",
    ]


def test_the_unit_is_for_the_version_of_systemd(
    systemd: FakeSystemd, tmp_path: Path, folder: Path, program: Path
) -> None:
    systemd.version = 255
    install(Install(user=True, command=program), systemd.manager(tmp_path, user=True))
    assert "Type=notify-reload" in (folder / SERVICE).read_text()


def test_a_refusal_of_systemd_is_shown(systemd: FakeSystemd, tmp_path: Path, program: Path) -> None:
    systemd.answers["enable"] = Done(1, "", "Failed to enable unit: Unit is masked.\nmore\n")
    with pytest.raises(EdgeError, match=r"`systemctl --user enable edge-runtime\.service` failed: Failed to enable"):
        install(Install(user=True, command=program, now=True), systemd.manager(tmp_path, user=True))


def test_without_systemd_nothing_is_written(
    systemd: FakeSystemd, tmp_path: Path, folder: Path, program: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manager = systemd.manager(tmp_path, user=True, running=False)
    with pytest.raises(EdgeError, match="systemd is not running here"):
        install(Install(user=True, command=program), manager)
    assert not folder.exists()
    install(Install(user=True, command=program, dry_run=True), manager)
    assert capsys.readouterr().out.startswith(f"# {folder / SERVICE}\n[Unit]\n")
    assert not folder.exists()


def test_an_image_gets_units_without_a_running_systemd(image: Path, run: RunCli) -> None:
    arguments = ("--system", "--root", image, "--exec", "/opt/edge/bin/edge-run", "--device", "pi5", "--socket")
    config = image / "etc/edge-runtime/config.toml"
    config.parent.mkdir(parents=True)
    config.write_text("[server]\nport = 9090\napi_key_file = './api-key'\n[service]\nmemory_max_mib = 700\n")
    result = run("service", "install", *arguments)
    assert_clean(result, 0)
    units = image / "etc/systemd/system"
    assert set(result.out.splitlines()) == {str(units / name) for name in ALL}
    text = (units / SERVICE).read_text()
    assert "ExecStart=/opt/edge/bin/edge-run serve" in text
    assert "LoadCredential=api-key:/etc/edge-runtime/api-key" in text
    assert "Environment=EDGE_RUNTIME_DEVICE=pi5" in text
    assert "MemoryMax=700M" in text
    assert "Type=notify\n" in text
    assert "ListenStream=127.0.0.1:9090" in (units / SOCKET).read_text()
    assert f"systemctl --root={image} enable edge-runtime.service edge-runtime.socket" in result.err
    removed = run("service", "uninstall", "--system", "--root", image)
    assert_clean(removed, 0)
    assert set(removed.out.splitlines()) == set(result.out.splitlines())
    assert os.listdir(units) == []


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--now", "--dry-run"), "--now starts a service, and --dry-run installs none here"),
        (("--now", "--root", "/"), "--now starts a service, and --root installs none here"),
        (("--root", "nowhere"), "--root nowhere is not the whole path of a folder"),
        (("--user", "--allow", "10.0.0.0/8"), "a user's service cannot filter networks"),
        (("--dry-run", "--device", "pi6"), "device.profile from the command line: unknown device 'pi6'"),
    ],
)
def test_options_that_do_not_go_together_are_refused(run: RunCli, arguments: tuple[str, ...], problem: str) -> None:
    result = run("service", "install", *arguments)
    assert_clean(result, 2)
    assert problem in result.err


def test_the_service_is_of_this_environment(run: RunCli, program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "prefix", str(program.parent.parent))
    result = run("service", "install", "--user", "--dry-run")
    assert_clean(result, 0)
    assert f"ExecStart={program} serve" in result.out


def test_a_users_variables_are_not_the_services(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, program: Path) -> None:
    monkeypatch.setenv("EDGE_RUNTIME_PORT", "9999")
    for user in (False, True):
        request = Install(user=user, command=program)
        assert service_cli.service_config(request, os.environ).config.server.port == 8080


def test_units_are_where_systemd_looks(tmp_path: Path) -> None:
    assert unit_folder(False, None, {}) == Path("/etc/systemd/system")
    assert unit_folder(True, None, {"HOME": "/h"}) == Path("/h/.config/systemd/user")
    assert unit_folder(True, tmp_path, {}) == tmp_path / "etc/systemd/user"
    with pytest.raises(UsageError, match=r"\$HOME is not set"):
        unit_folder(True, None, {})


# ── uninstall ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_uninstall_removes_what_install_wrote_and_no_more(
    systemd: FakeSystemd, tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manager = systemd.manager(tmp_path, user=True)
    write_units(folder, ALL, force=False)
    mine = folder / f"{SERVICE}.d" / "override.conf"
    mine.write_text("[Service]\n")
    uninstall(manager, root=None, force=False, dry_run=True)
    assert len(list(folder.rglob("*.*"))) == 5
    assert not any("disable" in command for command in systemd.commands)
    uninstall(manager, root=None, force=False, dry_run=False)
    assert [path for path in folder.rglob("*") if path.is_file()] == [mine]
    told = [str(folder / name) for name in ALL]
    assert capsys.readouterr().out.splitlines() == told * 2
    assert "--user disable --now edge-runtime.service edge-runtime.socket" in systemd.commands
    assert systemd.commands[-1] == "--user daemon-reload"
    with pytest.raises(EdgeError, match="there is nothing in"):
        uninstall(manager, root=None, force=False, dry_run=False)


def test_an_edited_unit_is_not_removed_unless_forced(systemd: FakeSystemd, tmp_path: Path, folder: Path) -> None:
    manager = systemd.manager(tmp_path, user=True)
    write_units(folder, ALL, force=False)
    (folder / SOCKET).write_text((folder / SOCKET).read_text() + "# mine\n")
    with pytest.raises(UsageError, match="was edited by hand"):
        uninstall(manager, root=None, force=False, dry_run=False)
    assert owner_of(folder / SERVICE) is Owner.OURS
    assert not any("disable" in command for command in systemd.commands)  # it still runs
    uninstall(manager, root=None, force=True, dry_run=False)
    assert list(folder.iterdir()) == []


# ── status ──────────────────────────────────────────────────────────────────────────────────────────────────────────

SHOWN = """LoadState=loaded
ActiveState=active
SubState=running
Result=success
UnitFileState=enabled
StatusText=ready: smollm2-135m, 2 of 4 conversations = half
MainPID=4711
ExecMainStatus=0
NRestarts=1
ActiveEnterTimestamp=Sat 2026-11-21 19:00:00 UTC
WatchdogUSec=3min
WatchdogTimestamp=Sat 2026-11-21 19:01:30 UTC
MemoryCurrent=314572800
MemoryPeak=419430400
MemoryMax=939524096
NeedDaemonReload=yes
"""


def test_status_shows_what_systemd_knows(
    systemd: FakeSystemd, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    systemd.answers["show"] = Done(0, SHOWN, "")
    assert status(systemd.manager(tmp_path), as_json=False)
    assert capsys.readouterr().out.splitlines() == [
        "state: active (running) since Sat 2026-11-21 19:00:00 UTC, enabled",
        "says: ready: smollm2-135m, 2 of 4 conversations = half",
        "process: 4711",
        "watchdog: within 180 s, heard Sat 2026-11-21 19:01:30 UTC",
        "memory: 300 MiB, at most 400 MiB, limit 896 MiB",
        "last end: success, exit code 0; restarted 1 times",
        "its unit has changed since systemd read it: systemctl daemon-reload",
    ]
    assert status(systemd.manager(tmp_path), as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert (found["active"], found["memory_bytes"], found["watchdog_s"]) == (True, 314572800, 180)


def test_a_service_that_failed_says_how(
    systemd: FakeSystemd, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "LoadState=loaded\nActiveState=failed\nSubState=failed\nResult=watchdog\nMainPID=0\nExecMainStatus=6\n"
    systemd.answers["show"] = Done(0, f"{text}MemoryCurrent=18446744073709551615\nMemoryMax=infinity\n", "")
    assert not status(systemd.manager(tmp_path), as_json=False)
    assert capsys.readouterr().out.splitlines() == [
        "state: failed (failed), not enabled",
        "last end: watchdog, exit code 6; restarted 0 times",
        "its log: sudo journalctl -u edge-runtime.service",
        "once that is mended: sudo systemctl reset-failed 'edge-runtime.*' && "
        "sudo systemctl start edge-runtime.service",
    ]
    status(systemd.manager(tmp_path, user=True), as_json=False)
    assert capsys.readouterr().out.splitlines()[2:] == [
        "its log: journalctl --user -u edge-runtime.service",
        "once that is mended: systemctl --user reset-failed 'edge-runtime.*' && "
        "systemctl --user start edge-runtime.service",
    ]


def test_earlier_failures_do_not_hinder_a_new_start(systemd: FakeSystemd, tmp_path: Path, program: Path) -> None:
    systemd.answers["reset-failed"] = Done(1, "", "Unit edge-runtime.service not loaded.\n")
    install(Install(user=True, command=program, now=True), systemd.manager(tmp_path, user=True))
    assert systemd.commands[-1] == "--user restart --no-block edge-runtime.service"


def test_what_is_not_there_is_said(systemd: FakeSystemd, tmp_path: Path) -> None:
    systemd.answers["show"] = Done(0, "LoadState=not-found\nActiveState=inactive\n", "")
    with pytest.raises(EdgeError, match=r"edge-runtime\.service is not installed\nhint: .*install --system"):
        status(systemd.manager(tmp_path), as_json=False)
    systemd.answers["show"] = Done(1, "", "Failed to connect to bus: No medium found\n")
    with pytest.raises(EdgeError, match="your own systemd is not running here"):
        status(systemd.manager(tmp_path, user=True), as_json=False)
    with pytest.raises(EdgeError, match="systemd does not answer: Failed to connect to bus"):
        status(systemd.manager(tmp_path), as_json=False)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("3min", 180), ("1min 30s", 90), ("500ms", 0.5), ("0", None), ("infinity", None), ("", None), ("1..s", None)],
)
def test_spans_of_time(text: str, seconds: float | None) -> None:
    assert parse_status(f"WatchdogUSec={text}\n").watchdog_s == seconds


def test_a_status_is_harmless_and_any_answer_is_read() -> None:
    found = parse_status("garbage\n\nStatusText=a=b\nMainPID=x\nNRestarts=٣\n")
    assert (found.installed, found.status, found.pid, found.restarts) == (False, "a=b", None, None)
    assert status_lines(dataclasses.replace(found, status="\x1b[31m"))[1] == "says: \x1b[31m"


def test_the_exit_code_says_whether_it_runs(run: RunCli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    systemd = FakeSystemd(answers={"show": Done(0, SHOWN.replace("=active", "=inactive"), "")})
    monkeypatch.setattr(service_cli, "_manager", lambda user: systemd.manager(tmp_path, user=user))
    assert run("service", "status", "--system").code == 3
    systemd.answers["show"] = Done(0, SHOWN.replace("StatusText=", "StatusText=\x1b[31m"), "")
    result = run("service", "status")
    assert_clean(result, 0)
    assert "\x1b" not in result.out


def test_a_machine_without_systemctl_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EdgeError, match="systemctl is not there"):
        Systemctl(user=False).version()


def test_the_version_of_systemd_is_told_or_not(systemd: FakeSystemd, tmp_path: Path) -> None:
    assert systemd.manager(tmp_path).version() == 252
    assert Systemctl(user=False, run=lambda _command: Done(0, "busybox", "")).version() is None
    plan = plan_units(
        InstallRequest(user=True, command=Path("/bin/true"), systemd=OLDEST_SYSTEMD), configured("", tmp_path)
    ).plan
    assert "Type=notify\n" in unit_files(plan)[SERVICE]


@pytest.mark.parametrize("verb", ["install", "uninstall", "status"])
def test_help_has_examples(run: RunCli, verb: str) -> None:
    assert f"edge-run service {verb}" in run("service", verb, "--help").out.partition("Examples:")[2]
