"""Load the patched library through llama-cpp-python and check that it is ours."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.metadata
import os
import re
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._library import ENV_BINDINGS, ENV_OURS, library_dir
from ..errors import LibraryError, UsageError

expected_abi = 2
BINDINGS_VERSION = "0.3.36"
BUILD_HINT = "build it with scripts/build_llama (or `make setup`), or reinstall with `pip install .`"

# structs that llama-cpp-python mirrors by hand; the library tells their true sizes
MIRRORED_STRUCTS = (
    "llama_model_params",
    "llama_context_params",
    "llama_batch",
    "llama_token_data",
    "llama_token_data_array",
    "llama_logit_bias",
    "llama_chat_message",
    "llama_model_kv_override",
    "llama_sampler_chain_params",
    "llama_perf_context_data",
)

_LOG_ERROR = 4  # enum ggml_log_level
_ABORT_HINT = "hint: the model file may be damaged or not what it says it is; download or convert it again"
_keep_alive: list[Any] = []  # callbacks that C holds on to


@dataclass(frozen=True)
class Api:
    """The bindings' module `c`, the library handle `lib` with edge_* and gguf_* declared, and the log."""

    c: Any
    lib: Any
    log: Log

    @property
    def supported_architectures(self) -> tuple[str, ...]:
        names: bytes = self.lib.edge_supported_archs()
        return tuple(names.decode().split(","))

    @property
    def system_info(self) -> str:
        """The processor features that llama.cpp was built for and uses."""
        text: bytes = self.c.llama_print_system_info()
        return text.decode("utf-8", "replace").strip(" |\n")


class Log:
    """Keeps llama.cpp's latest lines instead of letting them spill over the terminal."""

    def __init__(self) -> None:
        self._lines: deque[tuple[int, str]] = deque(maxlen=200)
        self.verbose = False

    def write(self, level: int, text: bytes | None, _user: object = None) -> None:
        line = (text or b"").decode("utf-8", "replace")
        if self.verbose:
            sys.stderr.write(line)
        if line.strip():
            self._lines.append((level, line.strip()))

    def reason(self) -> str:
        """The first error line without llama.cpp's function name in front, or ''; later ones only pass it on."""
        for level, line in self._lines:
            if level == _LOG_ERROR:
                return line.split(": ", 1)[-1]
        return ""

    def clear(self) -> None:
        self._lines.clear()

    @contextmanager
    def fresh(self) -> Iterator[Log]:
        """Forget older lines, so that `reason` speaks of what happens inside, and these when it is over."""
        self.clear()
        try:
            yield self
        finally:
            self.clear()


def _already_loaded_elsewhere(wanted: Path) -> Path | None:
    module = sys.modules.get("llama_cpp.llama_cpp")
    base = getattr(module, "_base_path", None)
    return Path(base) if base is not None and Path(base).resolve() != wanted.resolve() else None


