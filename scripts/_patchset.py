"""The patch set: series, headers, applying, exporting, statistics, and the table in patches/README.md."""

from __future__ import annotations

import difflib
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from _upstream import PATCHES, BuildError

FIELDS = ("Subject", "Description", "Forwarded", "Last-Update", "X-Upstream-Base", "X-Remove-When")
MAX_CHANGED_LINES = 100  # upstream lines, loop starts apart
LOOP_START = re.compile(r"^[+-]\s*for \(int il = (0|il_start); il < n_layer; \+\+il\) \{$")
OWN_PLACES = {".": "src", "kernels": "ggml/src/ggml-cpu/edge"}
TABLE_START, TABLE_END = "<!-- table: written by `scripts/patches refresh` -->", "<!-- end of table -->"


@dataclass(frozen=True)
class Patch:
    name: str
    header: str
    diff: str

    @property
    def text(self) -> str:
        return f"{self.header}---\n{self.diff}"

    @property
    def fields(self) -> dict[str, str]:
        found: dict[str, str] = {}
        key = ""
        for line in self.header.splitlines():
            if line.startswith(" ") and key:
                found[key] += " " + line.strip()
            else:
                key, _, value = line.partition(":")
                found[key] = value.strip()
        return found

    @property
    def touched(self) -> list[str]:
        return re.findall(r"^\+\+\+ b/(\S+)", self.diff, re.MULTILINE)

    @property
    def changed(self) -> list[str]:
        return [line for line in self.diff.splitlines() if re.match(r"[+-](?!\+\+ b/|-- a/)", line)]

    @property
    def loop_starts(self) -> int:
        return sum(1 for line in self.changed if line.startswith("+") and LOOP_START.match(line))

    @property
    def added_removed(self) -> tuple[int, int]:
        """Changed upstream lines, loop starts apart."""
        lines = [line for line in self.changed if not LOOP_START.match(line)]
        added = sum(1 for line in lines if line.startswith("+"))
        return added, len(lines) - added


def parse(name: str, text: str) -> Patch:
    header, divider, diff = text.partition("\n---\n")
    if not divider or not diff.startswith("--- a/"):
        raise BuildError(
            f"cannot read the patch {name}",
            "no line `---` between header and diff",
            "export it again with `scripts/patches export`",
        )
    return Patch(name, header + "\n", diff)


def load_series(folder: Path = PATCHES) -> list[Patch]:
    """The patches in order; the file `series` and the patch files must name the same set."""
    names = [
        line.strip()
        for line in (folder / "series").read_text(encoding="utf-8").splitlines()
        if line.strip() and not line.startswith("#")
    ]
    present = {path.name for path in folder.glob("*.patch")}
    for name in sorted(set(names) ^ present):
        why = (
            "named in series, but there is no such file" if name in names else "a patch file that series does not name"
        )
        raise BuildError(f"the patch series does not match: {name}", why, f"correct {folder / 'series'}")
    if len(set(names)) != len(names):
        raise BuildError("the patch series names a patch twice", ", ".join(names), f"correct {folder / 'series'}")
    return [parse(name, (folder / name).read_text(encoding="utf-8")) for name in names]


def check_header(patch: Patch, base: str) -> None:
    hint = "see the rules in patches/README.md"
    for field in FIELDS:
        if not patch.fields.get(field):
            raise BuildError(f"{patch.name} has an incomplete header", f"the field {field} is missing or empty", hint)
    for field in patch.fields:
        if field not in FIELDS:
            near = difflib.get_close_matches(field, FIELDS, 1, 0.0)[0]
            raise BuildError(f"{patch.name} has an unknown header field {field!r}", f"the nearest one is {near}", hint)
    if not re.fullmatch(r"\d{4}-\d\d-\d\d", patch.fields["Last-Update"]):
        raise BuildError(f"{patch.name} has a bad Last-Update", "not a date like 2026-01-31", hint)
    if patch.fields["X-Upstream-Base"] != base:
        raise BuildError(
            f"{patch.name} is for another source", f"X-Upstream-Base is not {base!r}", "run `scripts/patches refresh`"
        )
    for path in patch.touched:
        if path.startswith(("include/", "ggml/include/")):
            raise BuildError(
                f"{patch.name} changes the public header {path}",
                "bindings mirror public structs by hand, so these must stay as they are",
                "put it into edge-slice.h",
            )


