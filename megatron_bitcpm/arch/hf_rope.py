"""The rotary settings of a config.json, in both directions.

Read are the legacy form (``rope_theta``, ``rope_scaling``: transformers 4.x, vLLM, OpenBMB's
configuration) and ``rope_parameters`` of transformers 5.x; written is the legacy form, which all
of them read. What only some readers would read as we do is refused, never guessed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_bitcpm.arch.model import ModelConfig, attention_factor
from megatron_bitcpm.errors import CheckpointError

_DEFAULT_THETA = 10000.0
_ONE = "rope_scaling"
_ORIGINAL = "original_max_position_embeddings"
_MSCALES = ("short_mscale", "long_mscale")
"""vLLM's names of the attention factor; it knows no other."""


class HfProblem(ValueError):
    """A key and value of a config.json that this package does not read; rule and fix in `text`."""

    def __init__(self, key: str, value: Any, text: str) -> None:
        super().__init__(text)
        self.key, self.value, self.text = key, value, text

    def locate(self, path: Path) -> CheckpointError:
        """Return the error for the user, which names the file."""
        shown, (rule, fix) = " ".join(str(self.value).split()), self.text.rsplit(". ", 1)
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        return CheckpointError(f"{self.key}={shown}: {rule} ({path}). {fix}")


@contextmanager
def locate_problems(path: Path) -> Iterator[None]:
    """Raise an `HfProblem` as the error for the user."""
    try:
        yield
    except HfProblem as problem:
        raise problem.locate(path) from problem


def read_rope(
    config: Mapping[str, Any], max_positions: int, head_dim: int
) -> tuple[int, dict[str, Any] | None]:
    """Return theta and the fields of `RopeScalingConfig`, None for plain RoPE.

    Raises:
        HfProblem: another kind of scaling, or settings that readers understand differently.
    """
    rope, key = _find_settings(config)
    theta = rope.get("rope_theta", config.get("rope_theta"))
    if rope.get("rope_theta") is not None and config.get("rope_theta") not in (None, theta):
        text = f"{key} says {theta}. Remove one of the two."
        raise HfProblem("rope_theta", config["rope_theta"], text)
    partial = rope.get("partial_rotary_factor")
    if partial not in (None, 1):
        text = "every head channel is rotated here. Use a model without it."
        raise HfProblem("partial_rotary_factor", partial, text)
    kind = _kind_of(rope)
    if kind in (None, "default"):
        return _read_theta(theta), None
    if kind != "longrope":
        text = "has no counterpart in this decoder. Use a model with plain RoPE or longrope."
        raise HfProblem(f"{key}.rope_type", kind, text)
    return _read_theta(theta), _read_longrope(rope, key, config, max_positions, head_dim)


def _kind_of(rope: Mapping[str, Any]) -> Any:
    return rope.get("rope_type") or rope.get("type")


