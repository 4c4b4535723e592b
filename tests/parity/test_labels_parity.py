"""On the real model: a message's states and decision do not depend on company, prefix cache or restarts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edge_runtime.bench.moderation_probe import probe_sentences
from edge_runtime.labels import ClassifierOptions, LabelClassifier, LabelPack, find_pack, moderation
from edge_runtime.labels.classifier import message_tokens, prefix_tokens
from edge_runtime.labels.prepare import prepare
from edge_runtime.labels.states import groups
from edge_runtime.labels.trunk import Trunk, TrunkOptions
from edge_runtime.native import Model
from edge_runtime.types import Floats

pytestmark = pytest.mark.model

EDGES = (2, 8, 16)
SENTENCES = [sentence.text for sentence in probe_sentences()]


@pytest.fixture(scope="module")
def messages(demo_model: Model) -> list[list[int]]:
    """Real sentences, a single token, and a text of several batches."""
    long = " ".join(SENTENCES[:12])
    texts = [*SENTENCES[:24], "no", long]
    return [message_tokens(demo_model, prepare(text), 200)[0] for text in texts]


def climb(trunk: Trunk, messages: list[list[int]]) -> list[list[Floats]]:
    """States of each message at each edge."""
    found: list[list[Floats]] = [[] for _ in messages]
    first = 0
    for part in groups(messages, trunk):
        group = trunk.start(part)
        for _ in trunk.edges:
            group.advance()
            for i, states in enumerate(group.states()):
                found[first + i].append(states)
        first += len(part)
    return found


def test_states_are_the_same_alone_in_company_and_without_a_kept_prefix(
    demo_model: Model, messages: list[list[int]]
) -> None:
    """Bit for bit."""
    prefix = prefix_tokens(demo_model, moderation.INSTRUCTION)
    trunk = Trunk(demo_model, EDGES, prefix, TrunkOptions(n_threads=1))
    plain = Trunk(demo_model, EDGES, [], TrunkOptions(n_threads=1))
    together = climb(trunk, messages)
    for message, states in zip(messages, together, strict=True):
        (alone,) = climb(trunk, [message])
        (scratch,) = climb(plain, [prefix + message])
        for level in range(len(EDGES)):
            assert np.array_equal(states[level], alone[level])
            assert np.array_equal(states[level], scratch[level][len(prefix) :])
    trunk.close()
    plain.close()


def test_decisions_are_the_same_one_by_one_and_after_a_restart(
    demo_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All fields, to the last bit; the second classifier finds the instruction in a file."""
    monkeypatch.setenv("EDGE_RUNTIME_CACHE", str(tmp_path))
    pack = LabelPack.load(find_pack("moderation"))
    texts = [*SENTENCES[:60], "", "<|im_end|>", "No."]
    for options in (ClassifierOptions(n_threads=1), ClassifierOptions(n_threads=1, use_ngrams=False)):
        with LabelClassifier(pack, demo_model, options) as classifier:
            together = classifier.predict(texts)
        assert list(tmp_path.glob("prefixes/*.prefix"))
        with LabelClassifier(pack, demo_model, options) as classifier:
            assert [classifier.predict([text])[0] for text in texts] == together


def test_the_bundled_pack_is_for_the_demo_model_and_fits_its_card(demo_path: Path) -> None:
    path = find_pack("moderation")
    pack = LabelPack.load(path)
    with LabelClassifier(pack, demo_path) as classifier:
        plain, rude = classifier.predict(["The meeting is at ten.", "You are a stupid bitch."])
    assert (plain.label, rude.label) == ("neither", "offensive")
    assert path.stat().st_size < 2**20
    card = path.with_suffix(".md").read_text("utf-8")
    about_probe = card.split("## Where words mislead")[1].split("## Limits")[0]
    probe_lines = about_probe[about_probe.index("|") :].strip().splitlines()
    assert card == moderation.card(pack, path.stat().st_size, probe_lines)
    assert pack.report["certificate"]["holds"]
