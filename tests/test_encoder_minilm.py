"""all-MiniLM-L6-v2 as it is published, where its package is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.encoder import SentenceEncoder
from edge_runtime.encoder.build import Built, build_encoder
from edge_runtime.encoder.recipes import FLOAT32, INT8, RECIPES
from tests.encoder_helpers import need_libraries

need_libraries()

RECIPE = RECIPES["minilm-l6"]

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec(RECIPE.module) is None, reason=f"the weights are not installed: {RECIPE.install}"
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return build_encoder(RECIPE, tmp_path_factory.mktemp("minilm"))


@pytest.mark.parametrize("file", [FLOAT32, INT8])
def test_it_finds_what_means_the_same(built: Built, file: str) -> None:
    encoder = SentenceEncoder(built.folder / file)
    assert (encoder.n_embd, encoder.max_tokens) == (384, 256)
    asked, same, other = encoder.encode(
        ["How do I boil an egg?", "Cooking an egg in hot water", "Trains leave at nine."]
    )
    assert asked @ same > 0.6
    assert abs(asked @ other) < 0.2


def test_the_files_are_as_like_the_reference_as_is_promised(built: Built) -> None:
    assert built.record["cosines"][FLOAT32]["least"] >= 0.9999
    assert built.record["cosines"][INT8]["least"] >= 0.98


def test_the_two_files_agree_on_other_sentences(built: Built) -> None:
    texts = [line for line in Path(__file__).read_text("utf-8").splitlines() if line.strip()]
    float32, int8 = (SentenceEncoder(built.folder / file).encode(texts) for file in (FLOAT32, INT8))
    assert np.mean((float32 * int8).sum(1)) >= 0.98
