"""The patch set, the device profiles and the native build's key; `scripts/patches check` as a whole."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "scripts"
sys.path.insert(0, str(SCRIPTS))  # the scripts are no package: they must run before anything is installed

import _devices  # noqa: E402
import _native_build  # noqa: E402
import _patchset  # noqa: E402
import _upstream  # noqa: E402
from _upstream import BuildError  # noqa: E402

PIN = _upstream.load_pin()
TOOLS = _native_build.Tools("cmake", "cc", "c++", "c++ 12.2", "Ninja")
OLD, NEW = "one\ntwo\nthree\nfour\n", "one\ntwo\n2.5\nthree\nfour\n"
HEADER = (
    f"Subject: a test\nDescription: because,\n and so on\nForwarded: no\nLast-Update: 2026-01-31\n"
    f"X-Upstream-Base: {PIN.base}\nX-Remove-When: never\n"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of patches/ to spoil."""
    return Path(shutil.copytree(_upstream.PATCHES, tmp_path / "patches"))


def small_patch(header: str = HEADER) -> _patchset.Patch:
    return _patchset.Patch("small.patch", header, _patchset.diff_text("src/a.cpp", OLD, NEW))


def script(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPTS / name), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


# ---------------------------------------------------------------- the patch set as it is


def test_everything_holds_together() -> None:
    done = script("patches", "check")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ok: ") == 11


# ---------------------------------------------------------------- series and headers


def test_series_must_name_every_file(folder: Path) -> None:
    (folder / "stray.patch").write_text(small_patch().text)
    with pytest.raises(BuildError, match=r"stray\.patch — a patch file that series does not name"):
        _patchset.load_series(folder)


def test_series_must_not_name_a_missing_file(folder: Path) -> None:
    (folder / "layer-range.patch").unlink()
    with pytest.raises(BuildError, match=r"layer-range\.patch — named in series"):
        _patchset.load_series(folder)


def test_header_is_read_with_continued_lines() -> None:
    patch = _patchset.parse("small.patch", small_patch().text)
    assert patch == small_patch()
    assert patch.fields["Description"] == "because, and so on"
    _patchset.check_header(patch, PIN.base)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("Forwarded: no", "Forwarded:", "Forwarded is missing"),
        ("Forwarded: no", "Forwardet: no", "Forwarded is missing"),
        ("Subject: a test", "Subject: a test\nForward: no", "nearest one is Forwarded"),
        ("2026-01-31", "yesterday", "not a date"),
        (PIN.version, "0.0.1", "another source"),
    ],
)
def test_bad_headers_are_errors(before: str, after: str, message: str) -> None:
    with pytest.raises(BuildError, match=message):
        _patchset.check_header(small_patch(HEADER.replace(before, after)), PIN.base)


def test_public_headers_are_out_of_bounds() -> None:
    patch = replace(small_patch(), diff=_patchset.diff_text("include/llama.h", OLD, NEW))
    with pytest.raises(BuildError, match="public header"):
        _patchset.check_header(patch, PIN.base)


def test_patch_applies_exactly_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "src" / "a.cpp"
    file.parent.mkdir()
    file.write_text(OLD)
    _patchset.apply_patch(small_patch(), tmp_path)
    assert file.read_text() == NEW
    file.write_text(OLD.replace("two", "zwei"))  # patch would take this with fuzz 1
    with pytest.raises(BuildError, match=r"small\.patch does not apply"):
        _patchset.apply_patch(small_patch(), tmp_path)


def test_loop_starts_are_counted_apart() -> None:
    old = "a\n    for (int il = 0; il < n_layer; ++il) {\nb\n"
    diff = _patchset.diff_text("src/models/x.cpp", old, old.replace("il = 0", "il = il_start") + "c\n")
    patch = replace(small_patch(), diff=diff)
    assert (patch.loop_starts, patch.added_removed) == (1, (1, 0))


# ---------------------------------------------------------------- the build's key


def recipe(folder: Path, variant: str = _native_build.EDGE) -> _native_build.Recipe:
    return _native_build.make_recipe(variant, _devices.load_device("generic"), TOOLS, PIN, folder)


def test_key_changes_with_every_input(folder: Path) -> None:
    base = recipe(folder)
    others = [
        recipe(folder, _native_build.STOCK),
        replace(base, pin=replace(PIN, version="9.9.9")),
        replace(base, pin=replace(PIN, sha256="0" * 64)),
        replace(base, device=replace(base.device, cmake={**base.device.cmake, "GGML_AVX": "ON"})),
        replace(base, compiler="c++ 13.1"),
        replace(base, cpu="another processor"),
        replace(base, environment={"CXXFLAGS": "-O1"}),
    ]
    with (folder / "edge-slice.cpp").open("a") as file:
        file.write("// changed\n")
    others.append(recipe(folder))
    with (folder / "layer-range.patch").open("a") as file:
        file.write(" \n")
    others.append(recipe(folder))
    keys = [base.key, *(other.key for other in others)]
    assert len(set(keys)) == len(keys)


def test_stock_does_not_depend_on_patches(folder: Path) -> None:
    before = recipe(folder, _native_build.STOCK).key
    (folder / "edge-slice.cpp").write_text("")
    assert recipe(folder, _native_build.STOCK).key == before


def test_only_native_builds_depend_on_the_processor() -> None:
    native = _native_build.make_recipe(_native_build.STOCK, _devices.load_device("native"), TOOLS, PIN)
    assert native.cpu == _native_build.processor() != ""
    assert recipe(_upstream.PATCHES).cpu == ""


