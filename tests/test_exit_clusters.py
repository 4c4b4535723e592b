"""Which tokens count as one, and the order that lets `np.add.reduceat` sum over them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.exits.clusters import cluster_tokens, order_by_cluster
from edge_runtime.exits.head import output_rows
from edge_runtime.native import Model


def rows_of(*directions: int, n_embd: int = 16) -> np.ndarray:
    """One row per number: equal numbers, (nearly) equal rows; different ones are at right angles."""
    random = np.random.default_rng(0)
    rows = np.eye(n_embd, dtype=np.float32)[list(directions)] * 5
    return rows + 0.05 * random.standard_normal(rows.shape, np.float32)


def groups(pieces: list[bytes | str], rows: np.ndarray, **options: float) -> set[frozenset[bytes | str]]:
    found = cluster_tokens(pieces, rows, **options)
    return {frozenset(p for p, c in zip(pieces, found, strict=True) if c == k) for k in set(found.tolist())}


def test_case_and_leading_spaces_do_not_count() -> None:
    pieces = [b"The", b" the", b"the", b" THE", b"then", b" a", b"\xc3\x9cber", b" \xc3\xbcber"]
    found = groups(pieces, rows_of(*range(8)))
    assert found == {
        frozenset([b"The", b" the", b"the", b" THE"]),
        frozenset([b"then"]),
        frozenset([b" a"]),
        frozenset([b"\xc3\x9cber", b" \xc3\xbcber"]),
    }


def test_text_serves_as_well_as_bytes() -> None:
    assert groups(["The", " the", "x"], rows_of(0, 1, 2)) == {frozenset(["The", " the"]), frozenset(["x"])}


def test_spaces_and_bytes_that_are_no_text_stay_alone() -> None:
    pieces = [b" ", b"  ", b"", b"\n", b"\xe2", b"\x82", b" \xe2", b" \n"]
    found = groups(pieces, rows_of(*range(8)))
    assert found == {frozenset([p]) for p in pieces if p not in (b"\n", b" \n")} | {frozenset([b"\n", b" \n"])}


def test_forms_of_one_word_are_joined_if_their_rows_are_near() -> None:
    pieces = [b" unit", b" units", b"Units", b" start", b" starts", b" filler", b" more", b" still"]
    near = groups(pieces, rows_of(0, 0, 0, 1, 2, 3, 4, 5))
    assert frozenset([b" unit", b" units", b"Units"]) in near
    assert frozenset([b" start"]) in near


@pytest.mark.parametrize(
    "pair",
    [
        (b" three", b" four"),
        (b" positive", b" negative"),
        (b" northwest", b" northeast"),
        (b"12345", b"12346"),
        (b" his", b" hers"),
        (b" Iran", b" Iraq"),
        (b" be", b" bet"),
    ],
)
def test_words_that_stand_in_the_same_places_are_not_joined(pair: tuple[bytes, bytes]) -> None:
    assert frozenset(pair) not in groups([*pair, b"x", b"y", b"z"], rows_of(0, 0, 1, 2, 3))


def test_only_those_are_joined_that_are_nearest_to_each_other() -> None:
    """Chains would grow without end; a cluster is two words at most."""
    pieces = [b"walked", b"walks", b"walk", b"x", b"y", b"z"]
    rows = rows_of(0, 0, 0, 1, 2, 3)
    rows[1:3, 5] += 2  # walk and walks are the nearest, and walked is not far
    assert groups(pieces, rows) >= {frozenset([b"walk", b"walks"]), frozenset([b"walked"])}


def test_the_bound_on_similarity_counts() -> None:
    pieces = [b"unit", b"units", b"x", b"y"]
    rows = np.float32([[4, 1, 0, 0], [4, -1, 0, 0], [-4, 0, 2, 0], [-4, 0, -2, 0]])  # mean-free; cosine 15/17
    assert frozenset([b"unit", b"units"]) in groups(pieces, rows, similarity=15 / 17 - 0.01)
    assert frozenset([b"unit", b"units"]) not in groups(pieces, rows, similarity=15 / 17 + 0.01)


def test_rows_without_length_and_no_tokens_at_all() -> None:
    assert cluster_tokens([b"unit", b"units"], np.zeros((2, 4), np.float32)).tolist() == [0, 1]
    assert cluster_tokens([], np.zeros((0, 4), np.float32)).shape == (0,)
    ids, starts = order_by_cluster(np.zeros(0, np.int32), np.zeros(0, np.int32))
    assert (len(ids), len(starts)) == (0, 0)


def test_numbers_count_from_zero_by_first_appearance() -> None:
    assert cluster_tokens([b"b", b"a", b" B", b"c"], rows_of(0, 1, 2, 3)).tolist() == [0, 1, 0, 2]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=30), st.randoms(use_true_random=False))
def test_sorted_tokens_and_starts_are_a_partition(clusters: list[int], random: object) -> None:
    ids = np.arange(3, 3 + 2 * len(clusters), 2, dtype=np.int32)
    random.shuffle(clusters)  # type: ignore[attr-defined]
    found, starts = order_by_cluster(ids, np.array(clusters, np.int32))
    assert (found.dtype, starts.dtype) == (np.int32, np.int32)
    assert sorted(found.tolist()) == ids.tolist()
    of = dict(zip(ids.tolist(), clusters, strict=True))
    parts = [part.tolist() for part in np.split(found, starts[1:])]
    assert starts[0] == 0
    assert all(parts)
    for part in parts:
        assert part == sorted(part)
        assert len({of[i] for i in part}) == 1
    assert len(parts) == len(set(clusters))
    assert [part[0] for part in parts] == sorted(part[0] for part in parts)
    # the sum over clusters that signals are made of
    mass = dict.fromkeys(set(clusters), 0.0)
    for i in ids.tolist():
        mass[of[i]] += i
    assert sorted(np.add.reduceat(found.astype(float), starts).tolist()) == pytest.approx(sorted(mass.values()))


def test_control_tokens_stand_for_nothing_each_in_its_own_way() -> None:
    assert cluster_tokens([b"", b"", "", b"x"], rows_of(0, 0, 0, 1)).tolist() == [0, 1, 2, 3]


def test_the_demo_models_clusters_are_small(demo_model: Model, demo_path: Path, record_property: object) -> None:
    ids = np.arange(0, 8192, dtype=np.int32)
    pieces = [demo_model.piece(int(i)) for i in ids]
    found = cluster_tokens(pieces, output_rows(demo_path, ids))
    sizes = np.bincount(found)
    assert sizes.max() <= 12
    assert 0.6 * len(ids) < len(sizes) < 0.9 * len(ids)
    of = {piece: int(cluster) for piece, cluster in zip(pieces, found, strict=True)}
    assert of[b" the"] == of[b"The"]
    assert of[b" year"] == of[b" years"]
    assert of[b" three"] != of[b" four"]
    assert of[b" he"] != of[b" she"]
    record_property("finding", f"clusters of 8,192 tokens: {len(sizes):,}, the largest of {sizes.max()}")  # type: ignore[operator]
