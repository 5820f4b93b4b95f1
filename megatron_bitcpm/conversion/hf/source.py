"""A Hugging Face folder as a `ModelSource`.

The weights lie in one safetensors file, in several with an index, or in ``pytorch_model.bin`` files
of the same two kinds. Where both kinds are present safetensors count, as in transformers and vLLM.
Opening compares files, index and config.json; it reads headers, and an output layer beside tied
embeddings.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_bitcpm.arch.model import shapes_of
from megatron_bitcpm.arch.tensors import EMBEDDING, OUTPUT, Shape
from megatron_bitcpm.conversion.difference import compare_shapes, list_first
from megatron_bitcpm.conversion.hf.config import HfConfig, read_hf_config
from megatron_bitcpm.conversion.hf.tensor_files import TensorFile, open_tensor_file
from megatron_bitcpm.conversion.source import ModelSource, find_mixed_types
from megatron_bitcpm.errors import CheckpointError
from megatron_bitcpm.files import read_json

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
BIN_FILE = "pytorch_model.bin"
BIN_INDEX_FILE = "pytorch_model.bin.index.json"
WEIGHT_KINDS = {
    "safetensors": (WEIGHTS_FILE, INDEX_FILE, "*.safetensors"),
    "bin": (BIN_FILE, BIN_INDEX_FILE, "pytorch_model*.bin"),
}
"""Kind of weight files -> single file, index of several, pattern of all."""
_COPY_AGAIN = "Copy the folder from its source again"
_INSPECT = "Read bitcpm inspect, whose --fix-config takes the sizes from the weights"
# Old transformers stored what it can compute.
_COMPUTED = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


def _folder_error(folder: Path, rule: str, fix: str = _COPY_AGAIN) -> CheckpointError:
    return CheckpointError(f"folder={folder}: {rule}. {fix}.")


@dataclass(frozen=True, kw_only=True)
class HfSource(ModelSource):
    """A Hugging Face folder; `declared_dtype` is what config.json says, `files` by tensor name."""

    declared_dtype: torch.dtype | None
    files: Mapping[str, TensorFile]

    def dtype(self, name: str) -> torch.dtype:
        """Type of a stored tensor."""
        return self.files[name].dtype(name)

    def tensor(self, name: str) -> torch.Tensor:
        """Read a stored tensor, a view of its mapped file."""
        return self.files[name].tensor(name)


def open_hf(folder: Path) -> HfSource:
    """Open a Hugging Face folder: latent, pseudo-quantised or plain, Llama or MiniCPM.

    Raises:
        CheckpointError: files, index and config.json do not belong together, a file is damaged, or
            this package cannot compute the architecture.
    """
    config = read_hf_config(folder)
    wanted = shapes_of(config.model, config.vocab_size)
    files = _settle_output_layer(folder, config, open_weights(folder))
    _check_shapes(folder, {name: file.shape(name) for name, file in files.items()}, wanted)
    if mixed := find_mixed_types({name: files[name].dtype(name) for name in wanted}):
        raise _folder_error(folder, mixed)
    return HfSource(
        path=folder,
        kind="hf",
        **vars(config.origin),
        model=config.model,
        vocab_size=config.vocab_size,
        side_files=folder,
        declared_dtype=config.dtype,
        files=files,
    )


def open_weights(folder: Path) -> dict[str, TensorFile]:
    """Open the weight files of a folder, which needs no config.json: name of a tensor -> file."""
    if not folder.is_dir():
        raise _folder_error(folder, "no such folder", "Name a folder with a model")
    adapters = sorted(path.name for path in folder.glob("adapter_*"))
    if adapters:
        # Transformers would load them on top of the weights.
        raise _folder_error(
            folder,
            f"holds an adapter ({adapters[0]}), which is not part of the weights",
            "Merge it (merge_and_unload of PEFT), or convert a folder without it",
        )
    kinds = WEIGHT_KINDS.values()
    kind = next((k for k in kinds if any(folder.glob(k[2])) or (folder / k[1]).is_file()), None)
    if kind is None:
        rule = f"holds neither {WEIGHTS_FILE} nor {BIN_FILE}, nor an index of either"
        raise _folder_error(folder, rule, "Name a folder with weights")
    single, index, pattern = kind
    present = sorted(path.name for path in folder.glob(pattern))
    weight_map = _read_index(folder / index) if (folder / index).is_file() else None
    expected = sorted(set(weight_map.values())) if weight_map else [single]
    problems = [f"{name} is missing" for name in expected if name not in present]
    # Servers read every weight file that they find.
    problems += [f"{name} does not belong to it" for name in present if name not in expected]
    if problems:
        raise _folder_error(folder, "; ".join(problems[:5]))
    opened: dict[str, TensorFile] = {}
    for name in expected:
        file = open_tensor_file(folder / name)
        for tensor in file.names():
            if tensor in opened:
                rule = f"tensor {tensor} is in {opened[tensor].path.name} and in {name}"
                raise _folder_error(folder, rule)
            opened[tensor] = file
    if weight_map:
        _check_index(folder / index, weight_map, opened)
    return {name: file for name, file in opened.items() if not _COMPUTED.fullmatch(name)}


def _read_index(path: Path) -> dict[str, str]:
    """Return name of a tensor -> name of a file beside the index."""
    weight_map: Any = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise _folder_error(path.parent, f"{path.name} has no weight_map")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or Path(name).name != name or name in ("", "..", "."):
            rule = f"{path.name} puts {tensor} into {name!r}, no file of the folder"
            raise _folder_error(path.parent, rule, "Use the folder of a source that you trust")
    return weight_map


def _check_index(path: Path, weight_map: dict[str, str], opened: Mapping[str, TensorFile]) -> None:
    """Raise unless the index says exactly where the tensors are."""
    problems = []
    for tensor in sorted(weight_map.keys() | opened.keys()):
        said = weight_map.get(tensor)
        found = opened[tensor].path.name if tensor in opened else None
        if said != found:
            problems.append(f"{tensor}: index says {said or 'nothing'}, it is in {found or 'none'}")
    if problems:
        rule = f"{path.name} is wrong: {list_first(problems, 'tensors')}"
        raise _folder_error(path.parent, rule)


def _settle_output_layer(
    folder: Path, config: HfConfig, files: dict[str, TensorFile]
) -> dict[str, TensorFile]:
    """Drop a stored output layer that is the tied embedding once more; refuse another one."""
    tied = config.model.share_embeddings_and_output_weights
    if not tied or OUTPUT.hf not in files or EMBEDDING.hf not in files:
        return files
    output, embedding = (files[name].tensor(name) for name in (OUTPUT.hf, EMBEDDING.hf))
    same_place = output.data_ptr() == embedding.data_ptr() and output.shape == embedding.shape
    if not same_place and not torch.equal(output, embedding):
        raise _folder_error(
            folder,
            f"config.json ties the embeddings, but {OUTPUT.hf} differs from {EMBEDDING.hf}",
            "Set tie_word_embeddings to false if the output layer is meant",
        )
    return {name: file for name, file in files.items() if name != OUTPUT.hf}


def _check_shapes(folder: Path, found: Mapping[str, Shape], wanted: Mapping[str, Shape]) -> None:
    misfits = compare_shapes(found, wanted)
    names = misfits.names()
    if not names:
        return
    # A layer has nine tensors. Fewer are lost ones, of the number of layers that config.json says.
    fix = _INSPECT if len(names) >= 9 or misfits.misshapen else _COPY_AGAIN
    if names == [OUTPUT.hf] and misfits.missing:
        fix = "Set tie_word_embeddings to true if the embedding is the output layer"
    raise _folder_error(folder, f"contradicts config.json: {misfits.describe()}", fix)
