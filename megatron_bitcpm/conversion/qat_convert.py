"""Latent weights of a file, quantised once: what the fake quantiser of the training forward made.

The file stays what it is: the same names, types and shapes, everything but the seven projections of
each layer bit for bit, ``.bin`` or safetensors by the name of the output. A folder is converted as
a whole, by `hf.writer`.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterator
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from megatron_bitcpm.conversion.hf.bin_writer import write_bin
from megatron_bitcpm.conversion.hf.config import CONFIG_FILE, QUANTIZER_FILE, read_stamp
from megatron_bitcpm.conversion.hf.modeling.writer import QUANTIZER_KEY
from megatron_bitcpm.conversion.hf.safetensors_writer import write_safetensors
from megatron_bitcpm.conversion.hf.tensor_files import open_tensor_file
from megatron_bitcpm.conversion.hf.writer import write_folder
from megatron_bitcpm.conversion.latent_file import FIELD, LatentFile, file_error, survey
from megatron_bitcpm.conversion.open import open_source
from megatron_bitcpm.conversion.output_folder import new_file
from megatron_bitcpm.conversion.quantization_error import check_finite, check_trained
from megatron_bitcpm.conversion.quantizer_settings import (
    QuantizerSettings,
    parse_quantizer_settings,
)
from megatron_bitcpm.conversion.source import ModelSource
from megatron_bitcpm.conversion.stamp import BF16_RECIPROCAL, FP32, QuantizerStamp
from megatron_bitcpm.conversion.tensor_stream import count_bytes, equal_bytes, read_ahead
from megatron_bitcpm.errors import CheckpointError
from megatron_bitcpm.files import read_json
from megatron_bitcpm.progress import track_tensors


def qat_convert(
    input_bin: str | Path,
    output: str | Path,
    quant_type: str,
    group_size: int | str,
    numerics: str | None = None,
    eps: float | None = None,
    force: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Quantise the projections of a weight file, or of a Hugging Face folder.

    Args:
        input_bin: ``.bin``, ``.pt`` or ``.safetensors`` file, or a folder with a model. A stamp in
            the config.json beside it must agree with the settings.
        output: a file, written as what its name says; a folder for a folder.
        quant_type: one of `GRIDS`.
        group_size: inputs per scale, -1 for a row, "tensor" for a projection.
        numerics: fp32 or bf16_reciprocal; default that of the stamp, fp32 without one.
        eps: smallest scale; default that of the stamp, 1e-5 without one.
        force: go on although the weights show no training on their grid.
        overwrite: replace an existing output.
    Returns:
        For a file: input, output, quant_type, group_size, numerics, stamped, projections, weights,
        other_tensors, bytes, write_seconds, verify_seconds, warnings. For a folder the report of
        `write_folder`. Without a stamp on the ternary grid also other_numerics, changed_codes,
        changed_fraction and weights.

    Raises:
        CheckpointError: bad input or settings; the output is absent or as it was.
    """
    settings = parse_quantizer_settings(quant_type, group_size, numerics, eps)
    if Path(input_bin).is_dir():
        source = open_source(input_bin)
        if source.form == "pseudo":
            raise _quantized_already(source.path)
        if source.stamp is not None:
            settings.check_agrees(source.stamp)
            return write_folder(source, output, "pseudo", overwrite=overwrite)
        stamp = settings.make_stamp()
        report = write_folder(
            source, output, "pseudo", overwrite=overwrite, stamp=stamp, force=force
        )
        return report | _count_changed_codes(source, stamp)
    return _convert_file(
        Path(input_bin), Path(os.path.realpath(output)), settings, force, overwrite
    )


# -- files -----------------------------------------------------------------------------------------


def _write_bin(path: Path, weights: LatentFile, tensors: Iterator[tuple[str, torch.Tensor]]) -> int:
    return write_bin(path, weights.layout, tensors, weights.aliases)


def _write_safetensors(
    path: Path, weights: LatentFile, tensors: Iterator[tuple[str, torch.Tensor]]
) -> int:
    """Write a tensor of two names twice: safetensors knows no such thing."""
    aliases = {name: weights.layout[target] for name, target in weights.aliases.items()}
    again = ((name, weights.file.raw_tensor(name)) for name in aliases)
    return write_safetensors(path, weights.layout | aliases, chain(tensors, again))


_WRITERS = {
    ".safetensors": _write_safetensors,
    ".bin": _write_bin,
    ".pt": _write_bin,
    ".pth": _write_bin,
}


def _convert_file(
    path: Path, output: Path, settings: QuantizerSettings, force: bool, overwrite: bool
) -> dict[str, Any]:
    write = _WRITERS.get(output.suffix)
    if write is None:
        raise CheckpointError(
            f"output={output}: is no weight file by its name. Use {', '.join(_WRITERS)}."
        )
    if Path(os.path.realpath(path)) == output:
        raise CheckpointError(f"output={output}: is the input. Name another file.")
    file = open_tensor_file(path)
    stamped = _find_stamp(path)
    if stamped is not None:
        settings.check_agrees(stamped)
    weights = survey(file, stamped or settings.make_stamp())
    quantized = weights.quantized_names()
    counts, warnings = None, _warn_of_latent_folder(output)
    if stamped is None:
        warnings += _check_trained(weights, force)
        counts = _ChangedCodes(weights.stamp, {weights.layout[name][1] for name in quantized})
    report: dict[str, Any] = {
        "input": str(path),
        "output": str(output),
        "quant_type": weights.stamp.quant.grid,
        "group_size": weights.stamp.quant.group_size,
        "numerics": weights.stamp.numerics,
        "stamped": stamped is not None,
        "projections": len(quantized),
        "weights": sum(torch.Size(weights.layout[name][0]).numel() for name in quantized),
        "other_tensors": len(file.names()) - len(quantized),
    }
    with new_file(output, overwrite) as scratch:
        start = time.perf_counter()
        with closing(read_ahead(_iter_converted(weights, counts))) as tensors:
            report["bytes"] = write(scratch, weights, tensors)
        written = time.perf_counter()
        _verify(scratch, weights)
        report["write_seconds"] = round(written - start, 3)
        report["verify_seconds"] = round(time.perf_counter() - written, 3)
    if counts is not None:
        report |= counts.report()
    return {**report, "warnings": warnings}


