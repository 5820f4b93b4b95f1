"""Put the modelling file into a folder, and tell which folders have exactly that file.

A latent model needs it because only its forward pass has the values on the grid; MiniCPM needs it
because transformers has no such architecture. A plain Llama needs none.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_bitcpm.arch.hf_config import CONFIG_FILE, LATENT_TYPE, QUANTIZER_KEY
from megatron_bitcpm.arch.model import Form, ModelConfig, iter_places
from megatron_bitcpm.errors import CheckpointError
from megatron_bitcpm.files import read_json
from megatron_bitcpm.quantizer import Quantizer

MODELING_FILE = "modeling_bitcpm.py"
FORMAT_VERSION = 1
_CLASSES = {
    LATENT_TYPE: ("BitCPMConfig", "BitCPMForCausalLM"),
    "minicpm": ("MiniCPMConfig", "MiniCPMForCausalLM"),
}
"""Model type -> classes of the modelling file."""
_SOURCE = Path(__file__).with_name(MODELING_FILE)


def write_modeling_files(
    folder: Path, model: ModelConfig, form: Form, quantizer: Quantizer | None = None
) -> dict[str, Any]:
    """Copy the modelling file into a folder when its model needs it.

    Returns:
        What config.json must say beside the architecture; empty for a plain Llama, which gets no
        file.
    """
    model_type = LATENT_TYPE if form == "latent" else model.architecture
    if model_type not in _CLASSES:
        return {}
    (folder / MODELING_FILE).write_bytes(_SOURCE.read_bytes())
    additions: dict[str, Any] = {
        "architectures": [_CLASSES[model_type][1]],
        "model_type": model_type,
        "auto_map": _auto_map(model_type),
    }
    if form == "latent":
        assert quantizer is not None, "a latent model has a quantiser"
        additions[QUANTIZER_KEY] = describe_quantizer(model, quantizer)
    return additions


def describe_quantizer(model: ModelConfig, quantizer: Quantizer) -> dict[str, Any]:
    """Return ``bitcpm_quantizer`` of a latent config.json, as JSON.

    ``quantizer`` is the stamp; the rest is what it means for this model: by projection the inputs
    per scale (or "tensor") and the slices of a row that training kept apart, and the linears that
    stay in full precision.
    """
    projections: dict[str, Any] = {}
    full_precision = []
    dims = model.dimensions()
    for place in iter_places(model):
        if place.spec.role != "projection":
            continue
        if not quantizer.quantizes(place, model.num_layers):
            full_precision.append(place.name("hf").removesuffix(".weight"))
        if place.layer == 0:
            groups = quantizer.groups_of(place.spec.row_parallel, place.shape(dims)[1])
            projections[place.local_hf] = {
                "group_size": quantizer.config.group_size if groups is None else groups.scale_len,
                "slices": quantizer.tp_size if place.spec.row_parallel else 1,
            }
    return {
        "format_version": FORMAT_VERSION,
        "form": "latent",
        "quantizer": quantizer.stamp(),
        "projections": projections,
        "full_precision": full_precision,
    }


def check_quantizer_block(
    block: dict[str, Any], model: ModelConfig, quantizer: Quantizer, source: Path
) -> None:
    """Refuse a ``bitcpm_quantizer`` whose forward pass is not the one that its stamp describes."""
    wanted = describe_quantizer(model, quantizer)
    for key in ("format_version", "form", "projections", "full_precision"):
        if block.get(key) != wanted[key]:
            raise CheckpointError(
                f"{QUANTIZER_KEY}.{key}={source}: is not what its quantizer means for this "
                "architecture. Use the config.json that came with the weights."
            )


def trusted_modeling_files(folder: str | Path) -> bool:
    """Whether all Python files of a folder are byte for byte what this package writes.

    True means that transformers, with ``trust_remote_code=True``, runs nothing else, for the model
    or the tokenizer: ``auto_map`` names classes of this file, no folder inside has others, no
    folder inside is a link to one elsewhere or ``custom_generate``, and there is no adapter, which
    would name a model elsewhere. Files may be links, as in the cache of huggingface_hub.
    """
    folder = Path(folder)
    try:
        config = read_json(folder / CONFIG_FILE)
        tokenizer = folder / "tokenizer_config.json"
        if tokenizer.exists() and "auto_map" in read_json(tokenizer):
            return False
        if any(folder.glob("adapter_*")):
            return False
        code = list(_iter_code(folder))
        source = _SOURCE.read_bytes()
        return (
            folder / MODELING_FILE in code
            and all(path.name == MODELING_FILE and path.read_bytes() == source for path in code)
            and any(
                config.get("model_type") == kind and config.get("auto_map") == _auto_map(kind)
                for kind in _CLASSES
            )
        )
    except (CheckpointError, OSError):
        return False


def _iter_code(folder: Path) -> Iterator[Path]:
    """Yield the Python files below a folder; OSError where one may be hidden from this walk."""

    def refuse(error: OSError) -> None:
        raise error

    for parent, folders, files in os.walk(folder, onerror=refuse):
        for name in folders:
            # What a link leads to is not walked.
            if name == "custom_generate" or os.path.islink(os.path.join(parent, name)):
                raise OSError(f"{name} may hold code")
        yield from (Path(parent, name) for name in files if Path(name).suffix.startswith(".py"))


def _auto_map(model_type: str) -> dict[str, str]:
    classes = zip(("AutoConfig", "AutoModelForCausalLM"), _CLASSES[model_type], strict=True)
    return {auto: f"{_SOURCE.stem}.{name}" for auto, name in classes}
