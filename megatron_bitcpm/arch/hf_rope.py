"""The rotary settings of a config.json, in both directions.

Read are the legacy form (``rope_theta``, ``rope_scaling``: transformers 4.x, vLLM, OpenBMB's
configuration) and ``rope_parameters`` of transformers 5.x; written is the legacy form, which all
of them read. What only some readers would read as we do is refused, never guessed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_bitcpm.arch.model import ModelConfig, attention_factor
from megatron_bitcpm.errors import CheckpointError

DEFAULT_THETA = 10000.0
_PLAIN_TYPES = (None, "default")
_ONE = "rope_scaling"


class HfProblem(ValueError):
    """Something in a config.json that this package does not read.

    Args:
        key, value: what the file says.
        text: what is wrong with it and what to do, two sentences.
    """

    def __init__(self, key: str, value: Any, text: str) -> None:
        super().__init__(text)
        self.key, self.value, self.text = key, value, text

    def locate(self, path: Path) -> CheckpointError:
        """Return the error for the user."""
        shown, (rule, fix) = " ".join(str(self.value).split()), self.text.rsplit(". ", 1)
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        return CheckpointError(f"{self.key}={shown}: {rule} ({path}). {fix}")


def read_rope(
    config: Mapping[str, Any], max_positions: int, head_dim: int
) -> tuple[int, dict[str, Any] | None]:
    """Return theta and the fields of `RopeScalingConfig`, None for plain RoPE.

    Args:
        config: content of config.json.
        max_positions: its max_position_embeddings, with the default.
        head_dim: channels of a head.

    Raises:
        HfProblem: another kind of scaling, or settings that readers understand differently.
    """
    rope, key = _find_settings(config)
    theta = rope.get("rope_theta", config.get("rope_theta"))
    if rope.get("rope_theta") is not None and config.get("rope_theta") not in (None, theta):
        raise HfProblem(
            "rope_theta", config["rope_theta"], f"{key} says {theta}. Remove one of the two."
        )
    partial = rope.get("partial_rotary_factor")
    if partial not in (None, 1):
        raise HfProblem(
            "partial_rotary_factor",
            partial,
            "every head channel is rotated here. Use a model without it.",
        )
    kind = rope.get("rope_type") or rope.get("type")
    if kind in _PLAIN_TYPES:
        return _read_theta(theta), None
    if kind != "longrope":
        raise HfProblem(
            f"{key}.rope_type",
            kind,
            "has no counterpart in this decoder. Use a model with plain RoPE or longrope.",
        )
    return _read_theta(theta), _read_longrope(rope, key, config, max_positions, head_dim)


def _find_settings(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """Return the dictionary with the settings, and its key."""
    found = {k: config[k] for k in ("rope_parameters", _ONE) if config.get(k)}
    for key, value in found.items():
        if not isinstance(value, Mapping):
            raise HfProblem(key, value, "is not an object. Correct config.json.")
        if any(isinstance(inner, Mapping) for inner in value.values()):
            raise HfProblem(
                key, "{...}", "differs between layers. Use a model with one setting for all layers."
            )
    if len(found) == 2:
        shared = [
            {k: v for k, v in value.items() if k not in ("rope_theta", "type", "rope_type")}
            for value in found.values()
        ]
        kinds = {value.get("rope_type") or value.get("type") for value in found.values()}
        if shared[0] != shared[1] or len(kinds) > 1:
            raise HfProblem(
                "rope_parameters", "{...}", f"differs from {_ONE}. Remove one of the two."
            )
    for key, value in found.items():
        return value, key
    return {}, _ONE


def _read_theta(theta: Any) -> int:
    theta = DEFAULT_THETA if theta is None else theta
    if isinstance(theta, bool) or not isinstance(theta, int | float) or theta % 1:
        raise HfProblem(
            "rope_theta",
            theta,
            "Megatron takes whole numbers only. Use a model with a whole rope_theta.",
        )
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
            raise HfProblem(
                f"{key}.{name}",
                factors,
                "longrope needs a list of positive numbers. Complete config.json from its source.",
            )
        if len(factors) != head_dim // 2:
            raise HfProblem(
                f"{key}.{name}",
                f"({len(factors)} numbers)",
                f"one for each pair of the {head_dim} head channels is needed, {head_dim // 2}. "
                "Correct it, or head_dim (bitcpm inspect).",
            )
    original = _read_original(rope, key, config, max_positions)
    result = {
        "short_factor": [float(f) for f in rope["short_factor"]],
        "long_factor": [float(f) for f in rope["long_factor"]],
        "original_max_position_embeddings": original,
        "attention_factor": _read_attention_factor(rope, key, original, max_positions),
    }
    return result


def _read_original(
    rope: Mapping[str, Any], key: str, config: Mapping[str, Any], max_positions: int
) -> int:
    """Return the original length: inside the settings, beside them, or all positions."""
    name = "original_max_position_embeddings"
    values = [v for v in (rope.get(name), config.get(name)) if v is not None]
    if len(values) > 1 and values[0] != values[1]:
        raise HfProblem(name, config[name], f"{key} says {rope[name]}. Remove one of the two.")
    original = values[0] if values else max_positions
    if type(original) is not int or not 2 <= original <= max_positions:
        raise HfProblem(
            f"{key}.{name}",
            original,
            f"must be a whole number up to max_position_embeddings {max_positions}: readers "
            "disagree about others. Correct config.json.",
        )
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
        raise HfProblem(
            f"{key}.factor",
            factor,
            f"max / original position embeddings is {growth:g}, and readers disagree which counts. "
            "Set attention_factor to what the training used.",
        )
    for name in ("short_mscale", "long_mscale"):
        if rope.get(name) is not None and rope[name] != given:
            raise HfProblem(
                f"{key}.{name}",
                rope[name],
                f"attention_factor is {given}. Set both to what the training used.",
            )
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
        "original_max_position_embeddings": original,
        "factor": model.max_position_embeddings / original,
    }
    if original != model.max_position_embeddings:
        keys["original_max_position_embeddings"] = original
    if rope.attention_factor is not None:
        keys[_ONE]["attention_factor"] = rope.attention_factor
        unset = rope.model_copy(update={"attention_factor": None})
        if attention_factor(model.model_copy(update={_ONE: unset})) != rope.attention_factor:
            # vLLM knows these two names only.
            keys[_ONE] |= dict.fromkeys(("short_mscale", "long_mscale"), rope.attention_factor)
    return keys
