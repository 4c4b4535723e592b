"""What the verbs that read labelled messages say while they work."""

from __future__ import annotations

from collections.abc import Iterator

from .labels.dataset import ReadCounts


def read_notes(counts: ReadCounts, n_duplicates: int, n_conflicting: int, n_used: int, max_rows: int) -> Iterator[str]:
    """What was met while reading, in lines: rows left out and why, and how many of the rest are used."""
    skipped = {
        "without a label": counts.unlabelled,
        "without a text": counts.empty,
        "that cannot be read": counts.malformed,
        "seen before": n_duplicates,
        "seen before with another label": n_conflicting,
    }
    listed = ", ".join(f"{n:,} {what}" for what, n in skipped.items() if n)
    yield f"{counts.read:,} rows read{f'; left out: {listed}' if listed else ''}"
    if counts.first_malformed_line is not None:
        yield f"warning: the first row that cannot be read is in line {counts.first_malformed_line}"
    if counts.damaged:
        sign = "\N{REPLACEMENT CHARACTER}"
        yield f"warning: {counts.damaged:,} rows hold bytes that are not UTF-8; they are read as {sign}"
    total = counts.kept - n_duplicates - n_conflicting
    if n_used < total:
        yield f"{n_used:,} of {total:,} different messages are used (--max-rows {max_rows})"