def own_sources(folder: Path = PATCHES) -> dict[str, Path]:
    """Our C++ files, which stand beside the patches, by the place that they are copied to in the source tree."""
    return {
        f"{place}/{path.name}": path
        for part, place in OWN_PLACES.items()
        for path in sorted((folder / part).glob("*"))
        if path.suffix in (".cpp", ".h", ".cmake")
    }


def abi_version(folder: Path = PATCHES) -> int:
    found = re.search(r"#define EDGE_ABI_VERSION (\d+)", (folder / "edge-slice.h").read_text(encoding="utf-8"))
    if not found:
        raise BuildError("edge-slice.h has no ABI version", "no line `#define EDGE_ABI_VERSION N`", "restore the line")
    return int(found[1])


def copy_own_sources(tree: Path, folder: Path = PATCHES) -> None:
    for place, path in own_sources(folder).items():
        (tree / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tree / place)


def apply_patch(patch: Patch, tree: Path, fuzz: int = 0) -> None:
    try:
        done = subprocess.run(
            ["patch", "-p1", f"-F{fuzz}", "-N", "-s"],
            cwd=tree,
            input=patch.diff,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
    except FileNotFoundError:
        raise BuildError(
            "cannot apply the patches",
            "the program patch is missing",
            "apt-get install patch (or your system's package of that name)",
        ) from None
    if done.returncode != 0:
        raise BuildError(
            f"{patch.name} does not apply",
            " ".join(done.stdout.split()) or "patch failed",
            "the source is not the pinned one, or the patch needs `scripts/patches refresh`",
        )


def apply_series(tree: Path, patches: list[Patch]) -> None:
    copy_own_sources(tree)
    for patch in patches:
        apply_patch(patch, tree)


def diff_text(path: str, before: str, after: str) -> str:
    """One line of context: enough to apply without fuzz on a pinned source, little to break on the next one."""
    if not (before.endswith("\n") and after.endswith("\n")):
        raise BuildError(f"cannot export {path}", "the file does not end with a newline", "end it with one")
    lines = difflib.unified_diff(before.splitlines(True), after.splitlines(True), f"a/{path}", f"b/{path}", n=1)
    return "".join(lines)


def reapply(tree: Path, patches: list[Patch], fuzz: int = 0) -> list[Patch]:
    """Applies the patches one by one and exports each again."""
    copy_own_sources(tree)
    exported = []
    for patch in patches:
        paths = sorted(patch.touched)
        before = {path: (tree / path).read_text(encoding="utf-8") for path in paths if (tree / path).exists()}
        apply_patch(patch, tree, fuzz)
        diffs = [diff_text(path, before[path], (tree / path).read_text(encoding="utf-8")) for path in paths]
        exported.append(Patch(patch.name, patch.header, "".join(diffs)))
    return exported


def changed_lines(patches: list[Patch]) -> int:
    return sum(sum(patch.added_removed) for patch in patches)


def table(patches: list[Patch]) -> str:
    rows = ["| patch | upstream files | lines (+/−) | loop starts | purpose |", "|---|---|---|---|---|"]
    for patch in patches:
        files = ", ".join(f"`{Path(path).name}`" for path in patch.touched)
        added, removed = patch.added_removed
        rows.append(
            f"| `{patch.name}` | {files} | +{added} −{removed} | {patch.loop_starts} | {patch.fields['Subject']} |"
        )
    added, removed = (sum(patch.added_removed[i] for patch in patches) for i in (0, 1))
    touched = {path for patch in patches for path in patch.touched}
    rows.append(f"| all | {len(touched)} files | +{added} −{removed} | {sum(p.loop_starts for p in patches)} | |")
    return "\n".join(rows)


def with_table(readme: str, patches: list[Patch]) -> str:
    before, start, rest = readme.partition(TABLE_START)
    _, end, after = rest.partition(TABLE_END)
    if not start or not end:
        raise BuildError(
            "patches/README.md has lost its table",
            f"no lines {TABLE_START!r} and {TABLE_END!r}",
            "restore the two lines",
        )
    return f"{before}{TABLE_START}\n\n{table(patches)}\n\n{TABLE_END}{after}"
