"""Exit packs: heads, gates and certified thresholds of one model, in one GGUF file.

The file holds tensors, the heads' matrices quantised in types that any reader of GGUF knows, and one JSON text, the
manifest; see `ExitPack` for what is in them. It names the model it was made for by hash, and the build of llama.cpp:
heads read hidden states, which differ between models, between quantisations of one, and between versions of llama.cpp.
"""

from __future__ import annotations

import errno
import hashlib
import os
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..cache import replacing
from ..errors import EdgeError, ModelNotFoundError, PackError
from ..identity import ModelIdentity, difference
from ..native import BINDINGS_VERSION, read_tensors
from ..native.tensors import read_texts
from ..types import TokenIds
from .asking import Asker
from .gate import Gate
from .head import QUANTISATIONS, HeadShape
from .pack_checks import check_pack
from .packed_head import PackedHead
from .quantised import Quantised, kind_of, row_bytes
from .strict_json import dumps, loads
from .thresholds import Rung

MAX_BYTES = 2**30
_ARCHITECTURE = "edge-exits"
_STATES_SINCE = 1  # the ABI since which slices hand out the same states: packs of one since then are good
_KINDS = {_ARCHITECTURE: "an exit pack", "edge-labels": "a label pack"}
_VERSION = 1
_MANIFEST, _CHECKSUM = "edge.exits.manifest", "edge.exits.crc32"
_MAKE = "make a pack with `edge-run calibrate`"
_ELSEWHERE = "choose another place with --out"
_AGAIN = "make it again with `edge-run calibrate`"
# of a model, in the order in which a difference is told
_COMPARED = ("architecture", "n_layer", "n_embd", "file_bytes", "sha256")

Arrays = dict[str, NDArray[Any]]


def this_library() -> str:
    """What hidden states are computed with here: the pinned source of llama.cpp, and the version of our part of it."""
    return f"llama-cpp-python {BINDINGS_VERSION}, ABI {_STATES_SINCE}"


@dataclass(frozen=True, slots=True, eq=False)
class ExitPack:
    """What a model needs to leave early. Raises ValueError, naming what is wrong, if its parts do not fit together.

    `shortlist` (V,) holds token ids, those of a cluster side by side; row i of a head speaks for `shortlist[i]`, row V
    for all other tokens. `cluster_starts` (C,) are the places in it at which clusters begin, the first 0; see
    `clusters.order_by_cluster`.

    A pack without heads is for the model's own output head (`shared`): it has no shortlist, clusters and askers either.
    """

    name: str
    model: ModelIdentity
    library: str  # see `this_library`
    boundaries: tuple[int, ...]  # layers behind which there is a head
    shortlist: TokenIds
    cluster_starts: TokenIds
    heads: tuple[PackedHead, ...]  # one per boundary, or none
    gates: tuple[Gate, ...]  # one per boundary
    rungs: tuple[Rung, ...]
    default_signal: str
    verify_thresholds: tuple[float, ...]  # one per boundary, of the default signal, in mode verified
    report: dict[str, Any]  # of the calibration
    askers: tuple[Asker, ...] = ()  # one per boundary, or none: heads are always asked

    def __post_init__(self) -> None:
        check_pack(self)

    @classmethod
    def load(cls, path: Path | str) -> ExitPack:
        """The pack at `path`. Raises PackError for what is no pack, damaged, or of a later version."""
        return _load(Path(path))

    def save(self, path: Path) -> int:
        """Write the pack; its size in bytes. Raises PackError if it is too large, or cannot be written."""
        return _save(self, path)

    @property
    def shared(self) -> bool:
        """Whether gates and thresholds are for the model's own output head."""
        return not self.heads

    @property
    def digest(self) -> str:
        """SHA-256 of all that is in the pack, in hexadecimal."""
        digest = hashlib.sha256()
        _feed(digest.update, dumps(_manifest(self)), _arrays(self))
        return digest.hexdigest()

    def check_model(self, found: ModelIdentity, library: str | None = None) -> None:
        """Raise PackError, naming what differs, unless `found` is the pack's model and `library` its build.

        `library` is `this_library()` unless given.
        """
        what = difference(self.model, found)
        if what is not None:
            key = next(key for key in _COMPARED if getattr(found, key) != getattr(self.model, key))
            raise PackError(
                f"the exit pack '{self.name}' is for {self.model}, this is {what}: {found}; {key} is "
                f"{getattr(found, key)} instead of {getattr(self.model, key)}",
                "name the right model with --model, or make a pack for this one with `edge-run calibrate`",
            )
        library = library or this_library()
        if library != self.library:
            raise PackError(
                f"the exit pack '{self.name}' was made with another build: {self.library}, this is {library}", _AGAIN
            )


