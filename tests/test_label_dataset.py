"""Files of labelled messages as they come: read in bounded memory, damage counted, and mistakes named."""

from __future__ import annotations

import contextlib
import csv
import gzip
import json
import os
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.errors import EdgeError, UsageError
from edge_runtime.labels import dataset
from edge_runtime.labels.dataset import MAX_LABELS, MIN_ROWS_PER_LABEL, ReadCounts, Row, read_rows, sample_rows, split
from edge_runtime.labels.seen import TextTable


def read(path: Path, content: str | bytes, **columns: str) -> tuple[list[tuple[str, str]], ReadCounts]:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    counts = ReadCounts()
    names = {"text": "text", "label": "label", **columns}
    rows = [(row.text, row.label) for row in read_rows(path, **names, counts=counts)]
    assert counts.kept == len(rows)
    return rows, counts


def failure(path: Path, content: str | bytes, **columns: str) -> EdgeError:
    with pytest.raises(EdgeError) as caught:
        read(path, content, **columns)
    assert caught.value.hint
    return caught.value


def rows_of(**sizes: int) -> list[Row]:
    """`sizes` rows of each label, interleaved."""
    rows = [(i / n, Row(f"{label} {i}", label)) for label, n in sizes.items() for i in range(n)]
    return [row for _, row in sorted(rows, key=lambda item: item[0])]


# --- formats -------------------------------------------------------------------------------------------------------


def test_a_csv_with_quotes_newlines_and_further_columns(tmp_path: Path) -> None:
    content = 'id,label,text\r\n1,pos,"so ""good"", really\nyes"\r\n\r\n2, neg ,bad &amp; sad\r\n'
    rows, counts = read(tmp_path / "d.csv", content)
    assert rows == [('so "good", really yes', "pos"), ("bad & sad", "neg")]
    assert counts == ReadCounts(read=2)


@pytest.mark.parametrize("name", ["d.tsv", "D.TSV", "d.tsv.gz"])
def test_a_tsv(tmp_path: Path, name: str) -> None:
    content = b'text\tlabel\na, b\tx\n"c\td"\ty\n'
    rows, _ = read(tmp_path / name, gzip.compress(content) if name.endswith("gz") else content)
    assert rows == [("a, b", "x"), ("c d", "y")]


@pytest.mark.parametrize("name", ["d.jsonl", "d.ndjson.gz"])
def test_json_lines_and_what_becomes_of_their_values(tmp_path: Path, name: str) -> None:
    values: list[object] = ["pos", 1, 1.0, 0.5, True, None, float("nan"), " ", ["a"], {"a": 1}]
    lines = [json.dumps({"text": f"t{i}", "label": value, "more": [1]}) for i, value in enumerate(values)]
    lines += ["", '{"text": 12, "label": "n"}', '{"label": "n"}', '{"text": "t"}', '{"text": [], "label": "n"}']
    content = "\n".join(lines).encode()
    rows, counts = read(tmp_path / name, gzip.compress(content) if name.endswith("gz") else content)
    assert rows == [("t0", "pos"), ("t1", "1"), ("t2", "1"), ("t3", "0.5"), ("t4", "True"), ("12", "n")]
    assert counts == ReadCounts(read=14, unlabelled=4, empty=1, malformed=3, first_malformed_line=9)


@pytest.mark.parametrize("name", ["d.csv", "d.csv.gz"])
def test_compression_is_seen_from_the_content(tmp_path: Path, name: str) -> None:
    for content in (b"text,label\na,x\n", gzip.compress(b"text,label\na,x\n")):
        assert read(tmp_path / name, content)[0] == [("a", "x")]


@pytest.mark.parametrize(("name", "content"), [("d.csv", "text,label\na,x\n"), ("d.jsonl", '{"text":"a","label":"x"}')])
def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path, name: str, content: str) -> None:
    assert read(tmp_path / name, "\ufeff" + content)[0] == [("a", "x")]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_every_kind_of_line_end(tmp_path: Path, end: str) -> None:
    assert read(tmp_path / "d.csv", end.join(["text,label", "a,x", "b,y"]))[0] == [("a", "x"), ("b", "y")]


def test_names_of_columns_are_cleaned_and_empty_ones_may_repeat(tmp_path: Path) -> None:
    assert read(tmp_path / "d.csv", "text, label ,,\na,x,,\n")[0] == [("a", "x")]


