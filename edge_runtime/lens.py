"""The logit lens: what each depth of a model would say next, at every token of a text."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass

from .errors import PromptError, UnsupportedModelError
from .native import ContextOptions, Model
from .resolve import check_memory, checked_header
from .signals import signals_of
from .slices import Slice
from .types import Floats, ModelHeader, check_boundaries

MAX_TOKENS = 1024
_N_BATCH = 32  # rows of logits are kept for a whole batch in every slice
_DEFAULT_DEPTHS = 6


@dataclass(frozen=True, slots=True)
class Reading:
    """The head's guess for the next token after some layer."""

    layer: int
    token: int
    text: str
    entropy: float  # nats
    top1: float  # probability of `token`


@dataclass(frozen=True, slots=True)
class LensRow:
    """One token of the text and what each depth expects after it; the last reading is the whole model's."""

    token: int
    text: str
    readings: tuple[Reading, ...]

    @property
    def final(self) -> Reading:
        return self.readings[-1]


@dataclass(frozen=True, slots=True)
class Lens:
    """Readings of a whole text."""

    model: str
    layers: tuple[int, ...]  # boundaries, then the model's last layer
    rows: tuple[LensRow, ...]


def spaced_boundaries(n_layer: int, depths: int = _DEFAULT_DEPTHS) -> tuple[int, ...]:
    """`depths` - 1 boundaries that cut the layers into even parts, fewer in a model of very few layers."""
    return tuple(sorted({round(i * n_layer / depths) for i in range(1, depths)} & set(range(1, n_layer))))


def read_lens(model_name: str, text: str, boundaries: tuple[int, ...] | None = None, *, n_threads: int = 0) -> Lens:
    """Run `text` through the model, with the output head after each boundary.

    Raises PromptError for a text of no or too many tokens, BoundaryError, a ModelError or MemoryLimitError.
    """
    header = checked_header(model_name)
    layers = spaced_boundaries(header.n_layer) if boundaries is None else boundaries
    check_boundaries(layers, header.n_layer)
    # a token has at least one byte, and two may be added
    at_most = min(MAX_TOKENS, len(text.encode()) + 2)
    check_memory(header, _options(at_most, n_threads), len(layers) + 1, _N_BATCH, lambda _text: None)
    with Model(header.path, header=header) as model:
        if not model.has_tokenizer:
            raise UnsupportedModelError(f"{header.path} has no tokenizer, so it cannot read text")
        tokens = model.tokenize(text, add_special=True, parse_special=True)
        if not 1 <= len(tokens) <= MAX_TOKENS:
            raise PromptError(f"the text has {len(tokens)} tokens, the lens takes 1 to {MAX_TOKENS}", "shorten it")
        readings = _readings(model, tokens, layers, n_threads)
        rows = [LensRow(t, _text(model, t), tuple(r[i] for r in readings)) for i, t in enumerate(tokens)]
    return Lens(_name(header), (*layers, header.n_layer), tuple(rows))


def _readings(model: Model, tokens: Sequence[int], boundaries: tuple[int, ...], n_threads: int) -> list[list[Reading]]:
    """Readings by slice, then by token."""
    edges = (0, *boundaries, model.n_layer)
    options = _options(len(tokens), n_threads)
    with ExitStack() as opened:
        slices = [
            opened.enter_context(closing(Slice(model, start, end, options, n_outputs_max=_N_BATCH)))
            for start, end in zip(edges, edges[1:], strict=False)
        ]
        found: list[list[Reading]] = [[] for _ in slices]
        for start in range(0, len(tokens), slices[0].n_batch):
            batch = tokens[start : start + slices[0].n_batch]
            rows = range(len(batch))
            hidden: Floats | None = None
            for piece, readings in zip(slices, found, strict=True):
                if hidden is None:
                    piece.decode_tokens(batch, start, rows)
                else:
                    piece.decode_states(hidden, start, rows)
                readings += [_reading(model, piece.end, piece.logits(row)) for row in rows]
                hidden = None if piece.is_last else piece.hidden(len(batch))
    return found


def _reading(model: Model, layer: int, logits: Floats) -> Reading:
    token, signals = int(logits.argmax()), signals_of(logits)
    return Reading(layer, token, _text(model, token), signals.entropy, signals.top1)


def _text(model: Model, token: int) -> str:
    """A token as text; as hexadecimal where it is only part of a character."""
    piece = model.piece(token, special=True)
    try:
        return piece.decode("utf-8")
    except UnicodeDecodeError:
        return f"<{piece.hex(' ').upper()}>"


def _options(n_tokens: int, n_threads: int) -> ContextOptions:
    return ContextOptions(n_ctx=n_tokens, n_batch=_N_BATCH, n_threads=n_threads)


def _name(header: ModelHeader) -> str:
    return header.name or header.path
