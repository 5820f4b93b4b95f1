"""Put the modelling file into a folder, and tell which folders have exactly that file.

A latent model needs it because only its forward pass has the values on the grid; MiniCPM needs it
because transformers has no such architecture. A plain Llama needs none.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_bitcpm.config import ModelConfig
from megatron_bitcpm.conversion.names import LINEARS, find_projection, hf_shapes
from megatron_bitcpm.conversion.source import Form
from megatron_bitcpm.conversion.stamp import QuantizerStamp
from megatron_bitcpm.errors import CheckpointError
from megatron_bitcpm.files import read_json

CONFIG_FILE = "config.json"
MODELING_FILE = "modeling_bitcpm.py"
QUANTIZER_KEY = "bitcpm_quantizer"
"""Key of a latent model's config.json: the quantiser's stamp and what follows from it."""
FORMAT_VERSION = 1
LATENT_TYPE, LATENT_CLASS = "bitcpm", "BitCPMForCausalLM"
MINICPM_TYPE, MINICPM_CLASS = "minicpm", "MiniCPMForCausalLM"
_CONFIG_CLASS = {LATENT_TYPE: "BitCPMConfig", MINICPM_TYPE: "MiniCPMConfig"}
_CLASS = {LATENT_TYPE: LATENT_CLASS, MINICPM_TYPE: MINICPM_CLASS}
_SOURCE = Path(__file__).with_name(MODELING_FILE)


def write_modeling_files(
    folder: Path, model: ModelConfig, form: Form, stamp: QuantizerStamp | None = None
) -> dict[str, Any]:
    """Copy the modelling file into a folder when its model needs it.

    Args:
        folder: the Hugging Face folder, which exists.
        model: the architecture.
        form: of the tensors in the folder.
        stamp: the quantiser; needed for latent.
    Returns:
        What config.json must say beside Llama's keys; empty for a plain Llama, which gets no file.
    """
    if form != "latent" and model.architecture == "llama":
        return {}
    (folder / MODELING_FILE).write_bytes(_SOURCE.read_bytes())
    model_type = LATENT_TYPE if form == "latent" else MINICPM_TYPE
    additions: dict[str, Any] = {
        "architectures": [_CLASS[model_type]],
        "model_type": model_type,
        "auto_map": _auto_map(model_type),
    }
    if model.architecture == "minicpm":
        additions |= {
            "scale_emb": model.scale_emb,
            "scale_depth": model.scale_depth,
            "dim_model_base": model.dim_model_base,
        }
    if form == "latent":
        assert stamp is not None, "a latent model has a quantiser"
        additions[QUANTIZER_KEY] = describe_quantizer(model, stamp)
    return additions


def describe_quantizer(model: ModelConfig, stamp: QuantizerStamp) -> dict[str, Any]:
    """Return ``bitcpm_quantizer`` of a latent config.json.

    Args:
        model: the architecture.
        stamp: the quantiser.
    Returns:
        JSON. ``quantizer`` is the stamp; the rest is what it means for this model: by projection
        the inputs per scale (or "tensor") and the slices of a row that training kept apart, and
        the linears that stay in full precision.

    Raises:
        BitcpmError: the groups do not fit the model.
    """
    projections: dict[str, Any] = {}
    for linear in LINEARS:
        groups = stamp.groups_of(linear, linear.shape(model)[1])
        for name in linear.hf_names:
            projections[name] = {
                "group_size": "tensor" if groups is None else groups.scale_len,
                "slices": stamp.tp_size if linear.row_parallel else 1,
            }
    full_precision = []
    for name in hf_shapes(model, vocab_size=1):
        projection = find_projection(name)
        if projection is not None and not stamp.quantizes(projection, model.num_layers):
            full_precision.append(name.removesuffix(".weight"))
    return {
        "format_version": FORMAT_VERSION,
        "form": "latent",
        "quantizer": stamp.content(),
        "projections": projections,
        "full_precision": full_precision,
    }


def check_quantizer_block(
    block: dict[str, Any], model: ModelConfig, stamp: QuantizerStamp, source: Path
) -> None:
    """Refuse a latent config.json whose forward pass is not the one that its stamp describes.

    Args:
        block: ``bitcpm_quantizer``.
        model, stamp: what was read out of the same file.
        source: the file, for the message.

    Raises:
        CheckpointError: names the key.
    """
    wanted = describe_quantizer(model, stamp)
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
                (config.get("model_type"), config.get("auto_map"))
                == (model_type, _auto_map(model_type))
                for model_type in _CLASS
            )
        )
    except (CheckpointError, OSError):
        return False


def _iter_code(folder: Path) -> Iterator[Path]:
    """Yield the Python files below a folder.

    Raises:
        OSError: there is a folder that transformers would look into and this does not.
    """

    def refuse(error: OSError) -> None:
        raise error

    for parent, folders, files in os.walk(folder, onerror=refuse):
        for name in folders:
            # What a link leads to is not walked.
            if name == "custom_generate" or os.path.islink(os.path.join(parent, name)):
                raise OSError(f"{name} may hold code")
        yield from (Path(parent, name) for name in files if Path(name).suffix.startswith(".py"))


def _auto_map(model_type: str) -> dict[str, str]:
    module = MODELING_FILE.removesuffix(".py")
    return {
        "AutoConfig": f"{module}.{_CONFIG_CLASS[model_type]}",
        "AutoModelForCausalLM": f"{module}.{_CLASS[model_type]}",
    }