# ---------------------------------------------------------------- fetching and installing


def test_a_source_with_another_sha256_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_RUNTIME_CACHE", str(tmp_path))

    def foreign(pin: _upstream.Pin, folder: Path) -> None:
        (folder / pin.sdist).write_bytes(b"something else")

    with pytest.raises(BuildError, match="is not the pinned file — sha256 is"):
        _upstream.fetch_sdist(PIN, foreign)
    assert list((tmp_path / "sdist").iterdir()) == []


def test_a_damaged_source_is_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_RUNTIME_CACHE", str(tmp_path))
    (tmp_path / "sdist").mkdir()
    (tmp_path / "sdist" / PIN.sdist).write_bytes(b"cut sho")
    good = replace(PIN, sha256="770e607624d689265ca6c44884d0807d9b054d23c473c106c72be9de08b7376c")

    def whole(pin: _upstream.Pin, folder: Path) -> None:
        (folder / pin.sdist).write_bytes(b"good")

    assert _upstream.fetch_sdist(good, whole).read_bytes() == b"good"


def library(folder: Path, key: str) -> Path:
    folder.mkdir()
    (folder / "libllama.so").write_text(key)
    (folder / "manifest.json").write_text(f'{{"key": "{key}", "files": ["libllama.so"]}}')
    return folder


def test_install_replaces_ours_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_RUNTIME_CACHE", str(tmp_path / "cache"))
    first, second, into = library(tmp_path / "1", "one"), library(tmp_path / "2", "two"), tmp_path / "lib"
    assert _native_build.install(first, into)
    assert not _native_build.install(first, into)
    assert _native_build.install(second, into)
    assert (into / "libllama.so").read_text() == "two"

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(BuildError, match="not ours"):
        _native_build.install(first, tmp_path / "mine")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2", "cache", "lib", "mine"]


def test_a_library_that_lacks_a_file_is_not_complete(tmp_path: Path) -> None:
    folder = library(tmp_path / "1", "one")
    assert _native_build.read_manifest(folder)["key"] == "one"
    (folder / "libllama.so").unlink()
    assert _native_build.read_manifest(folder) == {}


# ---------------------------------------------------------------- what the user sees


@pytest.mark.parametrize(
    ("missing", "named"), [("c++ g++ clang++", "C++ compiler"), ("cmake", "cmake"), ("patch", "patch")]
)
def test_a_missing_tool_is_named(tmp_path: Path, missing: str, named: str) -> None:
    for tool in {"c++", "cc", "cmake", "make", "patch"} - set(missing.split()):
        (tmp_path / tool).symlink_to(shutil.which(tool) or "/bin/false")
    done = script("build_llama", PATH=str(tmp_path), CXX="", CC="")
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: cannot build llama.cpp — no {named} on PATH\nhint: ")
    assert "Traceback" not in done.stderr


def test_an_unknown_device_names_the_nearest() -> None:
    done = script("build_llama", "--device", "pi-5")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.endswith("hint: did you mean 'pi5'?\n")


def test_a_bad_option_is_a_usage_error() -> None:
    assert script("build_llama", "--stock", "--into", "x").returncode == 2
    assert script("build_llama", "--jobs", "0").returncode == 2


# ---------------------------------------------------------------- device profiles


@pytest.mark.parametrize("name", _devices.device_names())
def test_every_device_file_is_valid(name: str) -> None:
    device = _devices.load_device(name)
    assert device.description
    assert "GGML_NATIVE" in device.cmake


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('name = "x"\n[power]\nstatic = 1', "unknown key 'static' in .power. of x.toml; known: .*\n.*'static_w'"),
        ('name = "x"\n[build.cmake]\nAVX2 = true', "bad CMake name 'AVX2'"),
        ('name = "x"\n[build.cmake]\nGGML_AVX = 1.5', "GGML_AVX in .build.cmake. of x.toml: 1.5 is neither"),
        ("name =", "x.toml is not valid TOML: line 1, column 7"),
    ],
)
def test_a_bad_profile_stops_a_build_with_its_own_error(tmp_path: Path, text: str, message: str) -> None:
    """One schema serves build and runtime; tests/test_profiles.py has the rest of it."""
    (tmp_path / "x.toml").write_text(text)
    with pytest.raises(BuildError) as caught:
        _devices.load_device("x", tmp_path)
    assert re.search(message, str(caught.value))


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 needs tomli")
def test_profiles_are_read_before_anything_is_installed(tmp_path: Path) -> None:
    """A Python that sees no installed package lists the devices of a bare source tree."""
    for part in ("scripts", "devices", "edge_runtime"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("lib", "packs", "__pycache__"))
    (tmp_path / "devices" / "new-board.toml").write_text('name = "new-board"')
    command = [sys.executable, "-S", "-E", str(tmp_path / "scripts" / "build_llama"), "--list-devices"]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    names = [line.split()[0] for line in done.stdout.splitlines()]
    assert names == sorted([*_devices.device_names(), "new-board"])


def test_a_board_is_not_built_for_on_another_machine() -> None:
    with pytest.raises(BuildError, match="it is for aarch64, this machine is Linux x86_64"):
        _devices.check_host(_devices.load_device("pi5"), "Linux", "x86_64")
    _devices.check_host(_devices.load_device("pi5"), "Linux", "aarch64")
