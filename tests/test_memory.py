"""Whether a model fits is known before it is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_runtime import memory
from edge_runtime.errors import MemoryLimitError
from edge_runtime.memory import MachineMemory, MemoryNeed, check_need, estimate_need
from edge_runtime.native import ContextOptions, KvType
from edge_runtime.types import ModelHeader

GIB = 2**30
HEADER = ModelHeader(
    path="m.gguf",
    architecture="llama",
    name="m",
    n_layer=10,
    n_embd=100,
    n_ctx_train=2048,
    n_head_kv=2,
    key_length=32,
    value_length=16,
    n_tensors=1,
    n_vocab=1000,
    tensor_bytes=12345,
    file_bytes=20000,
)


def test_the_kv_cache_is_counted_in_cells_of_all_layers() -> None:
    need = estimate_need(HEADER, ContextOptions(n_ctx=1000), n_slices=1, n_outputs=1)
    assert need.weights == 12345
    assert need.kv_cache == 1024 * 10 * 2 * (32 + 16) * 2  # 1000 cells are padded to 1024


def test_slices_share_weights_and_cache_but_not_buffers() -> None:
    one, three = (estimate_need(HEADER, ContextOptions(), n, 1) for n in (1, 3))
    assert (three.weights, three.kv_cache) == (one.weights, one.kv_cache)
    assert three.compute == 3 * one.compute


def test_a_quantised_cache_is_smaller() -> None:
    sizes = [
        estimate_need(HEADER, ContextOptions(kv_type=t), 1, 1).kv_cache for t in (KvType.Q8_0, KvType.F16, KvType.F32)
    ]
    assert sizes == sorted(sizes)
    assert sizes[2] == 2 * sizes[1]


def test_what_fits_gets_no_word() -> None:
    assert check_need(MemoryNeed(GIB, 0, 0), MachineMemory(4 * GIB, 2 * GIB)) is None


def test_what_fits_only_once_others_make_room_gets_a_warning() -> None:
    warning = check_need(MemoryNeed(3 * GIB, 0, 0), MachineMemory(4 * GIB, 2 * GIB))
    assert warning is not None
    assert "3.0 GiB" in warning
    assert "2.0 GiB are free" in warning


@pytest.mark.parametrize(
    ("need", "hint"), [(MemoryNeed(5 * GIB, 0, 0), "smaller model"), (MemoryNeed(GIB, 5 * GIB, 0), "--ctx")]
)
def test_what_can_never_fit_is_refused_with_both_numbers_and_what_to_reduce(need: MemoryNeed, hint: str) -> None:
    with pytest.raises(MemoryLimitError, match=r"needs [56]\.0 GiB .*this machine has 4\.0 GiB") as failure:
        check_need(need, MachineMemory(4 * GIB, 4 * GIB))
    assert hint in failure.value.hint


def test_the_lowest_limit_of_a_control_group_and_its_parents_counts(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.write_text("0::/a/b\n")
    (tmp_path / "root" / "a" / "b").mkdir(parents=True)
    (tmp_path / "root" / "a" / "memory.max").write_text("4096\n")
    (tmp_path / "root" / "a" / "b" / "memory.max").write_text("max\n")
    assert memory._control_group_limits(tmp_path / "root", own) == [4096]


def test_control_groups_of_version_1(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.write_text("9:cpu:/\n8:memory:/a\n")
    (tmp_path / "root" / "memory" / "a").mkdir(parents=True)
    (tmp_path / "root" / "memory" / "a" / "memory.limit_in_bytes").write_text("8192\n")
    assert memory._control_group_limits(tmp_path / "root", own) == [8192]


def test_no_control_group(tmp_path: Path) -> None:
    assert memory._control_group_limits(tmp_path / "none", tmp_path / "neither") == []


def test_this_machine_has_some_memory() -> None:
    machine = memory.machine_memory()
    assert 0 < machine.available <= machine.total
