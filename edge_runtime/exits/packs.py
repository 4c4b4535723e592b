"""Exit packs that come with this package, and finding one by path or name."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from ..errors import PackError

SUFFIX = ".exits.gguf"
_FOLDER = Path(__file__).parent.parent / "packs"


def bundled_exit_packs() -> dict[str, Path]:
    """Files of the exit packs that come with this package, by name."""
    return {path.name.removesuffix(SUFFIX): path for path in sorted(_FOLDER.glob(f"*{SUFFIX}"))}


def find_exit_pack(wanted: str) -> Path:
    """The file of a path or of a bundled pack's name; what is in it is for `ExitPack.load` to check.

    Raises PackError for an unknown name, with the names nearest to it.
    """
    if os.sep in wanted or wanted.endswith(".gguf"):
        return Path(wanted).expanduser()
    known = bundled_exit_packs()
    if wanted in known:
        return known[wanted]
    if wanted and Path(wanted).exists():
        return Path(wanted)
    raise PackError(f"no exit pack is named '{wanted}'", _hint_for(wanted, list(known)))


def _hint_for(wanted: str, known: list[str]) -> str:
    near = difflib.get_close_matches(wanted, known, n=3, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(near)}?"
    listed = f" or one of these names: {', '.join(known)}" if known else ""
    return f"give the path of a pack{listed}; `edge-run calibrate` makes packs"
