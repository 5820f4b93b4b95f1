"""The latent weights of one file: what of it is quantised, and to what."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_bitcpm.conversion.hf.config import CONFIG_FILE
from megatron_bitcpm.conversion.hf.safetensors_writer import TYPE_NAMES
from megatron_bitcpm.conversion.hf.tensor_files import DTYPES, BinFile, TensorFile
from megatron_bitcpm.conversion.infer_grid import lies_on_grid
from megatron_bitcpm.conversion.names import LINEARS, Projection, find_projection
from megatron_bitcpm.conversion.stamp import QuantizerStamp, fake_quantize_projection
from megatron_bitcpm.errors import BitcpmError, CheckpointError
from megatron_bitcpm.files import read_json

FIELD = "input_bin"
"""The argument that names the file, for messages."""
_WHOLE = "Name the whole model; of a sharded one the folder"


@dataclass(frozen=True)
class LatentFile:
    """The tensors of a file and what happens to them; made by `survey`.

    Attributes:
        file: the opened file.
        layout: name -> (shape, dtype), without aliases.
        aliases: further name -> name of the same tensor.
        num_layers: layers of the model, of which the file may hold the first ones only.
        stamp: the quantiser.
    """

    file: TensorFile
    layout: dict[str, tuple[tuple[int, ...], torch.dtype]]
    aliases: dict[str, str]
    num_layers: int
    stamp: QuantizerStamp

    def quantized_names(self) -> list[str]:
        """Names of the tensors that the quantiser changes."""
        return [
            name
            for name in self.layout
            if (found := find_projection(name)) and self.stamp.quantizes(found, self.num_layers)
        ]

    def converted(self, name: str, stamp: QuantizerStamp | None = None) -> torch.Tensor:
        """Read a tensor, quantised where it is to be; `stamp` replaces the quantiser."""
        tensor = self.file.raw_tensor(name)
        projection = find_projection(name)
        stamp = stamp or self.stamp
        if projection is None or not stamp.quantizes(projection, self.num_layers):
            return tensor
        try:
            return fake_quantize_projection(tensor.contiguous(), projection, stamp)
        except BitcpmError as error:
            raise file_error(self.file.path, f"{name}: {error}".rstrip("."), "Name another") from (
                error
            )


def file_error(path: Path, rule: str, fix: str) -> CheckpointError:
    """Build the error of a file that cannot be converted."""
    return CheckpointError(f"{FIELD}={path}: {rule}. {fix}.")


def survey(file: TensorFile, stamp: QuantizerStamp) -> LatentFile:
    """List the tensors of a file.

    Args:
        file: the opened file.
        stamp: the quantiser.

    Raises:
        CheckpointError: it does not hold whole layers of latent weights.
    """
    layout: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    layers: dict[int, set[str]] = {}
    for name in file.names():
        tensor = file.raw_tensor(name)
        projection = find_projection(name)
        if tensor.dtype not in TYPE_NAMES:
            raise file_error(
                file.path,
                f"{name} is {tensor.dtype}, which is not written here",
                "Name a file without it",
            )
        if projection is not None:
            layers.setdefault(projection.layer, set()).add(projection.name)
            _check_projection(file, name, projection, tensor, stamp)
        elif isinstance(file, BinFile) and tensor.numel():
            # Safetensors knows no tensor with two names. A projection's other name is written
            # apart: that one stays as it is.
            place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
            if place in seen:
                aliases[name] = seen[place]
                continue
            seen[place] = name
        layout[name] = (tuple(tensor.shape), tensor.dtype)
    _check_whole(file, layers)
    return LatentFile(file, layout, aliases, _count_layers(file, len(layers), stamp), stamp)


def _count_layers(file: TensorFile, held: int, stamp: QuantizerStamp) -> int:
    """Return the layers of the model that a file is of.

    Args:
        file: the file.
        held: layers in it: the first ones.
        stamp: the quantiser.

    Raises:
        CheckpointError: the last layers stay in full precision, and which these are is not known.
    """
    if stamp.quant.full_precision_last_layers == 0:
        return held  # then no filter counts from the end
    # The file may be the first shard of several: only config.json knows the last layer.
    config = file.path.parent / CONFIG_FILE
    count = read_json(config).get("num_hidden_layers") if config.is_file() else None
    if type(count) is int and count >= held:
        return count
    said = f"says num_hidden_layers {count!r}" if config.is_file() else "is missing"
    raise file_error(
        file.path,
        f"holds {held} layers, of a model whose last "
        f"{stamp.quant.full_precision_last_layers} stay in full precision, but {config} {said}",
        f"Put the model's {CONFIG_FILE} beside the file",
    )


def _check_whole(file: TensorFile, layers: dict[int, set[str]]) -> None:
    """Refuse a file that lacks projections, which then would stay in full precision.

    Args:
        file: the file.
        layers: layer number -> projections found.
    """
    if not layers:
        raise file_error(
            file.path,
            "holds no projection such as model.layers.0.self_attn.q_proj.weight",
            "Name the weights of a Llama or MiniCPM",
        )
    absent = next((n for n in range(max(layers)) if n not in layers), None)
    if absent is not None:
        rule = f"holds layer {max(layers)}, but nothing of layer {absent}"
        raise file_error(file.path, rule, _WHOLE)
    missing = [
        f"model.layers.{layer}.{name}.weight"
        for layer in sorted(layers)
        for linear in LINEARS
        for name in linear.hf_names
        if name not in layers[layer]
    ]
    if missing:
        more = ", ..." if len(missing) > 5 else ""
        rule = f"lacks {len(missing)} projections: {', '.join(missing[:5])}{more}"
        raise file_error(file.path, rule, _WHOLE)


def _check_projection(
    file: TensorFile,
    name: str,
    projection: Projection,
    tensor: torch.Tensor,
    stamp: QuantizerStamp,
) -> None:
    """Refuse a projection that cannot be quantised, or has been already."""
    is_matrix = tensor.ndim == 2 and tensor.numel() > 0
    if not is_matrix or tensor.dtype not in DTYPES:
        raise file_error(
            file.path,
            f"{name} is {tensor.dtype} {list(tensor.shape)}, not a matrix of float32, "
            "bfloat16 or float16",
            "Name latent weights",
        )
    try:
        stamp.weights_per_scale(projection, tuple(tensor.shape))
    except BitcpmError as error:
        raise file_error(file.path, f"{name}: {error}".rstrip("."), "Nothing was written") from (
            error
        )
    if lies_on_grid(tensor, stamp.quant.eps):
        raise file_error(
            file.path,
            f"{name} lies on a grid already: it was quantised before, and quantising "
            "again changes it",
            "Name the latent weights",
        )
