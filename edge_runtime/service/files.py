"""Unit files that are ours: written whole, never over what a person wrote, and removed without a trace.

The first line of each holds a checksum of the rest, by which an edited one is known.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Mapping
from enum import Enum
from pathlib import Path

from ..cache import replacing
from ..errors import EdgeError, UsageError
from .unit import SERVICE, UNIT_FILES

_MARK = "# Written by `edge-run service install`; change it with `systemctl edit`. sha256 "
_MARKED = re.compile(re.escape(_MARK) + r"([0-9a-f]{64})\n")


class Owner(Enum):
    """Whose a unit file is."""

    NOBODY = "is not there"
    OURS = "is as it was written"
    EDITED = "was edited by hand"
    FOREIGN = "is not from edge-run"


def marked(text: str) -> str:
    """A unit's text below the line that says from whom it is."""
    return f"{_MARK}{_checksum(text)}\n{text}"


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def owner_of(path: Path) -> Owner:
    """Whose the file is. Raises UsageError if it cannot be read."""
    try:
        if path.is_symlink():
            return Owner.FOREIGN  # `systemctl mask` makes such
        text = path.read_bytes().decode("utf-8", "replace")
    except (FileNotFoundError, NotADirectoryError):
        return Owner.NOBODY
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}", "check its permissions") from None
    found = _MARKED.match(text)
    if found is None:
        return Owner.FOREIGN
    return Owner.OURS if _checksum(text[found.end() :]) == found[1] else Owner.EDITED


def write_units(folder: Path, texts: Mapping[str, str], *, force: bool) -> list[Path]:
    """Make the units below `folder` those of `texts`; earlier ones of ours that are not among them go.

    Returns the files that were written or removed. Raises UsageError before anything is changed if a person's work
    would be lost, EdgeError if the folder cannot be written.
    """
    before = {name: owner_of(folder / name) for name in UNIT_FILES}
    for name, owner in before.items():
        lost = owner is Owner.EDITED or (owner is Owner.FOREIGN and name in texts)
        if lost and not force:
            keep = "keep your changes with `systemctl edit`, or overwrite it with --force"
            raise UsageError(f"{folder / name} {owner.value}", keep)
    changed = []
    for name, text in texts.items():
        path = folder / name
        if before[name] is Owner.OURS and path.read_text("utf-8") == marked(text):
            continue
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as file:
                file.write(marked(text).encode())
            path.chmod(0o644)
        except OSError as error:
            raise _cannot(path, error) from None
        changed.append(path)
    old = [name for name, owner in before.items() if name not in texts and owner in (Owner.OURS, Owner.EDITED)]
    return changed + _remove(folder, old)


def removable(folder: Path, *, force: bool) -> list[str]:
    """Names of the units in `folder` that are ours. Raises UsageError if one was edited, and nothing forces it."""
    owners = {name: owner_of(folder / name) for name in UNIT_FILES}
    edited = [name for name, owner in owners.items() if owner is Owner.EDITED]
    if edited and not force:
        raise UsageError(f"{folder / edited[0]} {Owner.EDITED.value}", "save your changes, and remove it with --force")
    return [name for name, owner in owners.items() if owner in (Owner.OURS, Owner.EDITED)]


def remove_units(folder: Path, *, force: bool) -> list[Path]:
    """Remove what `write_units` wrote, and nothing else. Returns the files that were removed.

    Raises UsageError before anything is removed if one was edited, EdgeError if the folder cannot be written.
    """
    return _remove(folder, removable(folder, force=force))


def _remove(folder: Path, names: list[str]) -> list[Path]:
    for name in names:
        try:
            (folder / name).unlink()
        except OSError as error:
            raise _cannot(folder / name, error) from None
    if names:
        with contextlib.suppress(OSError):  # a person's drop-ins stay, and so does their folder
            (folder / f"{SERVICE}.d").rmdir()
    return [folder / name for name in names]


def _cannot(path: Path, error: OSError) -> EdgeError:
    if isinstance(error, PermissionError):
        hint = "run it with sudo, or install a service of your own with --user"
    else:
        hint = "check the disk and the folder"
    return EdgeError(f"{path} cannot be written: {error.strerror}", hint)
