"""The proof that a Hugging Face folder holds the ternary model of a checkpoint.

Two questions. Is the folder a ternary model at all: it lists the tensors that its quantiser makes
ternary, every group of them holds one magnitude besides 0, tensors match config.json, ids of the
tokenizer fit. And, with a checkpoint, is it *that* model: codes and scales equal those of the
training forward, everything else is equal bit for bit. Tensors are read one at a time.

Codes are read back as sign(wq), scales as max |wq| of the group.

Shape legend: O out, I in, G groups per row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from megatron_bitcpm.checkpoint.hf_config import (
    CONFIG_FILE,
    llama_config,
    llama_shapes,
    read_json,
    read_tokenizer_ids,
)
from megatron_bitcpm.checkpoint.hf_tensors import HfFolder, folder_error
from megatron_bitcpm.checkpoint.megatron_to_hf import (
    QuantizerStamp,
    iter_hf_tensors,
    list_ternary_tensors,
    parse_stamp,
    read_stamp,
    vocabulary_size,
)
from megatron_bitcpm.checkpoint.reader import CheckpointReader
from megatron_bitcpm.config import ModelConfig
from megatron_bitcpm.errors import BitcpmError

QUANTIZER_FILE = "bitcpm_quantizer.json"
_MODEL_FIELDS = {
    "head_dim": "kv_channels",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "max_position_embeddings": "max_position_embeddings",
    "num_attention_heads": "num_attention_heads",
    "num_hidden_layers": "num_layers",
    "num_key_value_heads": "num_query_groups",
}
"""Whole numbers of config.json that make up the architecture, and their names here."""
SCALE_BITS = 32
"""Bits of a packed scale (float32)."""


@dataclass
class _Count:
    """Totals over the ternary tensors."""

    tensors: int = 0
    groups: int = 0
    zeros: int = 0
    plus: int = 0
    weights: int = 0
    other: int = 0

    def add(self, codes_OI: torch.Tensor, group_size: int) -> None:
        self.tensors += 1
        self.groups += codes_OI.numel() // group_size
        self.zeros += int((codes_OI == 0).sum())
        self.plus += int((codes_OI > 0).sum())
        self.weights += codes_OI.numel()

    def entropy_bits(self) -> float:
        counts = (self.zeros, self.plus, self.weights - self.zeros - self.plus)
        return -sum(n / self.weights * math.log2(n / self.weights) for n in counts if n)


@dataclass
class _Differences:
    """What is not as in the checkpoint, by tensor."""

    codes: dict[str, int] = field(default_factory=dict)
    scales: dict[str, int] = field(default_factory=dict)
    values: dict[str, int] = field(default_factory=dict)

    def compare(
        self, name: str, found: torch.Tensor, wanted: torch.Tensor, group_size: int | None
    ) -> None:
        """Compare a tensor; group_size None means bit for bit."""
        if group_size is None:
            bits = torch.int16 if found.element_size() == 2 else torch.int32
            count = int((found.view(bits) != wanted.view(bits)).sum())
            self._note(self.values, name, count)
            return
        self._note(self.codes, name, int((found.sign() != wanted.sign()).sum()))
        scales = [w.abs().view(-1, group_size).amax(-1) for w in (found, wanted)]
        self._note(self.scales, name, int((scales[0] != scales[1]).sum()))

    @staticmethod
    def _note(counts: dict[str, int], name: str, count: int) -> None:
        if count:
            counts[name] = count

    def describe(self) -> str:
        """Return '' where nothing differs."""
        parts = []
        for kind in ("codes", "scales", "values"):
            counts: dict[str, int] = getattr(self, kind)
            if counts:
                listed = ", ".join(f"{name} ({count})" for name, count in list(counts.items())[:5])
                more = f" and {len(counts) - 5} more tensors" if len(counts) > 5 else ""
                parts.append(f"{sum(counts.values())} {kind} differ: {listed}{more}")
        return "; ".join(parts)


def verify(folder: str | Path, checkpoint: str | Path | None = None) -> dict[str, Any]:
    """Prove that a folder is a ternary model, and that of a checkpoint.

    Args:
        folder: Hugging Face folder written by `export_hf`.
        checkpoint: checkpoint or run folder it must equal; None checks the folder by itself.
    Returns:
        Counts (ternary_tensors, groups, weights, other_parameters), group_sizes, zero_fraction,
        entropy_bits_per_weight (of the codes), packed_bits_per_weight (2 bits and float32 scales);
        activation: what entered the ternary linears in training, "none" or "int8_per_token";
        checkpoint: its folder, or None; with a checkpoint also its iteration, compared_tensors,
        differing_codes, differing_scales and differing_values, all 0.

    Raises:
        CheckpointError: anything is not so; names the tensor.
    """
    folder = Path(folder)
    if not (folder / QUANTIZER_FILE).is_file():
        if not folder.is_dir():
            raise folder_error(
                folder, "no such folder", "Name a folder written by bitcpm export hf"
            )
        raise folder_error(
            folder, f"not a ternary folder: it has no {QUANTIZER_FILE}",
            "Export a ternary checkpoint with bitcpm export hf",
        )  # fmt: skip
    reader = CheckpointReader(checkpoint) if checkpoint is not None else None
    return verify_tensors(folder, _read_groups(folder), reader)


def verify_tensors(
    folder: Path, groups: dict[str, int], reader: CheckpointReader | None
) -> dict[str, Any]:
    """Check a folder whose ternary tensors are known; arguments and result as `verify`.

    Args:
        folder: Hugging Face folder.
        groups: ternary tensor -> weights per scale; empty for a full-precision model.
        reader: the checkpoint it must equal, or None.
    """
    config, model = _check_config(folder, reader)
    count, differences = _Count(), _Differences()
    compared = 0
    with HfFolder(folder) as stored:
        _check_shapes(folder, stored, config, groups)
        activation = _activation_of(_check_list(folder, model, groups))
        if reader is not None:
            _check_source(folder, groups, activation, reader)
        for name, wanted in _wanted_tensors(stored, reader):
            found = stored.tensor(name)
            _check_tensor(folder, name, found, config["torch_dtype"])
            if name in groups:
                _check_groups(folder, name, found, groups[name])
                count.add(found.sign().to(torch.int8), groups[name])
            else:
                count.other += found.numel()
            if wanted is not None:
                differences.compare(name, found, wanted, groups.get(name))
                compared += 1
    if problem := differences.describe():
        assert reader is not None
        raise folder_error(folder, f"not the model of {reader.folder}: {problem}")
    report: dict[str, Any] = {
        "folder": str(folder),
        "ternary_tensors": count.tensors,
        "group_sizes": sorted(set(groups.values())),
        "groups": count.groups,
        "weights": count.weights,
        "other_parameters": count.other,
        "activation": activation,
        "checkpoint": None,
    }
    if count.weights:
        report |= {
            "zero_fraction": count.zeros / count.weights,
            "entropy_bits_per_weight": count.entropy_bits(),
            "packed_bits_per_weight": 2 + SCALE_BITS * count.groups / count.weights,
        }
    if reader is not None:
        report |= {
            "checkpoint": str(reader.folder),
            "iteration": reader.state.get("iteration"),
            "compared_tensors": compared,
            "differing_codes": 0,
            "differing_scales": 0,
            "differing_values": 0,
        }
    return report


def _wanted_tensors(
    stored: HfFolder, reader: CheckpointReader | None
) -> Iterator[tuple[str, torch.Tensor | None]]:
    if reader is None:
        yield from ((name, None) for name in stored.names())
    else:
        yield from iter_hf_tensors(reader)


def _read_groups(folder: Path) -> dict[str, int]:
    groups = read_json(folder / QUANTIZER_FILE).get("ternary_tensors")
    if not isinstance(groups, dict) or not groups:
        raise folder_error(folder, f"{QUANTIZER_FILE} lists no ternary tensors")
    return groups


def _check_list(folder: Path, model: ModelConfig, groups: dict[str, int]) -> QuantizerStamp | None:
    """Return the stamped quantiser, which must make exactly the listed tensors ternary."""
    wanted: dict[str, int] = {}
    stamp = None
    if (folder / QUANTIZER_FILE).is_file():
        stamp = parse_stamp(
            read_json(folder / QUANTIZER_FILE).get("quantizer"), folder / QUANTIZER_FILE
        )
        try:
            wanted = list_ternary_tensors(model, stamp)
        except BitcpmError as error:
            raise folder_error(
                folder, f"{QUANTIZER_FILE} does not fit config.json: {error}".rstrip(".")
            ) from error
    if groups != wanted:
        odd = [name for name in sorted({*groups, *wanted}) if groups.get(name) != wanted.get(name)]
        more = f" and {len(odd) - 5} more" if len(odd) > 5 else ""
        raise folder_error(
            folder, f"{QUANTIZER_FILE} lists other tensors or groups than its quantizer makes: "
            f"{', '.join(odd[:5])}{more}",
        )  # fmt: skip
    return stamp


def _activation_of(stamp: QuantizerStamp | None) -> str:
    return "none" if stamp is None else stamp.quant.activation


def _check_source(
    folder: Path, groups: dict[str, int], activation: str, reader: CheckpointReader
) -> None:
    """Raise unless the checkpoint was trained with the quantiser that the folder names."""
    stamp = read_stamp(reader)
    if groups != list_ternary_tensors(reader.config.model, stamp):
        raise folder_error(
            folder, f"{QUANTIZER_FILE} lists other tensors or groups than {reader.folder}"
        )
    # Where nothing is ternary there is no such file, and nothing was rounded.
    if groups and activation != _activation_of(stamp):
        raise folder_error(
            folder, f"{QUANTIZER_FILE} has activation {activation!r}, the checkpoint "
            f"{_activation_of(stamp)!r}",
        )  # fmt: skip


def _check_model(folder: Path, config: dict[str, Any]) -> ModelConfig:
    """Return the architecture in config.json, whose values must have the right types."""
    for key in (*_MODEL_FIELDS, "vocab_size"):
        value = config.get(key)
        # A bool is an int in Python.
        if type(value) is not int or value < 1:
            raise folder_error(folder, f"config.json has {key} {value!r}, not a positive integer")
    for key in ("rms_norm_eps", "rope_theta"):
        value = config.get(key)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise folder_error(folder, f"config.json has {key} {value!r}, not a positive number")
    for key, kind, words in (
        ("tie_word_embeddings", bool, "true or false"),
        ("torch_dtype", str, "the name of a type"),
    ):
        if not isinstance(config.get(key), kind):
            raise folder_error(folder, f"config.json has {key} {config.get(key)!r}, not {words}")
    try:
        return ModelConfig(**{ours: config[key] for key, ours in _MODEL_FIELDS.items()})
    except ValidationError as error:
        first = error.errors()[0]
        raise folder_error(
            folder, f"config.json describes no model: {first['loc'][0]} {first['input']}: "
            f"{first['msg']}",
        ) from error  # fmt: skip


def _check_config(
    folder: Path, reader: CheckpointReader | None
) -> tuple[dict[str, Any], ModelConfig]:
    """Return config.json, which must fit the tokenizer, and the checkpoint if there is one."""
    config: dict[str, Any] = read_json(folder / CONFIG_FILE)
    model = _check_model(folder, config)
    ids = read_tokenizer_ids(folder)
    if ids.size > config["vocab_size"]:
        raise folder_error(
            folder, f"the tokenizer has {ids.size} ids, config.json vocab_size "
            f"{config['vocab_size']}",
        )  # fmt: skip
    if reader is not None:
        dtype = reader.dtype("embedding.word_embeddings.weight")
        wanted = llama_config(reader.config.model, dtype, vocabulary_size(reader), ids)
        for key, value in wanted.items():
            if key not in config or config[key] != value:
                raise folder_error(
                    folder, f"config.json has {key} {config.get(key)!r}, the checkpoint {value!r}"
                )
    return config, model


def _check_shapes(
    folder: Path, stored: HfFolder, config: dict[str, Any], groups: dict[str, int]
) -> None:
    shapes = llama_shapes(config)
    names = set(stored.names())
    for kind, odd in (("missing", set(shapes) - names), ("unexpected", names - set(shapes))):
        if odd:
            raise folder_error(folder, f"{len(odd)} {kind} tensors: {', '.join(sorted(odd)[:5])}")
    for name, shape in shapes.items():
        if stored.shape(name) != shape:
            raise folder_error(
                folder, f"{name} has shape {list(stored.shape(name))}, config.json calls for "
                f"{list(shape)}",
            )  # fmt: skip
    for name, group_size in groups.items():
        shape = shapes.get(name, ())
        if len(shape) != 2 or not isinstance(group_size, int) or group_size < 1:
            raise folder_error(folder, f"{QUANTIZER_FILE}: {name} with groups of {group_size}")
        # A scale is of inputs of a row, or of the whole tensor.
        if shape[1] % group_size and group_size != math.prod(shape):
            raise folder_error(folder, f"{name}: {shape[1]} inputs are no multiple of {group_size}")


def _check_tensor(folder: Path, name: str, found: torch.Tensor, dtype: str) -> None:
    if str(found.dtype) != f"torch.{dtype}":
        raise folder_error(folder, f"{name} is {found.dtype}, config.json says {dtype}")
    bad = int((~found.isfinite()).sum())
    if bad:
        raise folder_error(folder, f"{name} holds {bad} NaN or infinite values")


def _check_groups(folder: Path, name: str, w_OI: torch.Tensor, group_size: int) -> None:
    """Raise unless each group holds at most one magnitude besides 0."""
    groups = w_OI.view(-1, group_size)
    magnitudes = groups.abs()
    odd = (magnitudes != 0) & (magnitudes != magnitudes.amax(-1, keepdim=True))
    if odd.any():
        number = int(odd.any(-1).nonzero()[0])
        if group_size > w_OI.shape[1]:
            where = "the one group"
        else:
            row, group = divmod(number, w_OI.shape[1] // group_size)
            where = f"row {row}, group {group}"
        unit = "weights" if group_size > w_OI.shape[1] else "inputs"
        values = groups[number].unique().tolist()
        shown = ", ".join(f"{value:.7g}" for value in values[:8])
        more = f", ... ({len(values)} values)" if len(values) > 8 else ""
        raise folder_error(
            folder, f"{name} is not ternary: {where} of {group_size} {unit} holds {shown}{more}",
        )  # fmt: skip
