"""The architecture that a model's tensors have, whatever its config.json says about it.

All sizes follow from names and shapes, except the head dimension: q_proj has heads x head_dim rows
and k_proj has kv heads x head_dim, which several values fit. Of these the one is taken for which
config.json speaks most directly, and the report says which evidence that was.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_bitcpm.conversion.hf.config import CONFIG_FILE, is_tied, parse_architecture
from megatron_bitcpm.conversion.names import HF_EMBEDDING, hf_shapes
from megatron_bitcpm.errors import CheckpointError
from megatron_bitcpm.files import write_text_atomically

Shapes = Mapping[str, tuple[int, ...]]

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_USUAL_HEAD_DIMS = (128, 64)


@dataclass(frozen=True)
class DerivedArchitecture:
    """What names and shapes of the tensors say, as keys of config.json.

    Attributes:
        sizes: key -> value; head_dim and the numbers of heads are absent where nothing decides.
        head_dim_from: why head_dim is this one.
    """

    sizes: dict[str, Any]
    head_dim_from: str


def derive_architecture(
    shapes: Shapes, dtype: torch.dtype, tied: bool, config: Mapping[str, Any] | None
) -> DerivedArchitecture | None:
    """Return the architecture of tensors, None where they are not those of a Llama.

    Args:
        shapes: Hugging Face name -> shape.
        dtype: of most of the weights.
        tied: whether the output layer is the embedding.
        config: content of config.json, only to choose among head dimensions that fit.
    """
    layers = {int(m[1]) for name in shapes if (m := _LAYER.fullmatch(name))}
    first = {m[2]: shapes[name] for name in shapes if (m := _LAYER.fullmatch(name)) and m[1] == "0"}
    needed = [f"self_attn.{x}_proj.weight" for x in "qk"] + ["mlp.gate_proj.weight"]
    parts = [first.get(name, ()) for name in needed] + [shapes.get(HF_EMBEDDING, ())]
    if any(len(shape) != 2 or 0 in shape for shape in parts):
        return None
    (queries, hidden), (keys, _), (ffn, _), (vocab, _) = parts
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": len(layers),
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    head_dim, reason = _choose_head_dim(queries, keys, hidden, config or {})
    if head_dim:
        sizes |= {
            "head_dim": head_dim,
            "num_attention_heads": queries // head_dim,
            "num_key_value_heads": keys // head_dim,
        }
    return DerivedArchitecture(sizes, reason)


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
        *((size, "the usual size that fits the rows of q_proj and k_proj")
          for size in _USUAL_HEAD_DIMS),
    ]  # fmt: skip
    for size, reason in candidates:
        fits = size and size % 2 == 0 and queries % size == 0 and keys % size == 0
        if fits and (queries // size) % (keys // size) == 0:
            return size, reason
    return None, "shapes alone do not tell, and nothing in config.json fits them"


def find_contradictions(
    config: Mapping[str, Any], derived: DerivedArchitecture, path: Path
) -> list[dict[str, Any]]:
    """Return the fields of config.json that the tensors contradict.

    Args:
        config: content of the file.
        derived: what the tensors say.
        path: the file.
    Returns:
        For each field: field, config (None where it is absent), weights.
    """
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
        if said != value:
            found.append({"field": key, "config": config.get(key), "weights": value})
    return found


def fix_config(
    folder: Path, config: Mapping[str, Any], derived: DerivedArchitecture, shapes: Shapes
) -> Path:
    """Write what the tensors say into config.json; the old one stays beside it.

    Args:
        folder: the model.
        config: content of its config.json.
        derived: what the tensors say.
        shapes: of the tensors, which the new file must describe.
    Returns:
        The file that keeps the old content: config.json.bak, or the first free number behind it.

    Raises:
        CheckpointError: the file would still not describe the tensors; nothing was written.
    """
    path = folder / CONFIG_FILE
    new = {**config, **derived.sizes}
    if "dtype" in config:
        new["dtype"] = derived.sizes["torch_dtype"]
    model, vocab_size = parse_architecture(new, path)
    wanted = hf_shapes(model, vocab_size)
    differing = [name for name in wanted if shapes.get(name) != wanted[name]]
    if differing:
        raise CheckpointError.of(
            "config.json", path, f"{len(differing)} tensors fit no architecture, first "
            f"{differing[0]}", "Copy the weights from their source again",
        )  # fmt: skip
    backup, number = path.with_name(f"{CONFIG_FILE}.bak"), 1
    while backup.exists():
        number += 1
        backup = path.with_name(f"{CONFIG_FILE}.bak{number}")
    try:
        # A second name of the old file: at no moment is there no config.json.
        os.link(path, backup)
        write_text_atomically(path, json.dumps(new, indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        backup.unlink(missing_ok=True)
        raise CheckpointError.of(
            "config.json", path, f"cannot be replaced: {error.strerror}",
            "Free space, or copy the folder to where you may write",
        ) from error  # fmt: skip
    return backup