# --- damage --------------------------------------------------------------------------------------------------------


def test_bytes_that_are_not_utf8_are_replaced_and_counted_by_row(tmp_path: Path) -> None:
    rows, counts = read(tmp_path / "d.csv", b'text,label\ncaf\xe9 \xff,x\n"a\xe9\n\xe9b",x\ngood \xc3\xa9,x\n')
    assert rows == [("caf\ufffd \ufffd", "x"), ("a\ufffd \ufffdb", "x"), ("good é", "x")]
    assert counts == ReadCounts(read=3, damaged=2)


def test_lone_surrogates_written_in_json_count_as_damage(tmp_path: Path) -> None:
    content = r'{"text": "a \ud83d b", "label": "x"}' + "\n" + r'{"text": "\ud83d\ude00", "label": "x"}'
    rows, counts = read(tmp_path / "d.jsonl", content)
    assert rows == [("a b", "x"), ("\U0001f600", "x")]
    assert counts.damaged == 1


def test_nul_bytes_are_dropped(tmp_path: Path) -> None:
    assert read(tmp_path / "d.csv", b"text,label\na\0b,x\0\n")[0] == [("ab", "x")]
    assert read(tmp_path / "d.jsonl", b'{"text": "a\0b", "label": "x"}')[0] == [("ab", "x")]


def test_rows_without_label_text_or_columns_are_counted(tmp_path: Path) -> None:
    content = 'id,text,label\n1,a,x\n2,b,\n3,c, \n4,,x\n5, &#8203; ,x\n6,d\n7\n8,e,x,y,z\n9,"",""\n'
    rows, counts = read(tmp_path / "d.csv", content)
    assert rows == [("a", "x"), ("e", "x")]
    assert counts == ReadCounts(read=9, unlabelled=3, empty=2, malformed=2, first_malformed_line=7)


@pytest.mark.parametrize("quote", ["", '"'])
def test_an_endless_value_is_skipped(tmp_path: Path, quote: str) -> None:
    content = f"text,label\na,x\n{quote}{'b' * (dataset.MAX_FIELD + 1)}{quote},x\nc,x\n"
    rows, counts = read(tmp_path / "d.csv", content)
    assert rows == [("a", "x"), ("c", "x")]
    assert (counts.malformed, counts.first_malformed_line) == (1, 3)


