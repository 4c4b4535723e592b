"""Where a configuration comes from, which source wins, and what is said of mistakes."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.config import BY_NAME, KEYS, Config, Place, plain, values_of
from edge_runtime.config_cli import config_lines
from edge_runtime.config_load import (
    OTHER_VARIABLES,
    LoadedConfig,
    Sources,
    is_loopback,
    load_config,
    read_api_key,
    reload_config,
    standard_files,
)
from edge_runtime.errors import UsageError
from edge_runtime.native import KvType
from edge_runtime.types import Mode

PACKAGE = Path(__file__).parent.parent / "edge_runtime"


@dataclasses.dataclass(frozen=True)
class Board:
    """A machine whose device tree names a board."""

    compatible: str = ""

    def text(self, path: str) -> str | None:
        return self.compatible or None if path == "proc/device-tree/compatible" else None


PI5 = Board("raspberrypi,5-model-b\0brcm,bcm2712")


def load(
    *files: Path,
    environment: Mapping[str, str] | None = None,
    given: Mapping[str, Any] | None = None,
    machine: Board | None = None,
    folder: Path = Path("/here"),
) -> LoadedConfig:
    sources = Sources(files, environment or {}, given or {}, folder, machine or Board(), "Linux", "aarch64")
    return load_config(sources)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "config.toml"


# ── which source wins ───────────────────────────────────────────────────────────────────────────────────────────────


def test_the_defaults_are_local_and_modest() -> None:
    loaded = load()
    assert loaded.config.server.host == "127.0.0.1"
    assert loaded.config.server.api_key_file is None
    assert loaded.config.server.cors_origins == ()
    assert loaded.config.model.mode == "auto"
    assert loaded.warnings == ()
    assert loaded.origins["server.port"] == "default"


def test_each_source_beats_the_one_before(tmp_path: Path) -> None:
    system, user = tmp_path / "etc.toml", tmp_path / "user.toml"
    threads = [load(machine=PI5)]
    system.write_text("[model]\nthreads = 3\n")
    threads.append(load(system, machine=PI5))
    user.write_text("[model]\nthreads = 5\n")
    threads.append(load(system, user, machine=PI5))
    environment = {"EDGE_RUNTIME_THREADS": "6"}
    threads.append(load(system, user, environment=environment, machine=PI5))
    threads.append(load(system, user, environment=environment, given={"model.threads": 7}, machine=PI5))
    threads.append(load(system, user, environment=environment, given={"model.threads": None}, machine=PI5))
    assert [found.config.model.threads for found in threads] == [4, 3, 5, 6, 7, 6]
    assert [found.origins["model.threads"] for found in threads] == [
        "device profile pi5",
        str(system),
        str(user),
        "$EDGE_RUNTIME_THREADS",
        "the command line",
        "$EDGE_RUNTIME_THREADS",
    ]


def test_a_later_file_leaves_the_other_keys_of_a_table(tmp_path: Path) -> None:
    system, user = tmp_path / "etc.toml", tmp_path / "user.toml"
    system.write_text("[server]\nport = 81\nhost = '::1'\n")
    user.write_text("[server]\nport = 82\n")
    server = load(system, user).config.server
    assert (server.host, server.port) == ("::1", 82)


def test_the_board_gives_the_targets_that_it_states() -> None:
    loaded = load(machine=PI5)
    device = loaded.config.device
    assert (device.profile, device.power_cap_w, device.temp_ceiling_c) == ("pi5", None, 76)
    assert loaded.origins["device.temp_ceiling_c"] == "device profile pi5, target balanced"
    assert loaded.origins["device.profile"].startswith("detected: the device tree names raspberrypi,5")


def test_another_target_of_the_board_has_other_values(file: Path) -> None:
    file.write_text("[device]\ntarget = 'battery'\ntemp_ceiling_c = 60\n")
    device = load(file, machine=PI5).config.device
    assert (device.power_cap_w, device.temp_ceiling_c) == (5.5, 60)


def test_no_target_holds_nothing() -> None:
    device = load(given={"device.target": "none"}, machine=PI5).config.device
    assert (device.power_cap_w, device.temp_ceiling_c) == (None, None)


def test_nothing_can_be_asked_for_over_a_profile_and_a_file(file: Path) -> None:
    file.write_text("[model]\npack = 'smollm2-135m'\n")
    loaded = load(file, given={"model.pack": "", "device.temp_ceiling_c": 0}, machine=PI5)
    assert loaded.config.model.pack is None
    assert loaded.config.device.temp_ceiling_c is None


@pytest.mark.parametrize("name", ["pi4", "native"])
def test_a_board_can_be_named(name: str) -> None:
    loaded = load(environment={"EDGE_RUNTIME_DEVICE": name}, machine=PI5)
    assert loaded.config.device.profile == ("pi4" if name == "pi4" else "pi5")
    assert loaded.origins["device.profile"].startswith("$EDGE_RUNTIME_DEVICE")


def test_a_board_can_be_a_file_beside_the_configuration(file: Path) -> None:
    file.with_name("mine.toml").write_text('name = "mine"\n[runtime]\nn_threads = 9\n')
    file.write_text("[device]\nprofile = './mine.toml'\n")
    loaded = load(file)
    assert loaded.config.model.threads == 9
    assert loaded.config.device.profile == str(file.with_name("mine.toml"))


def test_paths_are_relative_to_where_they_stand(file: Path) -> None:
    file.write_text("[model]\nname = 'models/a.gguf'\n[service]\nstate_dir = '~/state'\n")
    loaded = load(file, environment={"HOME": "/home/ada", "EDGE_RUNTIME_PACK": "./p.gguf"})
    assert loaded.config.model.name == str(file.parent / "models/a.gguf")
    assert loaded.config.model.pack == "/here/p.gguf"
    assert loaded.config.service.state_dir == Path("/home/ada/state")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"STATE_DIRECTORY": "/var/lib/edge-runtime:/var/lib/other", "HOME": "/h"}, "/var/lib/edge-runtime"),
        ({"XDG_STATE_HOME": "/s", "HOME": "/h"}, "/s/edge-runtime"),
        ({"XDG_STATE_HOME": "relative", "HOME": "/h"}, "/h/.local/state/edge-runtime"),
        ({}, "/var/lib/edge-runtime"),
    ],
)
def test_the_state_is_where_the_service_manager_or_the_user_wants_it(
    environment: dict[str, str], expected: str
) -> None:
    assert load(environment=environment).config.service.state_dir == Path(expected)


def test_the_standard_files() -> None:
    system = Path("/etc/edge-runtime/config.toml")
    assert standard_files({}) == (system,)
    assert standard_files({"HOME": "/h"}) == (system, Path("/h/.config/edge-runtime/config.toml"))
    assert standard_files({"HOME": "/h", "XDG_CONFIG_HOME": "/x"}) == (system, Path("/x/edge-runtime/config.toml"))
    assert standard_files({"HOME": "/h", "XDG_CONFIG_HOME": "x"})[1] == Path("/h/.config/edge-runtime/config.toml")


def test_a_file_that_is_not_there_is_passed_over(tmp_path: Path) -> None:
    assert load(tmp_path / "none.toml", tmp_path / "no" / "none.toml").files == ()


def test_lists_come_from_the_environment_too() -> None:
    found = load(environment={"EDGE_RUNTIME_CORS_ORIGINS": "https://a.org, http://localhost:3000"})
    assert found.config.server.cors_origins == ("https://a.org", "http://localhost:3000")


def test_an_empty_variable_is_none() -> None:
    assert load(environment={"EDGE_RUNTIME_PORT": ""}).config.server.port == 8080


# ── mistakes ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[server]\nprot = 1", r"unknown key 'prot' in \[server\] of .*config.toml; known: host.*did you mean 'port'"),
        ("[sever]\nport = 1", r"unknown table 'sever' in .*config.toml; known: .*did you mean 'server'"),
        ("port = 1", r"'port' in .*config.toml stands in no table\nhint: write it below \[server\]"),
        ("server = 1", r"'server' in .*config.toml is not a table\nhint: write \[server\]"),
        ("[server]\nport = '1'", r"port in \[server\] of .*: '1' is not allowed\nhint: allowed: a whole number"),
        ("[server]\nport = 70000", r"70000 is not allowed\nhint: allowed: a whole number from 0 to 65535"),
        ("[server]\nport = true", "True is not allowed"),
        ("[server]\nport = 80.0", "80.0 is not allowed"),
        ("[limits]\ndeadline_s = nan", "nan is not allowed\nhint: allowed: a number from 0.1 to 86400, or 0 for none"),
        ("[limits]\ndeadline_s = inf", "inf is not allowed"),
        ("[limits]\nmax_conversations = 0", "from 1 to 256"),
        ("[model]\nmode = 'fast'", "allowed: auto, full, exit, verified or margin"),
        ("[model]\nname = ' '", "allowed: a name or a path"),
        ('[model]\nname = "a\\nb"', r"'a\\nb' is not allowed"),
        ("[server]\nhost = '300.1.1.1'", "allowed: an address or a host's name"),
        ("[server]\ncors_origins = ['https://a.org/path']", "allowed: a list of origins"),
        ("[server]\ncors_origins = '*'", "allowed: a list of origins"),
        ("[device]\ntarget = 'cold'", "allowed: none, battery, quiet, balanced or fast"),
        ("[device]\nprofile = 'pi55'", r"device.profile from .*config.toml: unknown device 'pi55'.*you mean 'pi5'"),
        ("[service]\nstate_dir = 'state'", "allowed: a path with a /"),
        ("[service]\nstate_dir = '~/state'", r"needs \$HOME, which is not set\nhint: write the whole path"),
        ("[server]\nport == 1", "config.toml is not valid TOML: line 2, column 7"),
        ("[server]\nport = 1\nport = 2", "is not valid TOML: line 3, column"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_its_place_and_what_is_allowed(file: Path, text: str, message: str) -> None:
    file.write_text(text)
    with pytest.raises(UsageError) as caught:
        load(file)
    assert re.search(message, str(caught.value), re.DOTALL), str(caught.value)
    assert caught.value.hint


def test_text_that_is_not_utf8_has_a_place(file: Path) -> None:
    file.write_bytes(b"[server]\nhost = '\xff'\n")
    with pytest.raises(UsageError, match="line 2, column 9: not UTF-8"):
        load(file)


def test_only_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(UsageError, match="is not a file"):
            load(path)


@pytest.mark.parametrize(
    ("variable", "text", "message"),
    [
        ("EDGE_RUNTIME_PROT", "1", "unknown variable \\$EDGE_RUNTIME_PROT in the environment.*'EDGE_RUNTIME_PORT'"),
        ("EDGE_RUNTIME_PORT", "http", "^\\$EDGE_RUNTIME_PORT: 'http' is not allowed.*from 0 to 65535"),
        ("EDGE_RUNTIME_DEADLINE_S", "1e999", "is not allowed"),
        ("EDGE_RUNTIME_MODEL", "a\tb", "is not allowed"),
    ],
)
def test_a_mistake_in_the_environment_is_named(variable: str, text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        load(environment={variable: text})
    assert re.search(message, str(caught.value), re.DOTALL), str(caught.value)


def test_a_mistake_of_the_command_line_is_named() -> None:
    with pytest.raises(UsageError, match="port in the command line: 99999 is not allowed"):
        load(given={"server.port": 99999})
    with pytest.raises(UsageError, match=r"unknown key 'server\.prot' on the command line"):
        load(given={"server.prot": 1})


def test_every_variable_that_the_package_reads_is_known() -> None:
    found = set()
    for path in PACKAGE.rglob("*.py"):
        found |= set(re.findall(r"[\"'](EDGE_RUNTIME_[A-Z_]+[A-Z])[\"'= ]", path.read_text()))
    known = {key.variable for key in KEYS} | set(OTHER_VARIABLES)
    assert found
    assert found <= known


def test_the_environment_of_the_project_is_no_mistake() -> None:
    assert load(environment=dict.fromkeys(OTHER_VARIABLES, "/x")).config.server.port == 8080


# ── secrets ─────────────────────────────────────────────────────────────────────────────────────────────────────────

SECRET = "hunter2-3f9a"


@pytest.mark.parametrize(
    ("text", "environment"),
    [
        (f"[server]\napi_key = '{SECRET}'", {}),
        (f"[server]\napi_key_file = '{SECRET}'", {}),
        ("", {"EDGE_RUNTIME_API_KEY": SECRET}),
        ("", {"EDGE_RUNTIME_API_KEY_FILE": SECRET}),
    ],
)
def test_a_key_in_place_of_its_file_is_refused_and_not_repeated(
    file: Path, text: str, environment: dict[str, str]
) -> None:
    file.write_text(text)
    with pytest.raises(UsageError) as caught:
        load(file, environment=environment)
    assert SECRET not in str(caught.value)
    assert "api_key" in str(caught.value).lower()


def test_the_service_managers_copy_of_the_key_beats_the_file(file: Path, tmp_path: Path) -> None:
    file.write_text("[server]\napi_key_file = '/etc/edge-runtime/api-key'\n")
    environment = {"CREDENTIALS_DIRECTORY": str(tmp_path)}
    assert load(file, environment=environment).config.server.api_key_file == Path("/etc/edge-runtime/api-key")
    (tmp_path / "api-key").write_text(SECRET)
    (tmp_path / "api-key").chmod(0o400)
    loaded = load(file, environment=environment)
    assert loaded.config.server.api_key_file == tmp_path / "api-key"
    assert not any(SECRET in line for line in config_lines(loaded))


def test_a_key_that_others_can_read_is_warned_of(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text(SECRET)
    key.chmod(0o644)
    (warning,) = load(given={"server.api_key_file": str(key)}).warnings
    assert warning == f"others on this machine can read the API key: chmod 600 {key}"
    key.chmod(0o600)
    assert load(given={"server.api_key_file": str(key)}).warnings == ()


def test_an_open_door_is_warned_of() -> None:
    (warning,) = load(given={"server.host": "0.0.0.0"}).warnings
    assert "no server.api_key_file is set" in warning


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("127.1.2.3", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("pi", False)],
)
def test_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_a_key_is_the_one_line_of_its_file(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text(f"{SECRET}\n")
    assert read_api_key(path) == SECRET


@pytest.mark.parametrize("data", [b"", b"\n", b"hunter2 x", b"hunter2\nhunter3", b"hunter2\xff", b"h" * 5000])
def test_a_bad_key_is_refused_and_not_repeated(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "key"
    path.write_bytes(data)
    with pytest.raises(UsageError, match="holds no API key") as caught:
        read_api_key(path)
    assert "hunter2" not in str(caught.value)
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        read_api_key(tmp_path / "none")


# ── again ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_reload_says_what_changed_and_what_needs_a_restart(file: Path) -> None:
    file.write_text("[server]\nport = 81\n[limits]\nmax_tokens = 5\n")
    sources = Sources((file,))
    before = load_config(sources)
    assert reload_config(before, sources).changed == ()
    file.write_text("[server]\nport = 82\n[limits]\nmax_tokens = 6\n")
    again = reload_config(before, sources)
    assert again.error is None
    assert again.changed == ("server.port", "limits.max_tokens")
    assert again.needs_restart == ("server.port",)
    assert again.loaded.config.limits.max_tokens == 6


def test_a_bad_reload_keeps_the_old_one(file: Path) -> None:
    file.write_text("[server]\nport = 81\n")
    sources = Sources((file,))
    before = load_config(sources)
    file.write_text("[server]\nport = ")
    again = reload_config(before, sources)
    assert again.loaded is before
    assert again.changed == ()
    assert "line 2" in str(again.error)


# ── the tree ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_field_has_a_key_and_every_default_is_allowed() -> None:
    fields = {
        f"{table.name}.{field.name}"
        for table in dataclasses.fields(Config)
        for field in dataclasses.fields(getattr(Config(), table.name))
    }
    assert fields == set(BY_NAME)
    for name, value in values_of(Config()).items():
        said = plain(BY_NAME[name], value)
        if name != "service.state_dir":
            assert BY_NAME[name].kind.fits(said), name
            assert BY_NAME[name].kind.held(said, Place(Path("/"))) == value, name


def test_the_choices_are_those_of_the_runtime() -> None:
    assert all(BY_NAME["model.mode"].kind.fits(mode.value) for mode in Mode)
    assert all(BY_NAME["model.kv_type"].kind.fits(kind.value) for kind in KvType)


TEXTS = st.text(st.characters(min_codepoint=32, exclude_categories=["Cs", "Cc"]), min_size=1).filter(
    lambda text: bool(text.strip()) and text.isprintable()
)


@settings(max_examples=40, deadline=None)
@given(
    name=TEXTS.filter(lambda t: not t.startswith("~")),
    port=st.integers(0, 65535),
    deadline=st.floats(0.1, 86400),
    origins=st.lists(st.sampled_from(["*", "https://a.org", "http://[::1]:80"])),
)
def test_what_is_shown_gives_the_same_configuration(
    tmp_path_factory: pytest.TempPathFactory, name: str, port: int, deadline: float, origins: list[str]
) -> None:
    given = {
        "model.name": name,
        "server.port": port,
        "limits.deadline_s": deadline,
        "server.cors_origins": origins,
        "server.api_key_file": "/nowhere/key",
    }
    loaded = load(given=given, machine=PI5)
    path = tmp_path_factory.getbasetemp() / "shown.toml"
    path.write_text("\n".join(config_lines(loaded)), "utf-8")
    assert load(path).config == loaded.config
