"""Loading the library: what is refused, in processes of their own, and what the log and the aborts say."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.errors import DecodeError, EdgeError, LibraryError, ModelUnreadableError, UsageError
from edge_runtime.native import BINDINGS_VERSION, Api, ContextOptions, Model, expected_abi, library, load, struct_sizes
from edge_runtime.slices import Slice

from .conftest import TinyMaker
from .raw_gguf import TEXT, RawModel

ROOT = Path(__file__).parent.parent
LOAD = "import edge_runtime; from edge_runtime.native import library, load; load()"


def python(code: str, **environment: str | Path) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh interpreter, without the variables that choose a library but for those given."""
    kept = {k: v for k, v in os.environ.items() if k not in ("LLAMA_CPP_LIB_PATH", "EDGE_RUNTIME_LIB")}
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**kept, "GGML_NO_BACKTRACE": "1", **{k: str(v) for k, v in environment.items()}},
    )


def error_of(code: str, **environment: str | Path) -> str:
    """Text of the EdgeError that `code` ends with, in a fresh interpreter."""
    caught = f"try:\n    {code}\nexcept EdgeError as error:\n    print(type(error).__name__, error)"
    done = python(f"from edge_runtime.errors import EdgeError\n{caught}", **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ── which library ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_packages_own_library_is_loaded() -> None:
    done = python(f"{LOAD}\nimport llama_cpp\nprint(llama_cpp.llama_cpp._base_path)")
    assert Path(done.stdout.strip()) == ROOT / "edge_runtime" / "lib"


@pytest.mark.stock
@pytest.mark.parametrize("variable", ["LLAMA_CPP_LIB_PATH", "EDGE_RUNTIME_LIB"])
def test_a_library_without_the_patches_is_refused(stock_library: Path, variable: str) -> None:
    text = error_of(LOAD, **{variable: stock_library})
    assert text.startswith("LibraryError")
    assert f"the library in {stock_library} is llama.cpp without this project's patches" in text
    assert "hint: unset LLAMA_CPP_LIB_PATH and EDGE_RUNTIME_LIB" in text


@pytest.mark.stock
def test_our_variable_comes_before_that_of_the_bindings(stock_library: Path) -> None:
    ours = ROOT / "edge_runtime" / "lib"
    assert python(LOAD, LLAMA_CPP_LIB_PATH=stock_library, EDGE_RUNTIME_LIB=ours).returncode == 0


@pytest.mark.stock
def test_bindings_imported_first_with_another_library_are_refused(stock_library: Path) -> None:
    code = f"""
import os, sys
os.environ["LLAMA_CPP_LIB_PATH"] = {str(stock_library)!r}
import llama_cpp
os.environ.pop("LLAMA_CPP_LIB_PATH")
from edge_runtime.errors import LibraryError
from edge_runtime.native import load
try:
    load()
except LibraryError as error:
    print(error)
"""
    done = python(code)
    assert f"was imported before edge_runtime, with the library in {stock_library}" in done.stdout, done.stderr
    assert "hint: import edge_runtime first" in done.stdout


def test_bindings_imported_first_with_our_library_are_fine() -> None:
    code = f"import os; os.environ['LLAMA_CPP_LIB_PATH'] = {str(ROOT / 'edge_runtime' / 'lib')!r}\nimport llama_cpp\n"
    assert python(code + LOAD).returncode == 0


@pytest.mark.parametrize("exists", [True, False])
def test_a_missing_library_is_said_to_be_missing(tmp_path: Path, exists: bool) -> None:
    folder = tmp_path if exists else tmp_path / "none"
    text = error_of(LOAD, EDGE_RUNTIME_LIB=folder)
    assert text.startswith(f"LibraryError the patched llama.cpp library is not in {folder}\nhint: build it")


def test_a_library_that_is_no_library_is_refused(tmp_path: Path) -> None:
    for name in ("libllama.so", "libllama.dylib"):
        (tmp_path / name).write_bytes(b"this is not a library")
    text = error_of(LOAD, EDGE_RUNTIME_LIB=tmp_path)
    assert text.startswith(f"LibraryError the library in {tmp_path} cannot be loaded")


def test_another_abi_is_refused() -> None:
    text = error_of(LOAD.replace("load()", f"library.expected_abi = {expected_abi + 1}; load()"))
    assert f"has ABI {expected_abi}, this package needs {expected_abi + 1}" in text
    assert "hint: build it" in text


def test_other_bindings_are_refused() -> None:
    text = error_of(f"import importlib.metadata as m; m.version = lambda name: '0.0.1'; {LOAD}")
    assert f"llama-cpp-python is version 0.0.1, but the library is built for {BINDINGS_VERSION}" in text
    assert f"hint: pip install llama-cpp-python=={BINDINGS_VERSION}" in text


def test_without_bindings_the_error_says_what_to_install() -> None:
    text = error_of(f"import sys; sys.modules['llama_cpp'] = None; {LOAD}")
    assert text.startswith("LibraryError llama-cpp-python cannot be imported")
    assert f"hint: pip install llama-cpp-python=={BINDINGS_VERSION}" in text


def test_the_required_bindings_are_those_the_library_is_built_for() -> None:
    required = importlib.metadata.requires("edge-runtime") or []
    assert f"llama-cpp-python=={BINDINGS_VERSION}" in required


# ── structs ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_bindings_mirror_every_struct_at_its_true_size() -> None:
    api = load()
    for name, (ours, theirs) in struct_sizes(api.c, api.lib).items():
        assert ours == theirs > 0, name


def test_a_struct_of_another_size_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "MIRRORED_STRUCTS", ("llama_no_such_struct",))
    api = load()
    monkeypatch.setattr(api.c, "llama_no_such_struct", api.c.llama_batch, raising=False)
    with pytest.raises(LibraryError, match=r"llama_no_such_struct has \d+ bytes in llama-cpp-python but 0 in the"):
        library._check_struct_sizes(api.c, api.lib)


