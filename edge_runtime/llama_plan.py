"""What an `EdgeLlama` is to do: its own arguments, and those of `Llama` that leave no room for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from .errors import UsageError
from .native import KvType
from .resolve import RunOptions
from .types import DEFAULT_THETA, Mode

DEFAULT_MODE = Mode.AUTO
_KV_TYPES = {kind.ggml: kind for kind in KvType}
_DEFAULT_KV = KvType.F16.ggml

# arguments of `Llama` that its own context and loop serve, with the values that ask for nothing special
_LEFT_TO_LLAMA: dict[str, tuple[Any, ...]] = {
    "logits_all": (False,),  # every token's logits are kept
    "embedding": (False,),
    "vocab_only": (False,),
    "draft_model": (None,),
    "chat_handler": (None,),  # of images, whose states it writes into the context
    "lora_path": (None,),
    "pooling_type": (-1,),
    "attention_type": (-1,),
    "rope_scaling_type": (-1, None),
    "rope_freq_base": (0.0,),
    "rope_freq_scale": (0.0,),
    "yarn_ext_factor": (-1.0,),
    "yarn_attn_factor": (1.0,),
    "yarn_beta_fast": (32.0,),
    "yarn_beta_slow": (1.0,),
    "yarn_orig_ctx": (0,),
    "offload_kqv": (True,),
    "op_offload": (None, True),
    "swa_full": (None, True),
}


@dataclass(frozen=True, slots=True)
class Wish:
    """The arguments that `Llama` does not have, as they were given; None and False: left to the default."""

    mode: str | None = None
    boundaries: int | Sequence[int] | None = None
    pack: str | None = None
    thresholds: float | Sequence[float] | None = None
    max_disagreement: float | None = None
    theta: float | None = None
    cap: int | None = None
    audit_rate: float | None = None
    kernels: str = "edge"
    profile: str | None = None
    targets: str | Mapping[str, float] | None = None

    @property
    def insists(self) -> str | None:
        """What was asked for that only the engine does, in words; None if plain `Llama` would do."""
        if self.mode not in (None, Mode.AUTO.value, Mode.FULL.value):
            return f"mode={self.mode!r}"
        names = ("boundaries", "pack", "thresholds", "max_disagreement", "theta", "cap", "audit_rate", "targets")
        return next((name for name in names if getattr(self, name) is not None), None)

    @property
    def chosen_mode(self) -> Mode:
        """Raises UsageError for a mode that is not there."""
        if self.mode is None:
            return DEFAULT_MODE
        names = [mode.value for mode in Mode]
        if self.mode not in names:
            raise UsageError(f"there is no mode {self.mode!r}", f"there are {', '.join(names)}")
        return Mode(self.mode)

    def options(self, model: str, n_threads: int, invariant: bool, arguments: Mapping[str, Any]) -> RunOptions:
        """How the model is to run, with `Llama`'s `arguments`; n_ctx and n_batch are known when it is loaded.

        `invariant` kernels give a token the same sums in every batch. Raises UsageError for what cannot be meant.
        """
        mode = self.chosen_mode
        self._check(mode)
        flash = arguments.get("flash_attn")
        if flash is None and not invariant:
            flash = False  # as in Llama
        return RunOptions(
            model=model,
            mode=mode,
            boundaries=_numbers("boundaries", self.boundaries, Integral),
            thresholds=_numbers("thresholds", self.thresholds, Real),
            pack=self.pack,
            max_disagreement=self.max_disagreement,
            theta=DEFAULT_THETA if self.theta is None else self.theta,
            cap=self.cap,
            audit_rate=0.1 if self.audit_rate is None else self.audit_rate,
            n_threads=n_threads,
            kv_type=_KV_TYPES.get(_kv_types(arguments)[0], KvType.F16),
            flash_attention=flash,
            kernels="edge" if invariant else "stock",
        )

    def _check(self, mode: Mode) -> None:
        """Raise UsageError for arguments that mean nothing in `mode`."""
        allowed = {
            "boundaries": mode is not Mode.AUTO,
            "thresholds": mode not in (Mode.AUTO, Mode.FULL),
            "cap": mode is not Mode.FULL,
            "max_disagreement": mode in (Mode.AUTO, Mode.EXIT),
            "audit_rate": mode in (Mode.AUTO, Mode.EXIT),
            "theta": mode is Mode.MARGIN,
        }
        for name, meant in allowed.items():
            if getattr(self, name) is not None and not meant:
                raise UsageError(f"{name} means nothing in mode {mode.value!r}", "drop it, or choose another mode")


def _numbers(name: str, given: Any, kind: type) -> tuple[Any, ...] | None:
    """One number or several, as a tuple. Raises UsageError for anything else."""
    if given is None:
        return None
    numbers = tuple(given) if isinstance(given, Sequence) else (given,)
    if not all(isinstance(number, kind) for number in numbers):
        whole = "whole " if kind is Integral else ""
        raise UsageError(f"{name} {given!r} are no {whole}numbers", "give one, or a list of them")
    return numbers


def left_to_llama(arguments: Mapping[str, Any]) -> str | None:
    """The argument that only `Llama`'s own context and loop serve; None if there is none."""
    for name, harmless in _LEFT_TO_LLAMA.items():
        if name in arguments and arguments[name] not in harmless:
            return name
    k, v = _kv_types(arguments)
    return "type_k" if k not in _KV_TYPES else "type_v" if v != k else None


def _kv_types(arguments: Mapping[str, Any]) -> tuple[int, int]:
    """Types (enum ggml_type) of the cache's keys and values."""
    k, v = arguments.get("type_k"), arguments.get("type_v")
    return (_DEFAULT_KV if k is None else k), (_DEFAULT_KV if v is None else v)
