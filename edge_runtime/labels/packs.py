"""Packs that come with this package, and finding a pack by path or name."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from ..errors import PackError

MODERATION = "moderation"
_SHORT_NAMES = {MODERATION: "moderation-smollm2-135m"}
_FOLDER = Path(__file__).parent.parent / "packs"
_OTHER_KIND = ".exits.gguf"  # exit packs lie in the same folder


def bundled_packs() -> dict[str, Path]:
    """Files of the packs that come with this package, by name; a short name leads to the same file as the long one."""
    packs = {path.stem: path for path in sorted(_FOLDER.glob("*.gguf")) if not path.name.endswith(_OTHER_KIND)}
    return packs | {short: packs[name] for short, name in _SHORT_NAMES.items() if name in packs}


def find_pack(wanted: str) -> Path:
    """The file of a path or of a bundled pack's name; what is in it is for `LabelPack.load` to check.

    Raises PackError for an unknown name, with the names nearest to it.
    """
    if os.sep in wanted or wanted.endswith(".gguf"):
        return Path(wanted).expanduser()
    known = bundled_packs()
    if wanted in known:
        return known[wanted]
    if wanted and Path(wanted).exists():
        return Path(wanted)
    raise PackError(f"no pack is named '{wanted}'", _hint_for(wanted, list(known)))


def _hint_for(wanted: str, known: list[str]) -> str:
    near = difflib.get_close_matches(wanted, known, n=3, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(near)}?"
    listed = f" or one of these names: {', '.join(known)}" if known else ""
    return f"give the path of a pack{listed}; `edge-run labels train` makes packs"
