"""The models that have a name: what `edge-run models` prints."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from . import display
from .errors import EdgeError
from .models import DEMO_HINT, DEMO_MODEL, ENV_MODELS, NamedModel, demo_model_path, named_models, search_folders
from .native import read_header


@dataclass(frozen=True, slots=True)
class ListedModel:
    """A line of the list; architecture and layers are None where the header cannot be read."""

    name: str
    path: str
    file_bytes: int
    architecture: str | None
    n_layer: int | None
    problem: str = ""


def list_models(*, as_json: bool) -> None:
    """Print names, sizes, shapes and paths; where they are looked for goes to stderr."""
    listed = [describe(model) for model in named_models()]
    folders = search_folders()
    if as_json:
        found = [dataclasses.asdict(model) for model in listed]
        display.write_json({"models": found, "looked_in": [str(folder) for folder in folders]})
        return
    width = max((len(m.name) for m in listed), default=0)
    for m in listed:
        shape = m.problem or f"{m.architecture}, {m.n_layer} layers"
        print(f"{m.name:<{width}}  {m.file_bytes / 2**20:7.1f} MiB  {shape}  {m.path}")
    if demo_model_path() is None:
        display.tell(f"{DEMO_MODEL} is not installed; hint: {DEMO_HINT}")
    display.tell(f"looked for .gguf files in (${ENV_MODELS} adds to this):")
    for folder in folders:
        display.tell(f"  {folder}{'' if folder.is_dir() else ' (is not there)'}")


def describe(model: NamedModel) -> ListedModel:
    """What a model's header says."""
    try:
        header = read_header(str(model.path))
    except EdgeError as error:
        size = model.path.stat().st_size if model.path.exists() else 0
        return ListedModel(model.name, str(model.path), size, None, None, error.message)
    return ListedModel(model.name, str(model.path), header.file_bytes, header.architecture, header.n_layer)