# ── file ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _save(pack: ExitPack, path: Path) -> int:
    from gguf import GGMLQuantizationType, GGUFWriter  # slow to import, and only calibration writes

    arrays, manifest = _arrays(pack), dumps(_manifest(pack))
    kinds = {
        _tensor_name(head, name): GGMLQuantizationType[matrix.kind]
        for head in pack.heads
        for name, matrix in head.tensors.items()
        if isinstance(matrix, Quantised)
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".exit-pack.") as folder:
            staging = Path(folder, "pack")
            writer = GGUFWriter(staging, _ARCHITECTURE)
            try:
                writer.add_name(pack.name)
                writer.add_string(_MANIFEST, manifest)
                writer.add_string(_CHECKSUM, str(_checksum(manifest, arrays)))
                for name, array in arrays.items():
                    writer.add_tensor(name, array, raw_dtype=kinds.get(name))
                writer.write_header_to_file()
                writer.write_kv_data_to_file()
                writer.write_tensors_to_file()
            finally:
                writer.close()
            data = staging.read_bytes()
            if len(data) > MAX_BYTES:
                raise PackError(
                    f"the pack would have {len(data):,} bytes, {MAX_BYTES:,} are allowed",
                    "use fewer boundaries, or heads quantised to Q4_0",
                )
            _check_whole(staging, path)
            with replacing(path) as out:
                out.write(data)
            return len(data)
    except OSError as error:
        raise PackError(f"{path} cannot be written: {why(error)}", _ELSEWHERE) from error


def why(error: OSError) -> str:
    """Why a file cannot be written. Of a tensor written in part numpy does not say; a full disk is the usual reason."""
    return error.strerror or os.strerror(errno.ENOSPC)


def _check_whole(staging: Path, path: Path) -> None:
    """A disk that fills during a tensor's last bytes goes unnoticed by numpy."""
    try:
        ExitPack.load(staging)
    except PackError as error:
        raise PackError(f"{path} cannot be written: {os.strerror(errno.ENOSPC)}", _ELSEWHERE) from error


def _arrays(pack: ExitPack) -> Arrays:
    arrays: Arrays = {"shortlist": pack.shortlist, "cluster_starts": pack.cluster_starts}
    for head in pack.heads:
        for name, found in head.tensors.items():
            arrays[_tensor_name(head, name)] = found.data if isinstance(found, Quantised) else found
        arrays[_tensor_name(head, "projection")] = head.projection
    arrays |= {f"asker.{i}": asker.weights for i, asker in enumerate(pack.askers)}
    return {name: np.ascontiguousarray(array) for name, array in arrays.items()}


def _tensor_name(head: PackedHead, name: str) -> str:
    return f"head.{head.layer}.{name}"


def _manifest(pack: ExitPack) -> dict[str, Any]:
    return {
        "version": _VERSION,
        "name": pack.name,
        "model": asdict(pack.model),
        "library": pack.library,
        "boundaries": pack.boundaries,
        "heads": [{"quantisation": head.quantisation, "shape": asdict(head.shape)} for head in pack.heads],
        "gates": [asdict(gate) for gate in pack.gates],
        "askers": [asker.floor for asker in pack.askers],
        "rungs": [asdict(rung) for rung in pack.rungs],
        "default_signal": pack.default_signal,
        "verify_thresholds": pack.verify_thresholds,
        "report": pack.report,
    }


def _checksum(manifest: str, arrays: Arrays) -> int:
    crc = 0

    def add(piece: bytes) -> None:
        nonlocal crc
        crc = zlib.crc32(piece, crc)

    _feed(add, manifest, arrays)
    return crc


def _feed(add: Callable[[bytes], None], manifest: str, arrays: Arrays) -> None:
    """Tell `add` of all that a pack holds; types, too, as equal bytes of another type mean something else."""
    add(manifest.encode())
    for name in sorted(arrays):
        add(f"\0{name}\0{arrays[name].dtype.str}\0".encode())
        add(arrays[name].tobytes())