def test_the_limit_of_other_csv_readers_stays(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text("text,label\na,x\nb,x\n")
    before = csv.field_size_limit(777)
    try:
        for _ in read_rows(tmp_path / "d.csv", "text", "label", counts=ReadCounts()):
            assert csv.field_size_limit() == 777
        assert csv.field_size_limit() == 777
    finally:
        csv.field_size_limit(before)


@pytest.mark.parametrize("name", ["d.csv.gz", "d.jsonl.gz"])
def test_an_endless_line_is_skipped_in_bounded_memory(tmp_path: Path, name: str) -> None:
    first, last = ("text,label\na,x\n", "b,x\n")
    if "json" in name:
        first, last = ('{"text": "a", "label": "x"}\n', '{"text": "b", "label": "x"}\n')
    content = gzip.compress(first.encode() + b" " * (16 * dataset.MAX_ROW) + b"\n" + last.encode(), 1)
    tracemalloc.start()
    rows, counts = read(tmp_path / name, content)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert rows == [("a", "x"), ("b", "x")]
    assert counts.malformed == 1
    assert peak < 6 * dataset.MAX_ROW


@pytest.mark.parametrize("n_after", [10, 30_000])  # the end of the file, or the bound on a value, ends the quotation
def test_a_quotation_that_never_ends_costs_one_row(tmp_path: Path, n_after: int) -> None:
    after = [(f"message number {i} and what it says", "y") for i in range(n_after)]
    content = 'text,label\na,x\n"b,x\n' + "".join(f"{text},{label}\n" for text, label in after)
    assert n_after == 10 or len(content) > dataset.MAX_FIELD
    rows, counts = read(tmp_path / "d.csv", content)
    assert rows == [("a", "x"), *after]
    assert (counts.read, counts.malformed, counts.first_malformed_line) == (n_after + 2, 1, 3)


def test_rows_after_a_quotation_that_never_ends_keep_their_damage_and_numbers(tmp_path: Path) -> None:
    rows, counts = read(tmp_path / "d.csv", b'text,label\n"a,x\ncaf\xe9,x\nb\n')
    assert rows == [("caf\ufffd", "x")]
    assert counts == ReadCounts(read=3, damaged=1, malformed=2, first_malformed_line=2)


def test_a_quotation_that_ends_at_the_next_one_costs_two_lines(tmp_path: Path) -> None:
    rows, counts = read(tmp_path / "d.csv", 'text,label\n"a,x\nb,x\nc,x\nd,"x\ne,x\n')
    assert rows == [("b", "x"), ("c", "x"), ("e", "x")]
    assert counts == ReadCounts(read=5, malformed=2, first_malformed_line=2)


@pytest.mark.parametrize("line", ['x","y\n', '"\n', '","\n', '"x\n', '""",""\n', '"" "\n', '"x","y\n'])
def test_no_line_is_read_more_than_twice(tmp_path: Path, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "MAX_ROW", 2000)
    monkeypatch.setattr(dataset, "MAX_FIELD", 500)
    given_lines = 0
    original = dataset._Lines.__next__

    def count(self: dataset._Lines) -> str:
        nonlocal given_lines
        given_lines += 1
        return original(self)

    monkeypatch.setattr(dataset._Lines, "__next__", count)
    path = tmp_path / "d.csv"
    path.write_text('text,label\na,b\n"' + line * 5000)
    counts = ReadCounts()
    rows = list(read_rows(path, "text", "label", counts=counts))
    assert rows[0] == Row("a", "b")
    # and the end of the file once in each row that it cuts
    assert given_lines <= 2 * (5000 + 2) + counts.read + 1


def test_a_few_bad_json_lines_are_counted_and_many_refused(tmp_path: Path) -> None:
    good = '{"text": "a", "label": "x"}\n'
    deep = "[" * 100_000
    bad = ["{", "[1]", "3", '"text"', deep, "nonsense", '{"text": ' + "9" * 5000 + "}", "\x01", "{'a': 1}", "NaN"]
    rows, counts = read(tmp_path / "d.jsonl", good + "\n".join(bad) + "\n" + good)
    assert len(rows) == 2
    assert (counts.malformed, counts.first_malformed_line) == (10, 2)
    error = failure(tmp_path / "d.jsonl", good * 100 + "\n".join(bad) + "\n}\n")
    assert "11 of 111 lines" in error.message
    assert "the first is line 101" in error.message
    assert len(read(tmp_path / "d.jsonl", good * 1089 + "{\n" * 11)[0]) == 1089  # 11 are 1 % of 1100
    assert "the first is line 1089" in failure(tmp_path / "d.jsonl", good * 1088 + "{\n" * 11).message


@pytest.mark.parametrize("n_bytes", [4, 15, -9, -3])
@pytest.mark.parametrize("name", ["d.csv.gz", "d.jsonl.gz"])
def test_a_gzip_file_cut_short_is_named(tmp_path: Path, name: str, n_bytes: int) -> None:
    lines = ["text,label", *(f"{i},x" for i in range(1000))]
    if "json" in name:
        lines = [json.dumps({"text": str(i), "label": "x"}) for i in range(1000)]
    whole = gzip.compress("\n".join(lines).encode())
    error = failure(tmp_path / name, whole[:n_bytes])
    assert "cut short" in error.message
    assert name in error.message


def test_a_gzip_file_with_flipped_bytes_is_damaged(tmp_path: Path) -> None:
    whole = bytearray(gzip.compress(b"text,label\n" + os.urandom(3000).hex().encode() + b",x\n"))
    whole[len(whole) // 2] ^= 0xFF
    assert "damaged" in failure(tmp_path / "d.csv", bytes(whole)).message
    assert "damaged" in failure(tmp_path / "d.csv", gzip.compress(b"text,label\na,x\n") + b"rest").message


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(["csv", "tsv", "jsonl", "csv.gz"]), st.binary(max_size=200), st.booleans())
def test_any_bytes_give_rows_or_a_named_error(
    tmp_path_factory: pytest.TempPathFactory, kind: str, content: bytes, with_header: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / f"any.{kind}"
    separator = b"\t" if kind == "tsv" else b","
    first = b'{"text": "a", "label": "b"}\n' if kind == "jsonl" else b"text" + separator + b"label\n"
    with contextlib.suppress(EdgeError):
        rows, counts = read(path, (first if with_header else b"") + content)
        assert all(text and label for text, label in rows)
        assert counts.read == len(rows) + counts.unlabelled + counts.empty + counts.malformed


# --- mistakes ------------------------------------------------------------------------------------------------------


def test_a_column_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    for name, content in (("d.csv", "tweet,Labels\na,x\n"), ("d.jsonl", '{"tweet": "a", "Labels": "x"}\n')):
        error = failure(tmp_path / name, content, text="tweet")
        assert isinstance(error, UsageError)
        assert "no column 'label'; it has 'tweet', 'Labels'" in error.message
        assert "did you mean 'Labels'?" in error.hint
        error = failure(tmp_path / name, content, label="Labels", text="zzz")
        assert "no column 'zzz'" in error.message
        assert "first line" in error.hint


def test_a_file_without_header_does_not_flood_the_terminal(tmp_path: Path) -> None:
    error = failure(tmp_path / "d.csv", ",".join(f"{'very ' * 1000}long{i}\x1b[31m" for i in range(100)))
    assert len(str(error)) < 1500
    assert "\x1b" not in str(error)


def test_another_delimiter_is_recognised(tmp_path: Path) -> None:
    assert "not ';'" in failure(tmp_path / "d.csv", "text;label\na;x\n").hint
    assert "not ','" in failure(tmp_path / "d.tsv", "text,label\na,x\n").hint


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.csv", "", "is empty"),
        ("d.csv", "\n\n", "is empty"),
        ("d.csv.gz", gzip.compress(b"", mtime=0), "is empty"),
        ("d.jsonl", "\n", "is empty"),
        ("d.csv", "text,label\n", "header and no rows"),
        ("d.csv", "text,label,label\na,x,y\n", "several columns 'label'"),
        ("d.csv", "text,label,id,id\na,x,1,2\n", "several columns 'id'"),
        ("d.csv", "text,label\na,\nb, \n", "all 2 rows of .* are unlabelled: column 'label'"),
        ("d.jsonl", '{"text": "a", "label": null}\n', "all 1 rows of .* are unlabelled: column 'label'"),
        ("d.csv", "text,label\n,x\n,y\n", "column 'text' of .* has no text"),
        ("d.csv", "text,label\na\nb\n", "no row with all columns"),
        ("d.csv", '"text,label\na,b\n', "line 1 of .* cannot be read"),
        ("d.jsonl", '[{"text": "a", "label": "x"}]', "no JSON object"),
        ("d.csv", "text,label\na,x\n".encode("utf-16"), "is UTF-16"),
        ("d.xlsx", "PK", "unknown format: its name ends in '.xlsx'"),
        ("d.gz", "text,label\na,x\n", "unknown format"),
        ("csv", "text,label\na,x\n", "unknown format"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(EdgeError, match=message) as caught:
        read(tmp_path / name, content)
    assert caught.value.hint


def test_text_and_label_must_differ(tmp_path: Path) -> None:
    assert "as the text and as the label" in failure(tmp_path / "d.csv", "text\na\n", label="text").message


def test_what_is_no_readable_file_is_a_usage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder.csv").mkdir()
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "file.csv").write_text("text,label\na,x\n")
    (tmp_path / "loop.csv").symlink_to(tmp_path / "loop.csv")
    cases = {
        "missing.csv": "there is no file",
        "file.csv/d.csv": "there is no file",
        "folder.csv": "is a directory",
        "pipe.csv": "not a regular file",
        "loop.csv": "cannot be read",
        "nul\0.csv": "cannot be read",
        "file.csv": "cannot be read: Permission denied",
    }

    def refuse(self: Path, mode: str = "r") -> None:  # file modes do not bind root, who may run the tests
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)
    for name, message in cases.items():
        with pytest.raises(UsageError, match=message) as caught:
            next(read_rows(tmp_path / name, "text", "label", counts=ReadCounts()))
        assert caught.value.hint


# --- streaming -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compress", [False, True])
def test_progress_rises_to_one(tmp_path: Path, compress: bool) -> None:
    content = b"text,label\n" + b"".join(b"%d %s,x\n" % (i, os.urandom(20).hex().encode()) for i in range(20_000))
    path = tmp_path / "d.csv"
    path.write_bytes(gzip.compress(content, 1) if compress else content)
    seen: list[float] = []
    assert sum(1 for _ in read_rows(path, "text", "label", counts=ReadCounts(), progress=seen.append)) == 20_000
    assert seen == sorted(seen)
    assert seen[-1] == 1
    assert 0 < seen[0] < 0.2
    assert len(set(seen)) > 10


def test_a_large_file_is_streamed_in_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    n = 40_000
    with path.open("w") as file:
        file.write("id,text,label\n")
        for i in range(n):
            file.write(f"{i},message number {i - i % 2} about {'this and that ' * 4},{i % 7 % 3}\n")
    counts = ReadCounts()
    tracemalloc.start()
    sample = sample_rows(read_rows(path, "text", "label", counts=counts), 1000, seed=0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert counts.read == n
    assert len(sample.rows) == 1000
    assert sum(sample.totals.values()) == n // 2
    assert sample.n_duplicates + sample.n_conflicting == n // 2
    assert min(sample.n_duplicates, sample.n_conflicting) > 1000
    # 3 reservoirs of 1000 rows of some 300 bytes, a table of 2**15 slots of 9 bytes and the half of it it grew from
    assert peak < 2.5 * 2**20


# --- sampling ------------------------------------------------------------------------------------------------------


def test_all_rows_are_kept_in_order_if_there_is_room() -> None:
    rows = rows_of(b=30, a=50)
    sample = sample_rows(rows, 80, seed=3)
    assert sample.rows == rows
    assert sample.labels == ("a", "b")
    assert list(sample.totals.items()) == [("a", 50), ("b", 30)]
    assert (sample.n_duplicates, sample.n_conflicting) == (0, 0)


def test_duplicates_and_conflicts_leave_the_first(tmp_path: Path) -> None:
    rows = rows_of(a=20, b=20)
    again = [Row("A 3", "a"), Row("a 3", "b"), Row("A 3", "c"), Row("Straße", "a"), Row("STRASSE", "a")]
    sample = sample_rows(iter(rows + again + rows_of(c=20)), 1000, seed=0)
    assert sample.rows == [*rows, Row("Straße", "a"), *rows_of(c=20)]
    assert (sample.n_duplicates, sample.n_conflicting) == (2, 2)
    assert sample.totals == {"a": 21, "b": 20, "c": 20}


def test_a_sample_is_a_matter_of_its_seed_and_in_the_order_of_the_file() -> None:
    rows = rows_of(a=300, b=700)
    first, same, other = (sample_rows(rows, 200, seed=seed) for seed in (5, 5, 6))
    assert first == same
    assert first.rows != other.rows
    for sample in (first, other):
        assert sorted(sample.rows, key=rows.index) == sample.rows
        assert Counter(row.label for row in sample.rows) == {"a": 60, "b": 140}
        assert sample.totals == {"a": 300, "b": 700}


def test_rare_labels_survive() -> None:
    sample = sample_rows(rows_of(huge=5000, rare=22, few=60, some=400), 640, seed=0)
    kept = Counter(row.label for row in sample.rows)
    # the floor is 640 // 16 = 40; the rest is shared 5000 to 400
    assert kept == {"rare": 22, "few": 40, "some": 43, "huge": 535}


def test_every_row_of_a_label_is_as_likely_as_any_other() -> None:
    rows = rows_of(a=60, b=60)
    chosen = Counter(row.text for seed in range(600) for row in sample_rows(rows, 40, seed=seed).rows)
    # 200 expected of each; standard deviation 11.5
    assert len(chosen) == 120
    assert all(140 < n < 260 for n in chosen.values())


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 10**7), min_size=2, max_size=MAX_LABELS), st.integers(2, 10**5))
def test_quotas_add_up_and_keep_their_floors(counts: list[int], max_rows: int) -> None:
    totals = {str(i): n for i, n in enumerate(counts)}
    quotas = dataset._quotas(totals, max_rows)
    assert sum(quotas.values()) == min(max_rows, sum(counts))
    for label, n in totals.items():
        assert min(n, max_rows // (4 * len(totals))) <= quotas[label] <= n


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["10", "9", "-1", "2.5"], ("-1", "2.5", "9", "10")),
        (["10", "9", "x"], ("10", "9", "x")),
        (["nan", "2", "10"], ("10", "2", "nan")),
    ],
)
def test_labels_are_in_natural_order(labels: list[str], expected: tuple[str, ...]) -> None:
    assert sample_rows(rows_of(**dict.fromkeys(labels, 20)), 1000, seed=0).labels == expected


