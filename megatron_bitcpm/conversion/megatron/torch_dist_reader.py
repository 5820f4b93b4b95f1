"""Full tensors out of a torch_dist checkpoint, without a model and without a process group.

Megatron's torch_dist format keeps a tensor as chunks, whatever the layout it was written at, and
stacks the layers in dimension 0 (or numbers them). `TorchDistTensors` reads one tensor, or one
layer of it, at a time: the chunks lie in mapped files, and where one chunk is all that is asked for
it is not copied. Their checksums are compared. Optimizer and random states are never read.

`open_torch_dist` opens checkpoints of this package's trainer, converted ones, and those of
`pretrain_gpt.py`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from megatron_bitcpm.arch.model import ModelConfig
from megatron_bitcpm.arch.tensors import EMBEDDING, TensorSpec, name_of
from megatron_bitcpm.checkpoint.model_file import MODEL_FILE
from megatron_bitcpm.checkpoint.safe_load import COMMON_FILE, load_common, read_metadata
from megatron_bitcpm.checkpoint.store import STATE_FILE, read_config, read_state
from megatron_bitcpm.checkpoint.torch_file import StoredTensor, TorchFile, map_file
from megatron_bitcpm.conversion.megatron.folder import (
    converted_fields,
    find_megatron_folder,
    refuse_format,
    resolve_vocab_size,
)
from megatron_bitcpm.conversion.megatron.legacy_args import read_args
from megatron_bitcpm.conversion.megatron.source import (
    DAMAGED,
    MegatronSource,
    MegatronTensors,
    check_shapes,
    refuse_dtype,
)
from megatron_bitcpm.data.tokenizer_ids import read_run_tokenizer
from megatron_bitcpm.errors import CheckpointError, describe
from megatron_bitcpm.quantizer import Quantizer

_LAYERS = "decoder.layers."


class TorchDistTensors(MegatronTensors):
    """The model tensors of a torch_dist checkpoint.

    Args:
        folder: with ``.metadata``.

    Raises:
        CheckpointError: the index is absent, damaged or refused.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._metadata = read_metadata(folder)
        self._entries = {
            name: entry
            for name, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and not name.startswith("optimizer.")
        }
        self._places = {
            (index.fqn, tuple(index.offset or ())): info
            for index, info in self._metadata.storage_data.items()
            if isinstance(index, MetadataIndex)
        }
        self._files: dict[str, memoryview] = {}

    def dtype(self, spec: TensorSpec, layer: int | None) -> torch.dtype:
        """Type of a tensor."""
        dtype: torch.dtype = self._entry(self._stored_name(spec, layer)).properties.dtype
        return dtype

    def tensor(self, spec: TensorSpec, layer: int | None) -> torch.Tensor:
        """Read a full tensor, without the layer dimension."""
        name = self._stored_name(spec, layer)
        shape = tuple(self._entry(name).size)
        if layer is None or name == name_of(spec, layer):
            return self._read(name, (0,) * len(shape), shape)
        if not layer < shape[0]:
            raise CheckpointError(
                f"checkpoint={self.folder}: {name} has {shape[0]} layers, none of number {layer}. "
                f"{DAMAGED}."
            )
        return self._read(name, (layer,) + (0,) * (len(shape) - 1), (1, *shape[1:]))[0]

    def check_shapes(self, model: ModelConfig) -> int:
        """Compare names and shapes with those of a model; return the rows of its embedding.

        Raises:
            CheckpointError: a tensor is absent, too many, or of another shape.
        """
        rows = self._entry(EMBEDDING.name).size[0]
        found = {}
        for name, entry in self._entries.items():
            if name.endswith("_extra_state"):
                continue
            shape = tuple(entry.size)
            refuse_dtype(entry.properties.dtype, name, self.folder)
            number, _, rest = name.removeprefix(_LAYERS).partition(".")
            if not name.startswith(_LAYERS) or number.isdigit():
                found[name] = shape
            else:
                found |= {f"{_LAYERS}{n}.{number}.{rest}": shape[1:] for n in range(shape[0])}
        check_shapes(found, model, rows, self.folder)
        return rows

    def _stored_name(self, spec: TensorSpec, layer: int | None) -> str:
        """Return the name of a tensor, layers numbered where the checkpoint numbers them."""
        name = name_of(spec, layer)
        return name if layer is None or name in self._entries else _LAYERS + spec.name

    def _entry(self, name: str) -> TensorStorageMetadata:
        if name not in self._entries:
            fix = "Use a checkpoint of a Llama or MiniCPM model"
            raise self._refusal(f"has no tensor {name}", fix)
        return self._entries[name]

    def _refusal(self, rule: str, fix: str) -> CheckpointError:
        return CheckpointError(f"checkpoint={self.folder}: {rule}. {fix}.")

    def _read(self, name: str, start: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
        """Read the box of `shape` that begins at `start`."""
        result = None
        covered: list[tuple[list[int], list[int]]] = []
        for chunk in self._entry(name).chunks:
            low = [max(a, b) for a, b in zip(start, chunk.offsets, strict=True)]
            high = [
                min(a + n, b + m)
                for a, n, b, m in zip(start, shape, chunk.offsets, chunk.sizes, strict=True)
            ]
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            stored = self._read_chunk(name, tuple(chunk.offsets), tuple(chunk.sizes))
            part = stored[_box(low, high, chunk.offsets)]
            if tuple(part.shape) == shape:
                return part
            if result is None:
                result = torch.empty(shape, dtype=stored.dtype)
            result[_box(low, high, start)] = part
            if any(_overlap(low, high, *other) for other in covered):
                raise self._refusal(f"tensor {name}: some values are listed twice", DAMAGED)
            covered.append((low, high))
        count = sum(math.prod(b - a for a, b in zip(*box, strict=True)) for box in covered)
        if result is None or count != result.numel():
            rule = f"tensor {name}: {count} of {math.prod(shape)} values are listed"
            raise self._refusal(rule, DAMAGED)
        return result

    def _read_chunk(
        self, name: str, offsets: tuple[int, ...], sizes: tuple[int, ...]
    ) -> torch.Tensor:
        file = None
        try:
            info = self._places[name, offsets]
            file = info.relative_path
            if getattr(info, "transform_descriptors", None):
                raise ValueError("is stored in a transformed (compressed) form")
            if file not in self._files:
                self._files[file] = map_file(self.folder / file)
            end = info.offset + info.length
            if not 0 <= info.offset <= end <= self._files[file].nbytes:
                raise ValueError(f"is cut off: {self._files[file].nbytes} of {end} bytes")
            item = TorchFile(self._files[file][info.offset : end])
            stored = item.content
            if not isinstance(stored, StoredTensor) or stored.shape != sizes:
                raise ValueError("holds something else")
            if stored.dtype != self._entries[name].properties.dtype:
                raise ValueError(f"is {stored.dtype}, unlike the index")
            return item.tensor(stored)
        # A damaged file can raise nearly anything while its pickle is decoded.
        except Exception as error:
            rule = f"tensor {name} in {file or 'no file'} cannot be read: {describe(error)}"
            raise self._refusal(rule, DAMAGED) from error


def _box(low: Any, high: Any, origin: Any) -> tuple[slice, ...]:
    return tuple(slice(a - o, b - o) for a, b, o in zip(low, high, origin, strict=True))


def _overlap(low: list[int], high: list[int], low2: list[int], high2: list[int]) -> bool:
    """Whether two boxes share a value."""
    return all(max(a, b) < min(c, d) for a, b, c, d in zip(low, low2, high, high2, strict=True))


def open_torch_dist(path: str | Path, tokenizer: str | Path | None = None) -> MegatronSource:
    """Open a torch_dist checkpoint.

    Args:
        path: a checkpoint, or the folder with its tracker file.
        tokenizer: tokenizer folder; needed where the checkpoint does not say how many ids there
            are, otherwise it must fit.

    Raises:
        CheckpointError: there is none, it is damaged or unsafe, or a model not computed here.
    """
    folder = find_megatron_folder(path)
    refuse_format(folder, "torch_dist")
    tensors = TorchDistTensors(folder)
    common = load_common(folder)  # also where nothing in it is needed: Megatron would load it
    if (folder / MODEL_FILE).is_file():
        fields = converted_fields(folder, tokenizer)
        rows = tensors.check_shapes(fields["model"])
        resolve_vocab_size(folder, rows, fields["vocab_size"], None)
    elif (folder / STATE_FILE).is_file():
        fields = _trained_fields(folder, tensors, tokenizer)
    else:
        fields = _stock_fields(folder, tensors, common, tokenizer)
    return MegatronSource(path=folder, kind="torch_dist", tensors=tensors, **fields)


def _trained_fields(
    folder: Path, tensors: TorchDistTensors, tokenizer: str | Path | None
) -> dict[str, Any]:
    state, config = read_state(folder), read_config(folder)
    rows = tensors.check_shapes(config.model)
    size = state.get("vocab_size")
    if type(size) is not int:
        raise CheckpointError(f"vocab_size={size}: must be a whole number, in {folder}. {DAMAGED}.")
    if tokenizer is not None:
        read_run_tokenizer(tokenizer, size, state.get("tokenizer_sha256"))
    stamp = state.get("quantizer")
    side_files = Path(config.data.tokenizer if tokenizer is None else tokenizer)
    seq_length = config.data.seq_length
    return {
        "form": "plain" if stamp is None else "latent",
        "model": config.model,
        "vocab_size": resolve_vocab_size(folder, rows, size, None),
        "quantizer": None if stamp is None else Quantizer.from_stamp(stamp, folder),
        "facts": {
            "iteration": state.get("iteration", 0),
            "tokens": state.get("consumed_samples", 0) * seq_length,
            "seq_length": seq_length,
            "valid_loss": state.get("valid_loss"),
            "tokenizer_sha256": state.get("tokenizer_sha256"),
        },
        "side_files": side_files if side_files.is_dir() else None,
    }


def _stock_fields(
    folder: Path,
    tensors: TorchDistTensors,
    common: dict[str, Any],
    tokenizer: str | Path | None,
) -> dict[str, Any]:
    stock = read_args(common.get("args"), common.get("iteration"), folder / COMMON_FILE)
    rows = tensors.check_shapes(stock.model)
    return {
        "form": "plain",
        "model": stock.model,
        "vocab_size": resolve_vocab_size(folder, rows, stock.vocab_size, tokenizer),
        "facts": stock.facts,
        "side_files": None if tokenizer is None else Path(tokenizer),
    }
