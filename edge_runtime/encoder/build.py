"""From published weights to an encoder on disk: float32 and int8, compared with a reference before they are kept."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import importlib.metadata
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..cache import model_hash, replacing
from ..errors import EdgeError, ModelError, ModelUnreadableError
from ..reporter import Reporter
from .bert import BertShape, Weights, check_weights, read_shape, reference_embedding
from .graph import bert_graph
from .libraries import need, need_to_build
from .recipes import CONFIG, FLOAT32, INT8, RECORD, TOKENIZER, WEIGHTS, Recipe, find_weights
from .session import SentenceEncoder

FORMAT = 1  # of the record, and of how files are built; others are built anew
LEAST_COSINE = {FLOAT32: 0.999, INT8: 0.98}  # of each sentence with the reference
SENTENCES = (
    "The sky is blue because air scatters short waves more than long ones.",
    "How do I boil an egg?",
    "I'm sorry, but I cannot help with that.",
    "def area(radius): return 3.14159 * radius ** 2",
    "Le chat dort près de la fenêtre, où il fait chaud.",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.",
    "Привет, как у тебя дела сегодня?",
    "今天天气很好，我们去公园吧。",
    "こんにちは、世界。",
    "مرحبا بالعالم، كيف حالك؟",
    "नमस्ते दुनिया, आप कैसे हैं?",
    "!?",
    "",
    "A small board measures its temperature and its power, and when it grows too hot it thinks less deeply for a while "
    "until a fan or the night has cooled it down again; nobody who talks with it should notice much of that.",
)
_SPARE = 3.5  # bytes needed on the disk for a while, per byte of the weights
_PREFIX = ".building-"


@dataclass(frozen=True, slots=True)
class Built:
    """An encoder on disk, and what its record says."""

    folder: Path
    record: dict[str, Any]
    was_there: bool


def build_encoder(recipe: Recipe, folder: Path, reporter: Reporter | None = None) -> Built:
    """Build an encoder into `folder`; nothing is done if the same one is there already, and whole.

    Files take their places only when all are made and compared.

    Raises ModelNotFoundError and ModelUnreadableError for the weights, ModelError if a result is unlike the reference,
    EdgeError for missing libraries, a full disk, or another build that is under way there.
    """
    reporter = reporter or Reporter()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            record = _whole_record(recipe, folder)
            if record is not None:
                return Built(folder, record, was_there=True)
            for module in ("onnx", "safetensors.numpy", "onnxruntime.quantization", "tokenizers"):
                need_to_build(module)
            reporter.say(f"checking the weights of {recipe.name}")
            source = find_weights(recipe)
            _check_space(folder, source / WEIGHTS)
            with tempfile.TemporaryDirectory(dir=folder, prefix=_PREFIX) as staging:
                cosines = _make(recipe, source, Path(staging), reporter)
                for file in (TOKENIZER, FLOAT32, INT8):
                    _publish(Path(staging) / file, folder / file)
            record = _record(recipe, folder, cosines)
            with replacing(folder / RECORD) as out:
                out.write((json.dumps(record, indent=2) + "\n").encode())
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        hint = "free some space, or name another folder with --out" if full else "name another folder with --out"
        why = error.strerror or str(error)
        raise EdgeError(f"the encoder cannot be written to {folder}: {why}", hint) from error
    return Built(folder, record, was_there=False)


def _make(recipe: Recipe, source: Path, staging: Path, reporter: Reporter) -> dict[str, dict[str, float]]:
    """Write all files into `staging`; by file, the cosines with the reference."""
    shape, weights = _read_weights(source)
    if recipe.max_tokens > shape.n_positions:
        raise ModelError(f"{recipe.name} has {shape.n_positions} positions, not {recipe.max_tokens}", recipe.install)
    tokenizer = need("tokenizers").Tokenizer.from_file(str(source / TOKENIZER))
    tokenizer.no_padding()
    tokenizer.enable_truncation(recipe.max_tokens)
    tokenizer.save(str(staging / TOKENIZER))
    reporter.say("building the float32 graph")
    need_to_build("onnx").save(bert_graph(weights, shape), str(staging / FLOAT32))
    reporter.say("quantising to int8")
    _quantise(staging / FLOAT32, staging / INT8)
    reporter.say(f"computing {len(SENTENCES)} sentences by the reference")
    reference = []
    for done, sentence in enumerate(SENTENCES):
        reference.append(reference_embedding(weights, shape, tokenizer.encode(sentence).ids))
        reporter.progress(done + 1, len(SENTENCES))
    return {file: _compare(staging / file, np.array(reference)) for file in (FLOAT32, INT8)}


def _read_weights(source: Path) -> tuple[BertShape, Weights]:
    try:
        config = json.loads((source / CONFIG).read_text("utf-8"))
        read = need_to_build("safetensors.numpy").load_file(source / WEIGHTS)
    except OSError as error:
        raise ModelUnreadableError(f"{source} cannot be read: {error.strerror}", "check its permissions") from error
    except Exception as error:  # not JSON, or the library's own class
        raise ModelUnreadableError(f"the weights in {source} are damaged: {error}", "install them anew") from None
    shape = read_shape(config)
    weights = {name: np.asarray(values, np.float32) for name, values in read.items() if values.dtype.kind == "f"}
    check_weights(weights, shape)
    return shape, weights


def _quantise(source: Path, target: Path) -> None:
    """Matrices and the table of words to int8, a scale for each column of a matrix; values are rounded as they come.

    Of the eight bits of a weight seven are used: sums of more overflow on x86 processors without VNNI.
    """
    quantization = need_to_build("onnxruntime.quantization")
    logging.disable(logging.WARNING)  # it recommends a step that changes nothing here
    try:
        quantization.quantize_dynamic(
            source,
            target,
            per_channel=True,
            reduce_range=True,
            weight_type=quantization.QuantType.QInt8,
            op_types_to_quantize=["MatMul", "Gather"],
        )
    finally:
        logging.disable(logging.NOTSET)


def _compare(path: Path, reference: NDArray[np.float64]) -> dict[str, float]:
    """The least and the mean cosine with the reference (n, n_embd). Raises ModelError if the least is too small."""
    cosines = (SentenceEncoder(path).encode(SENTENCES) * reference).sum(1)
    least, wanted = float(cosines.min()), LEAST_COSINE[path.name]
    if not least >= wanted:
        what = f"{path.name} is not like the reference: the cosine of a sentence is {least:.4f}, not {wanted} or more"
        raise ModelError(what, "another version of onnxruntime may do better")
    return {"least": round(least, 5), "mean": round(float(cosines.mean()), 5)}


def _record(recipe: Recipe, folder: Path, cosines: dict[str, dict[str, float]]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "name": recipe.name,
        "package": recipe.package,
        "version": recipe.version,
        "licence": recipe.licence,
        "max_tokens": recipe.max_tokens,
        "inputs": dict(recipe.sha256),
        "outputs": {
            file: {"sha256": model_hash(folder / file), "bytes": (folder / file).stat().st_size}
            for file in (FLOAT32, INT8, TOKENIZER)
        },
        "sentences": len(SENTENCES),
        "cosines": cosines,
        "built_with": {library: importlib.metadata.version(library) for library in ("onnx", "onnxruntime")},
    }


def _whole_record(recipe: Recipe, folder: Path) -> dict[str, Any] | None:
    """The record in `folder` if it is of this recipe and every file is as it says."""
    try:
        record: dict[str, Any] = json.loads((folder / RECORD).read_bytes())
        if (record["format"], record["inputs"]) != (FORMAT, dict(recipe.sha256)):
            return None
        if set(record["outputs"]) != {FLOAT32, INT8, TOKENIZER} or set(record["cosines"]) != {FLOAT32, INT8}:
            return None
        whole = all(model_hash(folder / file) == said["sha256"] for file, said in record["outputs"].items())
    except (OSError, ValueError, TypeError, LookupError, AttributeError, ModelUnreadableError):
        return None
    return record if whole else None


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One build at a time; what an earlier one that was killed left behind, goes."""
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise EdgeError(f"another build into {folder} is under way", "wait for it to end") from None
        for left in folder.glob(f"{_PREFIX}*"):
            shutil.rmtree(left, ignore_errors=True)
        yield


def _check_space(folder: Path, weights: Path) -> None:
    needed = int(_SPARE * weights.stat().st_size)
    if shutil.disk_usage(folder).free < needed:
        raise OSError(errno.ENOSPC, f"{needed / 2**20:.0f} MiB are needed, and the disk has less")


def _publish(made: Path, place: Path) -> None:
    with made.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(made, place)