class Closed:
    """Takes the place of the library in what has been closed: using it is an error instead of a crash."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __getattr__(self, name: str) -> Any:
        raise UsageError(f"{self._what} is closed", "open it again, or close it later")


@functools.cache
def load() -> Api:
    """The one loaded library of this process.

    Raises LibraryError if it is missing, was built without the patches or for another ABI, or if `llama_cpp`
    was imported with another library before `edge_runtime`.
    """
    directory = library_dir()
    elsewhere = _already_loaded_elsewhere(directory)
    if elsewhere is not None:
        raise LibraryError(
            f"llama_cpp was imported before edge_runtime, with the library in {elsewhere}",
            f"import edge_runtime first, or set {ENV_BINDINGS}={directory} before Python starts",
        )
    if not any(directory.glob("libllama.*")):
        raise LibraryError(f"the patched llama.cpp library is not in {directory}", BUILD_HINT)
    try:
        import llama_cpp.llama_cpp as c
    except ImportError as error:
        raise LibraryError(
            f"llama-cpp-python cannot be imported: {error}", f"pip install llama-cpp-python=={BINDINGS_VERSION}"
        ) from error
    except (RuntimeError, OSError, FileNotFoundError) as error:
        raise LibraryError(f"the library in {directory} cannot be loaded: {error}", BUILD_HINT) from error
    version = importlib.metadata.version("llama-cpp-python")
    if version != BINDINGS_VERSION:
        raise LibraryError(
            f"llama-cpp-python is version {version}, but the library is built for {BINDINGS_VERSION}",
            f"pip install llama-cpp-python=={BINDINGS_VERSION}",
        )
    lib = c._lib
    _check_ours(lib, directory)
    _declare(c, lib)
    _check_struct_sizes(c, lib)
    log = Log()
    callback = c.llama_log_callback(log.write)
    _keep_alive.append(callback)
    c.llama_log_set(callback, ctypes.c_void_p(0))
    c.llama_backend_init()
    return Api(c, lib, log)


@functools.cache
def library_hash() -> str:
    """Identity of the loaded build: a hash of its files, for what must not outlive it."""
    digest = hashlib.sha256()
    for path in sorted(library_dir().glob("lib*")):
        digest.update(path.name.encode() + b"\0")
        with path.open("rb") as file:
            while piece := file.read(2**20):
                digest.update(piece)
    return digest.hexdigest()


def exit_on_abort() -> None:
    """Where llama.cpp would abort the process, leave it with an error line, a hint and exit code 1 instead.

    For programs, not for libraries: nothing is cleaned up.
    """
    lib = load().lib

    def last_words(text: bytes | None) -> None:
        # "/build/src/file.cpp:12: what happened", and the folder says nothing here
        message = re.sub(r"^/\S*/", "", (text or b"an unexpected C++ exception").decode("utf-8", "replace"))
        os.write(2, f"error: llama.cpp stopped: {message}\n{_ABORT_HINT}\n".encode())
        os._exit(1)

    abort = ctypes.CFUNCTYPE(None, ctypes.c_char_p)(last_words)
    terminate = ctypes.CFUNCTYPE(None)(lambda: last_words(None))
    _keep_alive.extend((abort, terminate))
    lib.ggml_set_abort_callback.restype = None
    lib.ggml_set_abort_callback(abort)
    # std::set_terminate, for exceptions that no C function may let through; absent where the runtime is linked in
    set_terminate = getattr(lib, "_ZSt13set_terminatePFvvE", None)
    if set_terminate is not None:
        set_terminate.restype = None
        set_terminate(terminate)


def _check_ours(lib: Any, directory: Path) -> None:
    try:
        abi = lib.edge_abi_version()
    except AttributeError:
        raise LibraryError(
            f"the library in {directory} is llama.cpp without this project's patches",
            f"unset {ENV_BINDINGS} and {ENV_OURS}, or {BUILD_HINT}",
        ) from None
    if abi != expected_abi:
        raise LibraryError(f"the library in {directory} has ABI {abi}, this package needs {expected_abi}", BUILD_HINT)


def _declare(c: Any, lib: Any) -> None:
    pointer, text, i64 = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int64
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "edge_supported_archs": (text, []),
        "edge_model_supported": (ctypes.c_bool, [pointer]),
        "edge_sizeof": (ctypes.c_size_t, [text]),
        "edge_slice_init": (
            pointer,
            [pointer, c.llama_context_params, ctypes.c_int32, ctypes.c_int32, ctypes.c_bool],
        ),
        "edge_slice_hidden": (pointer, [pointer]),
        "edge_slices_decode": (ctypes.c_int32, [pointer, ctypes.c_int32, c.llama_batch]),
        "edge_kernels_available": (text, []),
        "edge_kernels_types": (text, []),
        "edge_kernels_select": (ctypes.c_bool, [text]),
        "gguf_init_from_file": (pointer, [text, GgufInitParams]),
        "gguf_free": (None, [pointer]),
        "gguf_get_data_offset": (ctypes.c_size_t, [pointer]),
        "gguf_find_key": (i64, [pointer, text]),
        "gguf_get_kv_type": (ctypes.c_int, [pointer, i64]),
        "gguf_get_val_u32": (ctypes.c_uint32, [pointer, i64]),
        "gguf_get_val_f32": (ctypes.c_float, [pointer, i64]),
        "gguf_get_val_str": (text, [pointer, i64]),
        "gguf_get_arr_type": (ctypes.c_int, [pointer, i64]),
        "gguf_get_arr_n": (ctypes.c_size_t, [pointer, i64]),
        "gguf_get_arr_data": (pointer, [pointer, i64]),
        "gguf_get_n_tensors": (i64, [pointer]),
        "gguf_get_tensor_offset": (ctypes.c_size_t, [pointer, i64]),
        "gguf_get_tensor_size": (ctypes.c_size_t, [pointer, i64]),
        "gguf_get_tensor_type": (ctypes.c_int, [pointer, i64]),
        "gguf_get_tensor_name": (text, [pointer, i64]),
        "ggml_time_us": (i64, []),
        "ggml_type_name": (text, [ctypes.c_int]),
    }
    for name, (result, arguments) in signatures.items():
        if name.startswith("edge_kernels_") and not hasattr(lib, name):
            continue  # built without them
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    # a second face of the function, giving an address: the bindings' pointer object costs more than the call
    lib.logits_address = lib["llama_get_logits_ith"]
    lib.logits_address.restype, lib.logits_address.argtypes = pointer, [pointer, ctypes.c_int32]


class GgufInitParams(ctypes.Structure):
    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))


def struct_sizes(c: Any, lib: Any) -> dict[str, tuple[int, int]]:
    """Struct name → (size in the bindings, size in the library), in bytes."""
    return {name: (ctypes.sizeof(getattr(c, name)), int(lib.edge_sizeof(name.encode()))) for name in MIRRORED_STRUCTS}


def _check_struct_sizes(c: Any, lib: Any) -> None:
    for name, (ours, theirs) in struct_sizes(c, lib).items():
        if ours != theirs:
            raise LibraryError(
                f"{name} has {ours} bytes in llama-cpp-python but {theirs} in the library",
                f"llama-cpp-python {BINDINGS_VERSION} and the library must come from the same source; {BUILD_HINT}",
            )