@pytest.mark.parametrize(
    ("rows", "max_rows", "message"),
    [
        ([], 1000, "no labelled rows"),
        (rows_of(a=50), 1000, "all 50 rows have the same label, 'a'"),
        (rows_of(a=50, b=19, c=3), 1000, f"at least {MIN_ROWS_PER_LABEL} rows .* 'a' 50, 'b' 19, 'c' 3"),
        (rows_of(a=50, b=19) * 2, 1000, "'a' 50, 'b' 19"),
        (rows_of(a=50, b=50), 39, "39 rows are too few for 2 labels"),
    ],
)
def test_samples_that_cannot_be_trained_on(rows: list[Row], max_rows: int, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        sample_rows(rows, max_rows, seed=0)
    assert caught.value.hint


def test_a_column_of_too_many_labels_is_refused_at_once() -> None:
    def endless() -> Iterator[Row]:
        for i in range(10**12):
            yield Row(f"text {i}", f"id {i}")

    with pytest.raises(UsageError, match="more than 64 different labels, for example 'id 0', 'id 1'"):
        sample_rows(endless(), 1000, seed=0)
    assert len(sample_rows(rows_of(**{str(i): 20 for i in range(64)}), 10_000, seed=0).labels) == 64


def test_the_hash_table_is_a_dictionary() -> None:
    table = TextTable()
    truth: dict[int, int] = {}
    random = np.random.default_rng(0).integers(1, 2**64, size=5000, dtype=np.uint64).tolist()
    # neighbours and equal low bits collide; the table grows, and the last slot is followed by the first
    keys = [*random, *range(1, 3000), *(k << 40 for k in range(200)), *(2**64 - k for k in range(1, 500))]
    for i, key in enumerate(keys + keys):
        assert table.put(key, i % 64) == truth.get(key or 1)
        truth.setdefault(key or 1, i % 64)


# --- splitting -----------------------------------------------------------------------------------------------------


def test_a_split_keeps_shares_and_is_a_matter_of_its_seed() -> None:
    rows = rows_of(a=200, b=40)
    first, same, other = (split(rows, ("a", "b"), seed=seed) for seed in (1, 1, 2))
    assert all(np.array_equal(x, y) for x, y in zip(first, same, strict=True))
    assert not np.array_equal(first[0], other[0])
    counted = [Counter(rows[i].label for i in part) for part in first]
    assert counted == [{"a": 140, "b": 28}, {"a": 30, "b": 6}, {"a": 30, "b": 6}]
    assert all(part.dtype == np.int64 and np.all(np.diff(part) > 0) for part in first)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(3, 60), min_size=1, max_size=5),
    st.tuples(*[st.floats(0.001, 1)] * 3),
    st.integers(0, 2**32 - 1),
)
def test_every_label_is_in_every_part_once(sizes: list[int], weights: tuple[float, ...], seed: int) -> None:
    rows = rows_of(**{f"l{i}": n for i, n in enumerate(sizes)})
    a, b, c = (weight / sum(weights) for weight in weights)
    parts = split(rows, [f"l{i}" for i in range(len(sizes))], (a, b, c), seed=seed)
    assert sorted(np.concatenate(parts)) == list(range(len(rows)))
    for part in parts:
        assert len({rows[i].label for i in part}) == len(sizes)


def test_splits_that_cannot_be_made() -> None:
    with pytest.raises(UsageError, match="label 'b' has 2 rows"):
        split(rows_of(a=20, b=2), ("a", "b"), seed=0)
    for shares in ((0.5, 0.5, 0.0), (0.7, 0.2, 0.2), (float("nan"), 0.5, 0.5)):
        with pytest.raises(UsageError, match="three parts"):
            split(rows_of(a=20), ("a",), shares, seed=0)
