"""The architecture that a model's tensors have, whatever its config.json says about it.

All sizes follow from names and shapes, by majority: one damaged tensor is the one that does not
fit. Only the head dimension does not: q_proj has heads x head_dim rows and k_proj kv heads x
head_dim, which several values fit. The one is taken for which config.json speaks most directly,
and the report says which evidence that was.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_bitcpm.arch.hf_config import CONFIG_FILE, is_tied, parse_architecture
from megatron_bitcpm.arch.model import shapes_of
from megatron_bitcpm.arch.tensors import EMBEDDING, OUTPUT, Shape, all_specs, find_tensor
from megatron_bitcpm.conversion.difference import compare_shapes
from megatron_bitcpm.conversion.tensor_stream import dtype_name
from megatron_bitcpm.errors import CheckpointError
from megatron_bitcpm.files import write_json
from megatron_bitcpm.publish import Output

Shapes = Mapping[str, Shape]

_USUAL_HEAD_DIMS = (128, 64)


@dataclass(frozen=True)
class DerivedArchitecture:
    """What names and shapes of the tensors say.

    Attributes:
        sizes: as keys of config.json; without head_dim and heads where nothing decides these.
        head_dim_from: why head_dim is this one.
        strays: tensors of layers that are hardly there, which do not count.
    """

    sizes: dict[str, Any]
    head_dim_from: str
    strays: tuple[str, ...] = ()


def derive_architecture(
    shapes: Shapes, dtype: torch.dtype, tied: bool, config: Mapping[str, Any] | None
) -> DerivedArchitecture | None:
    """Return the architecture of tensors, None where they are not those of a Llama.

    `dtype` is that of most weights; `config` only chooses among head dimensions that fit.
    """
    votes = _count_votes(shapes)
    num_layers, strays = count_layers(shapes)
    if not num_layers or {"vocab", "hidden", "queries", "keys", "ffn"} - votes.keys():
        return None
    found = {what: counter.most_common(1)[0][0] for what, counter in votes.items()}
    queries, keys, hidden = found["queries"], found["keys"], found["hidden"]
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": found["ffn"],
        "num_hidden_layers": num_layers,
        "vocab_size": found["vocab"],
        "tie_word_embeddings": tied,
        "torch_dtype": dtype_name(dtype),
    }
    head_dim, reason = _choose_head_dim(queries, keys, hidden, config or {})
    if head_dim:
        sizes |= {
            "head_dim": head_dim,
            "num_attention_heads": queries // head_dim,
            "num_key_value_heads": keys // head_dim,
        }
    return DerivedArchitecture(sizes, reason, strays)


def _count_votes(shapes: Shapes) -> dict[str, Counter[int]]:
    """Return for each size of the model how many tensors have which value."""
    votes: dict[str, Counter[int]] = {}
    # The embedding before the output layer: of two that differ the first counts.
    for name in (EMBEDDING.hf, OUTPUT.hf, *shapes):
        place, shape = find_tensor(name), shapes.get(name, ())
        if place is None:
            continue
        rows, inputs = place.spec.parts[place.part].rows, place.spec.inputs
        dimensions = (rows,) if inputs is None else (rows, inputs)
        if shape and len(shape) == len(dimensions) and 0 not in shape:
            for what, size in zip(dimensions, shape, strict=True):
                votes.setdefault(what, Counter())[size] += 1
    return votes


def count_layers(shapes: Shapes) -> tuple[int, tuple[str, ...]]:
    """Return how many layers tensors are of, and the tensors of no layer that counts.

    A layer counts if most of its tensors are there: a stray one makes none.
    """
    layers: dict[int, list[str]] = {}
    for name in shapes:
        place = find_tensor(name)
        if place is not None and place.layer is not None:
            layers.setdefault(place.layer, []).append(name)
    size = sum(len(spec.parts) for spec in all_specs() if spec.in_layer)
    whole = [number for number, names in layers.items() if 2 * len(names) > size]
    # A layer that was lost counts too, but no number that is far off.
    count = min(1 + max(whole, default=-1), 2 * len(whole))
    strays = (name for number, names in layers.items() if number >= count for name in names)
    return count, tuple(strays)


def _choose_head_dim(
    queries: int, keys: int, hidden: int, config: Mapping[str, Any]
) -> tuple[int | None, str]:
    """Return the head dimension and the evidence for it."""

    def whole(key: str) -> int:
        value = config.get(key)
        return value if type(value) is int and value > 0 else 0

    def divide(rows: int, heads: int) -> int:
        return rows // heads if heads and rows % heads == 0 else 0

    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    factors = rope.get("short_factor") if isinstance(rope, Mapping) else None
    candidates = [
        (whole("head_dim"), "head_dim of config.json fits the rows of q_proj and k_proj"),
        (2 * len(factors) if isinstance(factors, list) else 0, "half as many rotary factors"),
        (divide(keys, whole("num_key_value_heads")), "num_key_value_heads of config.json"),
        (divide(hidden, whole("num_attention_heads")), "hidden_size / num_attention_heads"),
        (divide(queries, whole("num_attention_heads")), "num_attention_heads of config.json"),
        *(
            (size, "the usual size that fits the rows of q_proj and k_proj")
            for size in _USUAL_HEAD_DIMS
        ),
    ]
    for size, reason in candidates:
        fits = size and size % 2 == 0 and queries % size == 0 and keys % size == 0
        if fits and (queries // size) % (keys // size) == 0:
            return size, reason
    return None, "shapes alone do not tell, and nothing in config.json fits them"


def find_contradictions(
    config: Mapping[str, Any], derived: DerivedArchitecture, path: Path
) -> list[dict[str, Any]]:
    """Return `field`, `config` (None: absent), `weights` of what the tensors contradict."""
    found = []
    for key, value in derived.sizes.items():
        said = config.get(key)
        if key == "torch_dtype":
            said = str(config.get("dtype") or said or value).removeprefix("torch.")
        elif key == "tie_word_embeddings":
            with contextlib.suppress(CheckpointError):
                said = is_tied(config, path)
        elif key == "head_dim" and said is None:
            heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
            if type(heads) is int and type(hidden) is int and heads:
                said = hidden // heads
        elif key == "num_key_value_heads" and said is None:
            said = config.get("num_attention_heads")
        # 64.0 equals 64, and no reader of config.json takes it for a size.
        if said != value or type(said) is not type(value):
            found.append({"field": key, "config": config.get(key), "weights": value})
    return found


def correct_config(
    config: Mapping[str, Any], derived: DerivedArchitecture, shapes: Shapes, path: Path
) -> dict[str, Any]:
    """Return a config.json that says what the tensors say.

    Raises:
        CheckpointError: it would still not describe the tensors.
    """
    new = {**config, **derived.sizes}
    if "dtype" in config:
        new["dtype"] = derived.sizes["torch_dtype"]
    model, vocab_size = parse_architecture(new, path)
    misfits = compare_shapes(shapes, shapes_of(model, vocab_size))
    if names := misfits.names():
        raise CheckpointError(
            f"config.json={path}: {len(names)} tensors fit no architecture: {misfits.describe()}. "
            "Copy the weights from their source again."
        )
    return new


def fix_config(folder: Path, new: Mapping[str, Any]) -> Path:
    """Replace config.json; return the file that keeps the old one, .bak or .bak2 and so on.

    Raises:
        CheckpointError: it cannot be written; the old one is as it was.
    """
    path = folder / CONFIG_FILE
    backup, number = path.with_name(f"{CONFIG_FILE}.bak"), 1
    while backup.exists():
        number += 1
        backup = path.with_name(f"{CONFIG_FILE}.bak{number}")
    try:
        with Output(path, overwrite=True, field="config.json").new_file() as scratch:
            write_json(scratch, new)
            # A second name of the old file: at no moment is there no config.json.
            os.link(path, backup)
    except CheckpointError:
        backup.unlink(missing_ok=True)
        raise
    return backup
