"""Options of the command line become what the runtime is to do."""

from __future__ import annotations

import math
import typing
from typing import Annotated, Optional

import pytest

from edge_runtime.errors import BoundaryError, UsageError
from edge_runtime.native import KvType
from edge_runtime.options import RunArguments, _annotations, parse_boundaries, parse_thresholds, run_options
from edge_runtime.resolve import DRAFTS
from edge_runtime.types import Mode


def choices(name: str) -> set[str]:
    annotated = typing.get_type_hints(RunArguments, include_extras=True)[name]
    return set(typing.get_args(typing.get_args(annotated)[0]))


def test_the_choices_on_the_command_line_are_the_runtimes() -> None:
    assert choices("mode") == {m.value for m in Mode}
    optional, _none = typing.get_args(
        typing.get_args(typing.get_type_hints(RunArguments, include_extras=True)["draft"])[0]
    )
    assert typing.get_args(optional) == DRAFTS
    assert choices("kv_type") == {k.value for k in KvType}


@pytest.mark.parametrize(("text", "layers"), [("8", (8,)), ("8,16", (8, 16)), (" 8 , 16 ", (8, 16)), (None, None)])
def test_boundaries(text: str | None, layers: tuple[int, ...] | None) -> None:
    assert parse_boundaries(text) == layers


@pytest.mark.parametrize("text", ["", "a", "8,", "8;16", "8.5", "9" * 5000])
def test_boundaries_that_are_no_numbers(text: str) -> None:
    with pytest.raises(BoundaryError, match="are not layer numbers"):
        parse_boundaries(text)


@pytest.mark.parametrize(("text", "values"), [("0.5", (0.5,)), ("0,inf", (0.0, math.inf)), ("1e-3", (0.001,))])
def test_thresholds(text: str, values: tuple[float, ...]) -> None:
    assert parse_thresholds(text) == values


@pytest.mark.parametrize("text", ["", "x", "1,", "nan", "-1", "0.5,-0.1", "-inf"])
def test_thresholds_that_are_no_entropies(text: str) -> None:
    with pytest.raises(UsageError, match="threshold"):
        parse_thresholds(text)


def test_a_threshold_in_mode_full_cannot_be_meant() -> None:
    with pytest.raises(UsageError, match="mode full"):
        run_options(RunArguments(mode="full", threshold="1"))


def test_a_seed_is_drawn_only_where_chance_decides() -> None:
    assert run_options(RunArguments()).sampling.seed == 0
    drawn = {run_options(RunArguments(temperature=1.0)).sampling.seed for _ in range(3)}
    assert len(drawn) > 1
    assert run_options(RunArguments(temperature=1.0, seed=7)).sampling.seed == 7


@pytest.mark.parametrize(
    "arguments",
    [
        RunArguments(temperature=math.nan),
        RunArguments(temperature=-1),
        RunArguments(top_p=0),
        RunArguments(min_p=2),
        RunArguments(seed=-1),
        RunArguments(seed=2**32 - 1),  # llama.cpp's word for a random one
        RunArguments(repeat_penalty=0),
    ],
)
def test_settings_out_of_range(arguments: RunArguments) -> None:
    with pytest.raises(UsageError, match="out of range"):
        run_options(arguments)


def test_an_option_that_may_be_missing_stays_an_option() -> None:
    """As Python 3.10 sees parameters whose default is None."""

    def verb(
        wrapped: Optional[Annotated[str | None, "an option"]] = None,  # noqa: UP045
        plain: Annotated[int, "a number"] = 0,
    ) -> None:
        pass

    found = _annotations(verb)
    assert found["wrapped"] == Annotated[str | None, "an option"]
    assert found["plain"] == Annotated[int, "a number"]