def test_every_parameter_set_is_a_field_of_its_struct(tiny_path: TinyMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    """ctypes takes an assignment to a field that does not exist, and nothing happens."""
    c = load().c
    made: list[Any] = []

    def remembering(default: Callable[[], Any]) -> Callable[[], Any]:
        def make() -> Any:
            made.append(default())
            return made[-1]

        return make

    for name in ("llama_model_default_params", "llama_context_default_params"):
        monkeypatch.setattr(c, name, remembering(getattr(c, name)))
    with Model(str(tiny_path("llama"))) as model:
        Slice(model, 0, model.n_layer, ContextOptions(n_ctx=256, n_batch=8)).close()
    assert len(made) == 2
    for params in made:
        assert not vars(params), type(params).__name__


# ── the log ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def api() -> Iterator[Api]:
    api = load()
    yield api
    api.log.verbose = False


def test_the_log_gives_the_first_error_without_the_functions_name() -> None:
    log = library.Log()
    assert log.reason() == ""
    for level, line in [(2, b"load: fine\n"), (4, b"load: tensor x: bad shape\n"), (4, b"outer: failed to load\n")]:
        log.write(level, line)
    assert log.reason() == "tensor x: bad shape"
    with log.fresh():
        assert log.reason() == ""
        log.write(4, b"inner: other\n")
        assert log.reason() == "other"
    assert log.reason() == ""


def test_the_log_takes_empty_and_broken_lines() -> None:
    log = library.Log()
    for text in (None, b"", b"\n", b"f: \xff\xfe\n"):
        log.write(4, text)
    assert log.reason() == "��"


def test_llama_cpp_says_nothing_unless_asked(api: Api, tiny_path: TinyMaker, capfd: pytest.CaptureFixture[str]) -> None:
    Model(str(tiny_path("llama"))).close()
    assert capfd.readouterr() == ("", "")
    api.log.verbose = True
    Model(str(tiny_path("llama"))).close()
    shown = capfd.readouterr()
    assert shown.out == ""
    assert "llama.block_count" in shown.err


def test_a_failed_load_gives_llama_cpps_own_reason(tmp_path: Path, tiny_path: TinyMaker) -> None:
    raw = RawModel(tiny_path("llama"))
    del raw.tensors["blk.1.ffn_up.weight"]
    with pytest.raises(ModelUnreadableError, match=r"cannot be loaded: .*'blk\.1\.ffn_up\.weight' not found"):
        Model(str(raw.write(tmp_path / "m.gguf")))


def test_a_failed_decode_gives_its_own_reason_each_time(tiny_path: TinyMaker) -> None:
    with Model(str(tiny_path("llama"))) as model:
        piece = Slice(model, 0, 3, ContextOptions(n_ctx=256, n_batch=8, n_threads=1))
        for token in (model.n_vocab, model.n_vocab + 7):
            with pytest.raises(DecodeError, match=rf"invalid token\[0\] = {token}$"):
                piece.decode_tokens([token], 0)
        piece.decode_tokens([1, 2], 0)
        with pytest.raises(DecodeError, match="inconsistent sequence positions"):
            piece.decode_tokens([1], 9)


# ── aborts ──────────────────────────────────────────────────────────────────────────────────────────────────────────

ABORTS = {
    "ggml": ("lib.llama_memory_seq_pos_max(lib.llama_get_memory(piece.handle), 10_000)", "GGML_ASSERT(seq_id >= 0"),
    "c++": ("lib.llama_token_to_piece(model._vocab, 10_000_000, None, 0, 0, False)", "an unexpected C++ exception"),
}


@pytest.mark.parametrize("kind", list(ABORTS))
@pytest.mark.parametrize("caught", [True, False])
def test_an_abort_becomes_an_error_and_a_hint(tiny_path: TinyMaker, kind: str, caught: bool) -> None:
    call, words = ABORTS[kind]
    done = python(f"""
from edge_runtime.native import Model, ContextOptions, exit_on_abort, load
from edge_runtime.slices import Slice
lib = load().c
model = Model({str(tiny_path("llama", tokenizer=True))!r})
piece = Slice(model, 0, 3, ContextOptions(n_ctx=256, n_threads=1))
if {caught}:
    exit_on_abort()
{call}
""")
    if not caught:
        assert done.returncode < 0  # or else this test would show nothing
        return
    assert done.returncode == 1
    error, hint = done.stderr.splitlines()
    assert error.startswith("error: llama.cpp stopped: ")
    assert words in error
    assert "/" not in error.split(":")[2]
    assert hint.startswith("hint: ")


# ── models ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_model_without_mapping_gives_the_same(tiny_path: TinyMaker) -> None:
    path = str(tiny_path("llama"))
    logits = []
    for use_mmap in (True, False):
        with Model(path, use_mmap=use_mmap) as model:
            piece = Slice(model, 0, model.n_layer, ContextOptions(n_ctx=256, n_batch=8, n_threads=1))
            piece.decode_tokens([1, 2, 3], 0, [2])
            logits.append(piece.logits(2).tolist())
    assert logits[0] == logits[1]


@pytest.mark.parametrize("use_mmap", [True, False])
def test_use_mmap_reaches_llama_cpp(
    api: Api, tiny_path: TinyMaker, capsys: pytest.CaptureFixture[str], use_mmap: bool
) -> None:
    api.log.verbose = True
    Model(str(tiny_path("llama")), use_mmap=use_mmap).close()
    assert f"load_mode = {'mmap' if use_mmap else 'none'}" in capsys.readouterr().err


def test_a_closed_model_is_an_error_not_a_crash(tiny_path: TinyMaker) -> None:
    model = Model(str(tiny_path("llama", tokenizer=True)))
    piece = Slice(model, 0, 3, ContextOptions(n_ctx=256, n_threads=1))
    model.close()
    model.close()
    uses = [
        lambda: model.tokenize("a", add_special=True, parse_special=False),
        lambda: model.piece(1),
        lambda: model.is_end(1),
        lambda: model.meta("general.name"),
        lambda: model.bytes_loaded,
        lambda: Slice(model, 0, 3, ContextOptions(n_ctx=256)),
    ]
    for use in uses:
        with pytest.raises(UsageError, match="this model is closed"):
            use()
    with pytest.raises(UsageError, match="this slice is closed"):
        piece.decode_tokens([1], 0)


def test_without_a_tokenizer_there_is_no_text(tiny_path: TinyMaker) -> None:
    with Model(str(tiny_path("llama"))) as model:
        assert not model.has_tokenizer
        assert model.special_text("bos") == ""
        assert not model.is_end(0)
        for use in (lambda: model.tokenize("a", add_special=False, parse_special=False), lambda: model.piece(1)):
            with pytest.raises(EdgeError, match="has no tokenizer"):
                use()


def test_text_comes_back_from_its_tokens(tiny_path: TinyMaker) -> None:
    # without spaces, which this small vocabulary has no token for
    text = "Déjà-vu,\n\t“quoted”漢字😀\x00" + "long-" * 200
    with Model(str(tiny_path("llama", tokenizer=True))) as model:
        tokens = model.tokenize(text, add_special=False, parse_special=False)
        assert len(tokens) == len(text.encode())
        assert model.detokenize(tokens) == text
        assert b"".join(model.piece(t) for t in tokens) == text.encode()
        assert model.tokenize(text.encode(), add_special=False, parse_special=False) == tokens


def test_special_tokens_are_read_only_where_they_may_be(tiny_path: TinyMaker) -> None:
    with Model(str(tiny_path("llama", tokenizer=True))) as model:
        (turn,) = model.tokenize("<|turn|>", add_special=False, parse_special=True)
        assert model.piece(turn, special=True) == b"<|turn|>"
        assert model.piece(turn) == b""
        assert turn not in model.tokenize("<|turn|>", add_special=False, parse_special=False)
        assert model.is_end(model.tokenize("<|end|>", add_special=False, parse_special=True)[0])
        assert not model.is_end(turn)
        assert (model.special_text("bos"), model.special_text("eos")) == ("<s>", "</s>")


@pytest.mark.parametrize("token", [-1, 512, 2**31])
def test_what_is_no_token_has_no_text(tiny_path: TinyMaker, token: int) -> None:
    with Model(str(tiny_path("llama", tokenizer=True))) as model, pytest.raises(UsageError, match="there is no token"):
        model.piece(token)


def test_long_metadata_is_read_whole(tiny_path: TinyMaker, tmp_path: Path) -> None:
    raw = RawModel(tiny_path("llama"))
    for length in (255, 256, 257, 5000):
        raw.set(f"test.of{length}", "é" + "x" * (length - 2), TEXT)
    with Model(str(raw.write(tmp_path / "m.gguf"))) as model:
        for length in (255, 256, 257, 5000):
            assert len(model.meta(f"test.of{length}").encode()) == length
        assert model.meta("test.none", "default") == "default"