def _load(path: Path) -> ExitPack:
    keys = ("general.architecture", _MANIFEST, _CHECKSUM)
    try:
        architecture = read_texts(os.fspath(path), keys)["general.architecture"]
        if architecture != _ARCHITECTURE:
            kind = _KINDS.get(architecture, f"a GGUF of architecture '{architecture}'")
            raise PackError(f"{path} is no exit pack but {kind}", _MAKE)
        if path.stat().st_size > MAX_BYTES:
            raise PackError(f"{path} is no exit pack: it is larger than any", _MAKE)
        found = read_tensors(os.fspath(path), keys)
    except PackError:
        raise
    except EdgeError as error:
        hint = "check the path" if isinstance(error, ModelNotFoundError) else f"copy it again, or {_AGAIN}"
        raise PackError(error.message.replace("model file", "exit pack"), hint) from error
    except OSError as error:
        raise PackError(f"{path} cannot be read: {error.strerror}", "check the path") from error
    try:
        if str(_checksum(found.texts[_MANIFEST], found.arrays)) != found.texts[_CHECKSUM]:
            raise ValueError("its checksum is wrong")
        manifest = loads(found.texts[_MANIFEST])
        if manifest["version"] != _VERSION:
            hint = "update edge_runtime" if manifest["version"] > _VERSION else _AGAIN
            raise _OtherVersion(f"the exit pack {path} is of format {manifest['version']}, this reads {_VERSION}", hint)
        return _assemble(manifest, found.arrays)
    except _OtherVersion:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, EdgeError) as error:
        what = error.message if isinstance(error, EdgeError) else error
        raise PackError(f"the exit pack {path} is damaged: {what}", f"copy it again, or {_AGAIN}") from error


class _OtherVersion(PackError):
    pass


def _assemble(manifest: dict[str, Any], arrays: Arrays) -> ExitPack:
    boundaries, described = manifest["boundaries"], manifest["heads"]
    if described and len(boundaries) != len(described):  # none: for the model's own output head
        raise ValueError(f"{len(described)} heads for {len(boundaries)} boundaries")
    return ExitPack(
        name=manifest["name"],
        model=ModelIdentity(**manifest["model"]),
        library=manifest["library"],
        boundaries=tuple(boundaries),
        shortlist=_shaped(arrays, "shortlist", np.int32, (-1,)),
        cluster_starts=_shaped(arrays, "cluster_starts", np.int32, (-1,)),
        heads=tuple(_head(layer, item, arrays) for layer, item in zip(boundaries, described, strict=False)),
        gates=tuple(Gate(**gate) for gate in manifest["gates"]),
        rungs=tuple(Rung(**{**rung, "thresholds": tuple(rung["thresholds"])}) for rung in manifest["rungs"]),
        default_signal=manifest["default_signal"],
        verify_thresholds=tuple(manifest["verify_thresholds"]),
        report=manifest["report"],
        askers=tuple(
            Asker(_shaped(arrays, f"asker.{i}", np.float32, (manifest["model"]["n_embd"],)), floor)
            for i, floor in enumerate(manifest["askers"])
        ),
    )


def _head(layer: int, described: dict[str, Any], arrays: Arrays) -> PackedHead:
    shape, quantisation = HeadShape(**described["shape"]), described["quantisation"]
    if quantisation not in QUANTISATIONS:
        raise ValueError(f"the head of boundary {layer} is quantised to {quantisation!r:.120}")
    n_embd, prefix = shape.n_embd, f"head.{layer}."
    tensors: dict[str, Any] = {}
    for name, (rows, columns) in shape.matrices.items():
        kind = kind_of(columns, quantisation)
        size = (rows, columns) if kind == "F16" else (rows, row_bytes(columns, kind))
        tensors[name] = Quantised(kind, _shaped(arrays, prefix + name, np.float16 if kind == "F16" else np.uint8, size))
    for name in (*shape.norms, "other"):
        tensors[name] = _shaped(arrays, prefix + name, np.float32, (n_embd,))
    projection = _shaped(arrays, f"{prefix}projection", np.float16, (n_embd, n_embd))
    return PackedHead(layer, shape, quantisation, tensors, projection)


def _shaped(arrays: Arrays, name: str, kind: type[np.generic], size: tuple[int, ...]) -> NDArray[Any]:
    array = arrays[name]
    if array.dtype != kind:
        raise ValueError(f"{name} is of type {array.dtype}")
    if -1 not in size and array.size != np.prod(size, dtype=object):
        raise ValueError(f"{name} has {array.size} values, not {size}")
    return array.reshape(size)