def _find_stamp(path: Path) -> QuantizerStamp | None:
    """Return the stamp of a latent folder's config.json beside a weight file."""
    config = path.parent / CONFIG_FILE
    if not config.is_file():
        return None
    form, stamp, _, _ = read_stamp(path.parent, read_json(config))
    if form == "pseudo":
        raise _quantized_already(path)
    return stamp


def _quantized_already(path: Path) -> CheckpointError:
    return file_error(
        path, f"was quantised before, says {QUANTIZER_FILE}", "Name the latent weights"
    )


def _warn_of_latent_folder(output: Path) -> list[str]:
    """Say so when the config.json beside the output would quantise its weights again."""
    config = output.parent / CONFIG_FILE
    if not config.is_file() or QUANTIZER_KEY not in read_json(config):
        return []
    return [
        f"{config} is that of latent weights, whose modelling file would quantise {output.name} "
        "again; to serve it, convert the folder instead"
    ]


def _check_trained(weights: LatentFile, force: bool) -> list[str]:
    shapes = {name: shape for name, (shape, _) in weights.layout.items()}

    def read(name: str) -> torch.Tensor:
        return weights.file.raw_tensor(name).contiguous()

    place = (FIELD, weights.file.path)
    return check_trained(shapes, read, weights.num_layers, weights.stamp, place, force)


def _iter_converted(
    weights: LatentFile, counts: _ChangedCodes | None
) -> Iterator[tuple[str, torch.Tensor]]:
    sizes = {name: count_bytes(*entry) for name, entry in weights.layout.items()}
    quantized = set(weights.quantized_names())
    for name in track_tensors(sizes, "convert"):
        tensor = weights.converted(name)
        check_finite(name, tensor, (FIELD, weights.file.path))
        if counts is not None and counts.other is not None and name in quantized:
            counts.add(weights.converted(name, counts.other), tensor)
        yield name, tensor.contiguous()
        del tensor


def _verify(path: Path, weights: LatentFile) -> None:
    """Compare the written file with its input, quantised again, byte for byte."""
    found = open_tensor_file(path)
    names = {**{name: name for name in weights.layout}, **weights.aliases}
    assert set(found.names()) == set(names)
    for name in track_tensors(
        {n: count_bytes(*weights.layout[t]) for n, t in names.items()}, "verify"
    ):
        if not equal_bytes(found.raw_tensor(name), weights.converted(name)):
            raise file_error(
                weights.file.path,
                f"{name} was not written as it was computed",
                "Try again; check disk and memory",
            )


class _ChangedCodes:
    """Counts the codes that the other numerics would make of the same latents.

    Args:
        stamp: the quantiser.
        dtypes: types of the latents.

    Attributes:
        other: the quantiser with the other numerics; None where these do not exist.
    """

    def __init__(self, stamp: QuantizerStamp, dtypes: set[torch.dtype]) -> None:
        numerics = BF16_RECIPROCAL if stamp.numerics == FP32 else FP32
        exists = stamp.quant.grid == "ternary" and torch.float16 not in dtypes
        self.other = dataclasses.replace(stamp, numerics=numerics) if exists else None
        self._changed = self._total = 0

    def add(self, other_OI: torch.Tensor, wq_OI: torch.Tensor) -> None:
        """Count one projection, given its values in both numerics."""
        # A code has the sign of its latent weight in both: only zeros can differ.
        self._changed += int(torch.count_nonzero((other_OI != 0) ^ (wq_OI != 0)))
        self._total += wq_OI.numel()

    def report(self) -> dict[str, Any]:
        """Return what `qat_convert` reports; empty where there are no other numerics."""
        if self.other is None:
            return {}
        return {
            "other_numerics": self.other.numerics,
            "changed_codes": self._changed,
            "changed_fraction": self._changed / self._total,
            "weights": self._total,
        }


def _count_changed_codes(source: ModelSource, stamp: QuantizerStamp) -> dict[str, Any]:
    """Count them in all of a model that comes without a stamp."""
    latent = dataclasses.replace(source, form="latent", stamp=stamp)
    names = latent.quantized_tensors()
    counts = _ChangedCodes(stamp, {latent.dtype(name) for name in names})
    if counts.other is not None:
        other = dataclasses.replace(latent, stamp=counts.other)
        shapes = latent.shapes()
        sizes = {name: count_bytes(shapes[name], latent.dtype(name)) for name in names}
        for name in track_tensors(sizes, "count"):
            counts.add(other.forward_tensor(name), latent.forward_tensor(name))
    return counts.report()
