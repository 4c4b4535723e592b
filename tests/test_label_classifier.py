"""A pack at work: the same decision alone, in company, over threads and restarts, and no layer more than needed."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_runtime.errors import PackError, UsageError
from edge_runtime.identity import identify
from edge_runtime.labels import classifier as classifier_module
from edge_runtime.labels import trunk as trunk_module
from edge_runtime.labels.cascade import run, weigh
from edge_runtime.labels.classifier import CONFIDENCE, DISTANCE, ClassifierOptions, LabelClassifier, message_tokens
from edge_runtime.labels.decision import UNSURE, Decision
from edge_runtime.labels.drift import WINDOW, reference_of
from edge_runtime.labels.evaluate import stage_probabilities
from edge_runtime.labels.fit import Linear
from edge_runtime.labels.novelty import StateNovelty, fit_word_novelty
from edge_runtime.labels.pack import LabelPack, NgramStage
from edge_runtime.labels.prefix import PrefixStore
from edge_runtime.labels.prepare import prepare
from edge_runtime.labels.stack import Probe
from edge_runtime.labels.trunk import Group
from edge_runtime.native import Model

from .conftest import TinyMaker

LABELS = ("calm", "odd", "rude")
LAYERS = (2, 4, 5)
N_EMBD = 64
BITS = 8
MAX_TOKENS = 40  # bytes, with this tokenizer
NEVER, ALWAYS = 2.0, 0.0
WORDS = ("you", "are", "a", "fool", "friend", "see", "the", "sun", "tomorrow", "never", "again", "please")
ODD_TEXTS = ("", " \t\n ", "x", "\u200b", "<|end|>", "</s>", "<s>", "<|im_end|>", "\x00", "a" * 300, "漢字", "🙂")

Opener = Callable[..., LabelClassifier]


def messages(n: int, seed: int = 1) -> list[str]:
    """Different texts, of different lengths."""
    random = np.random.default_rng(seed)
    return [f"{i} " + " ".join(random.choice(WORDS, random.integers(1, 9))) for i in range(n)]


MESSAGES = [*messages(60), *ODD_TEXTS]


def make_pack(model: Path, leave: Sequence[float] = (0.75, 0.45, 0.6, ALWAYS), **changes: Any) -> LabelPack:
    """Random weights, and words and states that some messages are unlike; `leave`: confidence that each stage asks."""
    random = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        return random.standard_normal(shape).astype(np.float32)

    n = len(LABELS)
    pools = (("mean",), ("max", "last"), ("last",))
    probes = tuple(
        Probe(layer, kinds, Linear(0.1 * normal(n, len(kinds) * N_EMBD + stage * n), normal(n)), 1.5)
        for stage, (layer, kinds) in enumerate(zip(LAYERS, pools, strict=True), 1)
    )
    basis = np.linalg.qr(normal(N_EMBD, 3))[0].T.astype(np.float32)
    pack = LabelPack(
        name="manners",
        labels=LABELS,
        instruction="<|turn|>How is this?\n",
        max_tokens=MAX_TOKENS,
        model=identify(model),
        ngrams=NgramStage(
            BITS,
            random.integers(-127, 128, (n, 2**BITS)).astype(np.int8),
            np.full(n, 0.02, np.float32),
            np.zeros(n, np.float32),
            1.0,
        ),
        probes=probes,
        weights=np.array([1.0, 1.3, 0.8], np.float32),
        thresholds=np.repeat(np.array(leave, np.float32)[:, None], n, axis=1),
        unsure_below=0.0,
        words=dataclasses.replace(fit_word_novelty([" ".join(WORDS)] * 2)[0], limit=0.4),
        # with this offset some of the messages are beyond the limit
        states=StateNovelty(np.zeros(N_EMBD, np.float32), basis, np.ones(4, np.float32), 0.0, 1.0, 1e6, 2.0),
        references={},
        report={},
    )
    return dataclasses.replace(pack, **changes)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGE_RUNTIME_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module", autouse=True)
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Of what is made once for all tests."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("EDGE_RUNTIME_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def model_path(tiny_path: TinyMaker) -> Path:
    return tiny_path("llama", tokenizer=True)


@pytest.fixture(scope="module")
def model(model_path: Path) -> Iterator[Model]:
    with Model(str(model_path)) as model:
        yield model


@pytest.fixture(scope="module")
def pack(model_path: Path) -> LabelPack:
    return make_pack(model_path)


@pytest.fixture
def open_(model: Model, model_path: Path) -> Iterator[Opener]:
    """open_(leave or a pack, **options): a classifier, closed after the test."""
    opened: list[LabelClassifier] = []

    def open_(pack: LabelPack | Sequence[float], **options: Any) -> LabelClassifier:
        chosen = pack if isinstance(pack, LabelPack) else make_pack(model_path, pack)
        opened.append(LabelClassifier(chosen, model, ClassifierOptions(**{"n_threads": 1, **options})))
        return opened[-1]

    yield open_
    for classifier in opened:
        classifier.close()


@pytest.fixture(scope="module")
def expected(pack: LabelPack, model: Model) -> list[Decision]:
    """Decisions of MESSAGES, each made alone."""
    with LabelClassifier(pack, model, ClassifierOptions(n_threads=1, keep_prefix=False)) as classifier:
        return [classifier.predict([text])[0] for text in MESSAGES]


# ── the same decision, however it is asked for ──────────────────────────────────────────────────────────────────────


def test_messages_leave_at_every_stage(expected: list[Decision]) -> None:
    """Or the other tests would say little."""
    assert {d.stage for d in expected} == {0, 1, 2, 3}
    assert {d.unfamiliar for d in expected} == {True, False}
    assert {d.label for d in expected} == set(LABELS)
    assert any(d.n_cut for d in expected)


@pytest.mark.parametrize("batch", [2, 7, 64, 1000])
def test_a_message_gets_the_same_in_company_as_alone(
    open_: Opener, pack: LabelPack, expected: list[Decision], batch: int
) -> None:
    assert open_(pack).predict(MESSAGES) == expected
    assert list(open_(pack).stream(iter(MESSAGES), batch)) == expected


def test_a_message_gets_the_same_in_another_order(open_: Opener, pack: LabelPack, expected: list[Decision]) -> None:
    classifier = open_(pack)
    places = np.random.default_rng(0).permutation(len(MESSAGES))
    for _ in range(2):
        assert classifier.predict([MESSAGES[i] for i in places]) == [expected[i] for i in places]


def test_the_asynchronous_ways_give_the_same(open_: Opener, pack: LabelPack, expected: list[Decision]) -> None:
    classifier = open_(pack)

    async def texts() -> AsyncIterator[str]:
        for text in MESSAGES:
            yield text

    async def ask() -> tuple[list[Decision], list[Decision], list[list[Decision]]]:
        streamed = [decision async for decision in classifier.stream_async(texts())]
        together = await asyncio.gather(*(classifier.predict_async(MESSAGES[i::4]) for i in range(4)))
        return streamed, await classifier.predict_async(MESSAGES), list(together)

    streamed, at_once, together = asyncio.run(ask())
    assert streamed == at_once == expected
    assert together == [expected[i::4] for i in range(4)]


def test_threads_share_one_classifier(open_: Opener, pack: LabelPack, expected: list[Decision]) -> None:
    classifier = open_(pack)
    found: dict[int, list[Decision]] = {}
    at_once = threading.Barrier(8)

    def work(which: int) -> None:
        at_once.wait(30)
        found[which] = list(classifier.stream(MESSAGES[which::8], 3))

    threads = [threading.Thread(target=work, args=(which,)) for which in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {which: expected[which::8] for which in range(8)}
    assert classifier.stats.messages == len(MESSAGES)


def test_no_messages_no_decisions(open_: Opener, pack: LabelPack) -> None:
    classifier = open_(pack)
    assert classifier.predict([]) == list(classifier.stream([])) == []
    assert classifier.stats.messages == 0


def test_a_stream_takes_no_more_than_it_needs(open_: Opener) -> None:
    taken: list[int] = []

    def texts() -> Iterator[str]:
        for i in range(100):
            taken.append(i)
            yield f"you {i}"

    stream = open_((ALWAYS,) * 4).stream(texts(), 10)
    assert not taken
    next(stream)
    assert len(taken) == 10


# ── what a decision is ──────────────────────────────────────────────────────────────────────────────────────────────


def test_decisions_are_those_of_the_cascade_on_what_all_stages_say(
    pack: LabelPack, model: Model, expected: list[Decision]
) -> None:
    kept = [(text, decision) for text, decision in zip(MESSAGES, expected, strict=True) if prepare(text)]
    texts, decisions = [text for text, _ in kept], [decision for _, decision in kept]
    stages = stage_probabilities(pack, model, texts, n_threads=1)
    held_by_words = pack.words.unfamiliar(pack.words.new_shares([prepare(text) for text in texts]))
    # where a message left before the network its states are unknown, and no reason to stay
    novel = np.array([d.novelty is not None and d.novelty > 1 for d in decisions])
    held = [held_by_words, *[held_by_words | novel] * 3]
    outcome = run([weigh(stage, pack.weights) for stage in stages], pack.thresholds, held)
    assert [d.stage for d in decisions] == outcome.stages.tolist()
    assert [d.label for d in decisions] == [LABELS[k] for k in outcome.labels]
    assert [d.layer for d in decisions] == [pack.layers[s] for s in outcome.stages]
    assert [d.unfamiliar for d in decisions] == held[1].tolist()
    for i, decision in enumerate(decisions):
        said = stages[decision.stage][i]
        assert decision.probabilities == tuple(map(float, said))
        assert decision.confidence == float(said[outcome.labels[i]])


def test_weights_choose_the_label_and_leave_the_probability_as_it_is(open_: Opener, model_path: Path) -> None:
    weights = np.array([1e-6, 1e-6, 1.0], np.float32)
    for decision in open_(make_pack(model_path, weights=weights)).predict(MESSAGES):
        assert decision.label == "rude"
        assert decision.confidence == decision.probabilities[2]
        assert sum(decision.probabilities) == pytest.approx(1, abs=1e-5)


def test_a_saved_pack_decides_the_same(
    open_: Opener, pack: LabelPack, expected: list[Decision], tmp_path: Path
) -> None:
    pack.save(tmp_path / "manners.gguf")
    assert open_(LabelPack.load(tmp_path / "manners.gguf")).predict(MESSAGES) == expected


def test_unfamiliar_messages_leave_nowhere_early(expected: list[Decision]) -> None:
    """By new words, or by states that nobody had seen."""
    climbed = [d for d, text in zip(expected, MESSAGES, strict=True) if d.unfamiliar and prepare(text)]
    assert climbed
    assert all(d.stage == 3 and d.novelty is not None for d in climbed)


@pytest.mark.parametrize("text", ["", " \t\n ", "\u200b"])
def test_a_text_without_anything_in_it_is_decided_without_the_network(open_: Opener, text: str) -> None:
    classifier = open_((NEVER, NEVER, NEVER, ALWAYS))
    (decision,) = classifier.predict([text])
    assert (decision.stage, decision.layer, decision.novelty) == (0, 0, None)
    assert classifier.n_open_slices == 0
    many = classifier.predict([text, "you", text])
    assert [d.layer for d in many] == [0, 5, 0]
    assert many[0] == decision


@pytest.mark.parametrize("text", ["<|end|>", "<|turn|>user", "</s>", "<s>"])
def test_special_tokens_spelt_in_a_message_are_plain_text(open_: Opener, model: Model, text: str) -> None:
    tokens, _ = message_tokens(model, text, MAX_TOKENS)
    assert len(tokens) == len(text)
    assert len(model.tokenize(text, add_special=False, parse_special=True)) < len(text)
    (decision,) = open_((NEVER, NEVER, NEVER, ALWAYS)).predict([text])
    assert decision.layer == 5


def test_what_is_longer_than_the_pack_takes_is_cut_and_counted(open_: Opener) -> None:
    classifier = open_((NEVER, NEVER, NEVER, ALWAYS))
    start = ("youareafool" * 4)[:MAX_TOKENS]
    whole, cut, further = classifier.predict([start, start + "!", start + "andneverseethesun"])
    assert [d.n_cut for d in (whole, cut, further)] == [0, 1, 17]
    assert classifier.stats.cut == 2
    assert cut.novelty == whole.novelty == further.novelty  # the network read the same
    assert open_((ALWAYS,) * 4).predict(["you " * 20])[0].n_cut == 0  # and here nothing at all


# ── abstention ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("by_option", [True, False])
def test_improbable_labels_become_unsure(
    open_: Opener, model_path: Path, expected: list[Decision], by_option: bool
) -> None:
    below = sorted(d.confidence for d in expected)[len(expected) // 2]
    pack = make_pack(model_path, unsure_below=0.999 if by_option else below)
    classifier = open_(pack, unsure_below=below if by_option else None)
    found = classifier.predict(MESSAGES)
    for decision, plain in zip(found, expected, strict=True):
        unsure = plain.confidence < below
        assert decision == dataclasses.replace(plain, label=UNSURE if unsure else plain.label)
        assert decision.unsure == unsure
    assert classifier.stats.unsure == sum(d.unsure for d in found) == len(expected) // 2


def test_the_options_bound_overrules_the_packs(open_: Opener, model_path: Path) -> None:
    pack = make_pack(model_path, unsure_below=1.0)
    assert all(d.unsure for d in open_(pack).predict(MESSAGES))
    assert not any(d.unsure for d in open_(pack, unsure_below=0.0).predict(MESSAGES))


def test_unfamiliar_messages_become_unsure_on_demand(open_: Opener, pack: LabelPack, expected: list[Decision]) -> None:
    found = open_(pack, unsure_unfamiliar=True).predict(MESSAGES)
    assert [d.unsure for d in found] == [d.unfamiliar for d in expected]
    assert [d.likeliest for d in found] == [d.label for d in expected]


@pytest.mark.parametrize("bad", [-0.1, 1.1, float("nan")])
def test_a_bound_that_is_no_probability(bad: float) -> None:
    with pytest.raises(UsageError):
        ClassifierOptions(unsure_below=bad)


# ── how far messages go ─────────────────────────────────────────────────────────────────────────────────────────────


def test_a_model_that_no_message_needs_is_not_loaded(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []

    class Spy(Model):
        def __init__(self, path: str) -> None:
            loaded.append(path)
            super().__init__(path)

    monkeypatch.setattr(classifier_module, "Model", Spy)
    never = make_pack(model_path, (ALWAYS,) * 4, words=fit_word_novelty([" ".join([*WORDS, "0"])] * 2)[0])
    with LabelClassifier(never, model_path, ClassifierOptions(n_threads=1)) as classifier:
        classifier.predict(["you are a fool", ""])
        assert (loaded, classifier.n_open_slices) == ([], 0)
    with LabelClassifier(make_pack(model_path), str(model_path), ClassifierOptions(n_threads=1)) as classifier:
        classifier.predict(MESSAGES)
        classifier.predict(MESSAGES)
        assert loaded == [str(model_path)]


def test_a_slice_is_opened_when_a_message_gets_that_far(open_: Opener, model_path: Path) -> None:
    everything_known = {"words": dataclasses.replace(make_pack(model_path).words, limit=1.0), "states": None}
    for n_slices, leave in enumerate(
        [(ALWAYS,) * 4, (NEVER, *[ALWAYS] * 3), (NEVER, NEVER, ALWAYS, ALWAYS), (NEVER, NEVER, NEVER, ALWAYS)]
    ):
        classifier = open_(make_pack(model_path, leave, **everything_known))
        assert classifier.n_open_slices == 0
        decisions = classifier.predict(messages(5))
        assert classifier.n_open_slices == n_slices
        assert all(d.stage == n_slices for d in decisions)


def test_without_ngrams_no_message_leaves_before_the_network(
    open_: Opener, pack: LabelPack, expected: list[Decision]
) -> None:
    found = open_(pack, use_ngrams=False).predict(MESSAGES)
    for text, decision, plain in zip(MESSAGES, found, expected, strict=True):
        if not prepare(text):
            assert decision == plain
        else:
            assert decision.stage > 0
            assert plain.stage == 0 or decision == plain


def test_the_full_cascade_takes_every_message_to_the_end(
    open_: Opener, pack: LabelPack, model: Model, expected: list[Decision]
) -> None:
    texts = [text for text in MESSAGES if prepare(text)]
    found = open_(pack, full_cascade=True).predict(texts)
    assert {d.stage for d in found} == {3}
    last = stage_probabilities(pack, model, texts, n_threads=1)[-1]
    assert [d.probabilities for d in found] == [tuple(map(float, row)) for row in last]
    plain = dict(zip(MESSAGES, expected, strict=True))
    assert all(d == plain[text] for d, text in zip(found, texts, strict=True) if plain[text].stage == 3)


def test_a_pack_without_probes(open_: Opener, model_path: Path) -> None:
    pack = make_pack(model_path, (NEVER,), probes=(), states=None)
    classifier = open_(pack, full_cascade=True)
    assert {d.stage for d in classifier.predict(MESSAGES)} == {0}
    assert classifier.n_open_slices == 0


def test_counts_add_up(open_: Opener, pack: LabelPack, expected: list[Decision]) -> None:
    classifier = open_(pack)
    for text in MESSAGES:
        classifier.predict([text])
    stats = classifier.stats
    assert stats.messages == len(MESSAGES) == sum(stats.by_stage.values())
    assert stats.by_stage == {s: sum(d.stage == s for d in expected) for s in range(4)}
    assert stats.unfamiliar == sum(d.unfamiliar for d in expected)
    assert stats.cut == sum(d.n_cut > 0 for d in expected)
    assert stats.unsure == 0


# ── the instruction's file ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def stores(monkeypatch: pytest.MonkeyPatch) -> list[PrefixStore]:
    """The stores that classifiers make."""
    made: list[PrefixStore] = []

    def make(*arguments: Any) -> PrefixStore:
        made.append(PrefixStore(*arguments))
        return made[-1]

    monkeypatch.setattr(classifier_module, "PrefixStore", make)
    return made


def test_the_instruction_is_kept_over_restarts(
    open_: Opener, pack: LabelPack, expected: list[Decision], stores: list[PrefixStore], cache: Path
) -> None:
    for _ in range(2):
        assert open_(pack).predict(MESSAGES) == expected
    assert [store.loaded for store in stores] == [0, 3]
    assert len(list(cache.rglob("*.prefix"))) == 3


@pytest.mark.parametrize("damage", ["half", "bit", "empty", "foreign"])
def test_a_damaged_file_is_made_again(
    open_: Opener, pack: LabelPack, expected: list[Decision], stores: list[PrefixStore], cache: Path, damage: str
) -> None:
    open_(pack).predict(MESSAGES)
    files = sorted(cache.rglob("*.prefix"))
    sound = [path.read_bytes() for path in files]
    data = sound[1]
    files[1].write_bytes(
        {
            "half": data[: len(data) // 2],
            "bit": data[:-100] + bytes([data[-100] ^ 1]) + data[-99:],
            "empty": b"",
            "foreign": sound[0],
        }[damage]
    )
    assert open_(pack).predict(MESSAGES) == expected
    assert stores[-1].loaded == 2
    assert [path.read_bytes() for path in files] == sound


def test_another_instruction_has_other_files(
    open_: Opener, pack: LabelPack, stores: list[PrefixStore], cache: Path
) -> None:
    open_(pack).predict(MESSAGES)
    open_(dataclasses.replace(pack, instruction="Something else.\n")).predict(MESSAGES)
    assert [store.loaded for store in stores] == [0, 0]
    assert len(list(cache.rglob("*.prefix"))) == 6


def test_no_file_is_written_on_demand(open_: Opener, pack: LabelPack, stores: list[PrefixStore], cache: Path) -> None:
    open_(pack, keep_prefix=False).predict(MESSAGES)
    assert not stores
    assert not list(cache.rglob("*.prefix"))


def test_a_cache_that_cannot_be_written_costs_only_time(
    open_: Opener, pack: LabelPack, expected: list[Decision], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = cache.parent / "a file"
    blocked.touch()
    monkeypatch.setenv("EDGE_RUNTIME_CACHE", str(blocked))
    assert open_(pack).predict(MESSAGES) == expected


# ── the model ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_closed_classifier_says_so(open_: Opener, pack: LabelPack) -> None:
    classifier = open_(pack)
    classifier.predict(MESSAGES[:5])
    classifier.close()
    classifier.close()
    assert classifier.n_open_slices == 0
    with pytest.raises(UsageError, match="closed"):
        classifier.predict(["you"])
    with pytest.raises(UsageError, match="closed"):
        next(classifier.stream(["you"]))


def test_a_model_that_was_given_stays_open(model_path: Path, pack: LabelPack, expected: list[Decision]) -> None:
    with Model(str(model_path)) as given:
        for _ in range(2):
            with LabelClassifier(pack, given, ClassifierOptions(n_threads=1)) as classifier:
                assert classifier.predict(MESSAGES) == expected
        assert given.tokenize("you", add_special=False, parse_special=False)


def test_a_model_of_its_own_is_closed(
    model_path: Path, pack: LabelPack, expected: list[Decision], monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[Model] = []
    close = Model.close

    def note(model: Model) -> None:
        closed.append(model)
        close(model)

    with LabelClassifier(pack, model_path, ClassifierOptions(n_threads=1)) as classifier:
        assert classifier.predict(MESSAGES) == expected
        monkeypatch.setattr(Model, "close", note)
    assert len(closed) == 1


@pytest.mark.parametrize("changes", [{"n_layer": 6}, {"weights": "Q8_0"}])
def test_a_pack_for_another_model_is_refused(tiny_path: TinyMaker, pack: LabelPack, changes: dict[str, Any]) -> None:
    other = tiny_path("llama", tokenizer=True, **changes)
    with pytest.raises(PackError, match="manners"):
        LabelClassifier(pack, other)
    with Model(str(other)) as loaded, pytest.raises(PackError):
        LabelClassifier(pack, loaded)


# ── interrupted ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("where", ["prefix", "rows", "states", "keep", "probe"])
@pytest.mark.parametrize("after", [0, 1, 3])
def test_an_interruption_spoils_nothing(
    open_: Opener,
    pack: LabelPack,
    expected: list[Decision],
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    after: int,
) -> None:
    classifier = open_(pack)
    if where != "prefix":
        classifier.predict(MESSAGES)  # slices are open
    owner: Any = {"states": Group, "keep": Group, "probe": Probe}.get(where, trunk_module)
    name = {"probe": "scores"}.get(where, where if owner is Group else "run_rows")
    real = getattr(owner, name)
    left = after

    def interrupting(*arguments: Any) -> Any:
        nonlocal left
        if not left:
            raise KeyboardInterrupt
        left -= 1
        return real(*arguments)

    counted = dataclasses.replace(classifier.stats)
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, interrupting)
        with pytest.raises(KeyboardInterrupt):
            classifier.predict(MESSAGES)
    assert dataclasses.replace(classifier.stats) == counted
    assert classifier.predict(MESSAGES) == expected
    assert list(classifier.stream(MESSAGES, 1)) == expected


# ── drift ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_stream_unlike_the_reference_is_noticed(open_: Opener, model_path: Path) -> None:
    likely = messages(2 * WINDOW, 5)
    ones = np.ones(3, np.float32)
    every_word_known = dataclasses.replace(make_pack(model_path).words, limit=1.0)
    pack = make_pack(model_path, (ALWAYS,) * 4, weights=ones, words=every_word_known)
    confidences = np.array([d.confidence for d in open_(pack).predict(likely)], np.float32)
    classifier = open_(dataclasses.replace(pack, references={CONFIDENCE: reference_of(confidences)}))
    classifier.predict(messages(WINDOW, 6))
    assert classifier.take_drifts() == []
    classifier.predict(["you are a fool"] * WINDOW)
    (drift,) = classifier.take_drifts()
    assert drift.quantity == CONFIDENCE
    assert drift.n == WINDOW
    assert classifier.take_drifts() == []


def test_states_unlike_the_reference_are_noticed(open_: Opener, model_path: Path) -> None:
    """Only messages that get to the network have a distance."""
    pack = make_pack(model_path, (NEVER, *[ALWAYS] * 3))
    seen = open_(pack).predict(messages(100, 5))
    novelties = np.array([d.novelty for d in seen], np.float32)
    for shift, n_drifts in ((1.0, 0), (0.5, 1)):
        classifier = open_(dataclasses.replace(pack, references={DISTANCE: reference_of(shift * novelties)}))
        classifier.predict(["", *messages(100, 5) * (WINDOW // 100)])
        drifts = classifier.take_drifts()
        assert [d.quantity for d in drifts] == [DISTANCE] * n_drifts


def test_drift_is_watched_however_messages_are_decided(open_: Opener, model_path: Path) -> None:
    """Confidence is that of stage 0, also of messages that go further."""
    pack = make_pack(model_path, (ALWAYS,) * 4)
    low = {CONFIDENCE: reference_of(np.linspace(0.0, 0.1, 500, dtype=np.float32))}
    classifier = open_(dataclasses.replace(pack, references=low), use_ngrams=False)
    list(classifier.stream(messages(50) * (WINDOW // 50)))
    (drift,) = classifier.take_drifts()
    assert drift.share == 0