def _find_settings(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """Return the dictionary with the settings, and its key."""
    found = {k: config[k] for k in ("rope_parameters", _ONE) if config.get(k)}
    for key, value in found.items():
        if not isinstance(value, Mapping):
            raise HfProblem(key, value, "is not an object. Correct config.json.")
        if any(isinstance(inner, Mapping) for inner in value.values()):
            text = "differs between layers. Use a model with one setting for all layers."
            raise HfProblem(key, "{...}", text)
    if len(found) == 2:
        shared = [
            {k: v for k, v in value.items() if k not in ("rope_theta", "type", "rope_type")}
            for value in found.values()
        ]
        if shared[0] != shared[1] or len({_kind_of(value) for value in found.values()}) > 1:
            text = f"differs from {_ONE}. Remove one of the two."
            raise HfProblem("rope_parameters", "{...}", text)
    for key, value in found.items():
        return value, key
    return {}, _ONE


def _read_theta(theta: Any) -> int:
    theta = _DEFAULT_THETA if theta is None else theta
    if isinstance(theta, bool) or not isinstance(theta, int | float) or theta % 1:
        text = "Megatron takes whole numbers only. Use a model with a whole rope_theta."
        raise HfProblem("rope_theta", theta, text)
    return int(theta)


def _read_longrope(
    rope: Mapping[str, Any],
    key: str,
    config: Mapping[str, Any],
    max_positions: int,
    head_dim: int,
) -> dict[str, Any]:
    for name in ("short_factor", "long_factor"):
        factors = rope.get(name)
        if not isinstance(factors, list) or not all(_is_positive(f) for f in factors):
            text = (
                "longrope needs a list of positive numbers. Complete config.json from its source."
            )
            raise HfProblem(f"{key}.{name}", factors, text)
        if len(factors) != head_dim // 2:
            text = (
                f"one for each pair of the {head_dim} head channels is needed, {head_dim // 2}. "
                "Correct it, or head_dim (bitcpm inspect)."
            )
            raise HfProblem(f"{key}.{name}", f"({len(factors)} numbers)", text)
    original = _read_original(rope, key, config, max_positions)
    return {
        "short_factor": [float(f) for f in rope["short_factor"]],
        "long_factor": [float(f) for f in rope["long_factor"]],
        _ORIGINAL: original,
        "attention_factor": _read_attention_factor(rope, key, original, max_positions),
    }


def _read_original(
    rope: Mapping[str, Any], key: str, config: Mapping[str, Any], max_positions: int
) -> int:
    """Return the original length: inside the settings, beside them, or all positions."""
    values = [v for v in (rope.get(_ORIGINAL), config.get(_ORIGINAL)) if v is not None]
    if len(values) > 1 and values[0] != values[1]:
        text = f"{key} says {values[0]}. Remove one of the two."
        raise HfProblem(_ORIGINAL, values[1], text)
    original = values[0] if values else max_positions
    if type(original) is not int or not 2 <= original <= max_positions:
        text = (
            f"must be a whole number up to max_position_embeddings {max_positions}: readers "
            "disagree about others. Correct config.json."
        )
        raise HfProblem(f"{key}.{_ORIGINAL}", original, text)
    return original


def _read_attention_factor(
    rope: Mapping[str, Any], key: str, original: int, max_positions: int
) -> float | None:
    """Return an attention factor that differs in origin from the default formula, else None."""
    given, factor = rope.get("attention_factor"), rope.get("factor")
    for name, value in (("attention_factor", given), ("factor", factor)):
        if value is not None and not _is_positive(value):
            raise HfProblem(f"{key}.{name}", value, "must be a positive number. Correct it.")
    growth = max_positions / original
    if given is None and factor is not None and not math.isclose(factor, growth, rel_tol=1e-9):
        # With an original length of their own, transformers 4 takes the ratio and 5 the factor.
        text = (
            f"max / original position embeddings is {growth:g}, and readers disagree which counts. "
            "Set attention_factor to what the training used."
        )
        raise HfProblem(f"{key}.factor", factor, text)
    for name in _MSCALES:
        if rope.get(name) is not None and rope[name] != given:
            text = f"attention_factor is {given}. Set both to what the training used."
            raise HfProblem(f"{key}.{name}", rope[name], text)
    return None if given is None else float(given)


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and value > 0 and math.isfinite(value)


def write_rope(model: ModelConfig) -> dict[str, Any]:
    """Return the rotary keys of config.json in the legacy form.

    The original length stands inside ``rope_scaling`` (vLLM) and, where it is not that of all
    positions, beside it too: transformers 4 looks only there.
    """
    keys: dict[str, Any] = {"rope_theta": float(model.rotary_base), _ONE: None}
    rope = model.rope_scaling
    if rope is None:
        return keys
    original = rope.original_max_position_embeddings
    assert original is not None
    keys[_ONE] = {
        "rope_type": rope.rope_type,
        "short_factor": list(rope.short_factor),
        "long_factor": list(rope.long_factor),
        _ORIGINAL: original,
        "factor": model.max_position_embeddings / original,
    }
    if original != model.max_position_embeddings:
        keys[_ORIGINAL] = original
    if rope.attention_factor is not None:
        keys[_ONE]["attention_factor"] = rope.attention_factor
        unset = rope.model_copy(update={"attention_factor": None})
        if attention_factor(model.model_copy(update={_ONE: unset})) != rope.attention_factor:
            keys[_ONE] |= dict.fromkeys(_MSCALES, rope.attention_factor)
    return keys
