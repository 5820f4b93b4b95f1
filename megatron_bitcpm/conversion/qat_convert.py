"""Latent weights of a file, quantised once: what the fake quantiser of the training forward made.

The file stays what it is: the same names, types and shapes, everything but the projections of each
layer bit for bit, ``.bin`` or safetensors by the name of the output. A folder is converted as a
whole, by `convert`.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from megatron_bitcpm.arch.hf_config import CONFIG_FILE, QUANTIZER_KEY
from megatron_bitcpm.arch.tensors import Place, all_specs, find_projection
from megatron_bitcpm.conversion.convert import convert
from megatron_bitcpm.conversion.file_source import FileSource
from megatron_bitcpm.conversion.hf.config import QUANTIZER_FILE, read_origin
from megatron_bitcpm.conversion.hf.tensor_files import (
    SUFFIXES,
    BinFile,
    TensorFile,
    open_tensor_file,
)
from megatron_bitcpm.conversion.hf.tensor_writers import TYPE_NAMES, write_bin, write_safetensors
from megatron_bitcpm.conversion.open import open_source
from megatron_bitcpm.conversion.options import PathOption, QuantizerOptions
from megatron_bitcpm.conversion.output_folder import new_file
from megatron_bitcpm.conversion.quantization_error import (
    check_finite,
    check_off_grid,
    check_trained,
)
from megatron_bitcpm.conversion.source import TensorSource
from megatron_bitcpm.conversion.tensor_stream import (
    WEIGHT_DTYPES,
    count_bytes,
    equal_bytes,
    read_ahead,
)
from megatron_bitcpm.errors import BitcpmError, CheckpointError
from megatron_bitcpm.files import read_json
from megatron_bitcpm.progress import track_tensors
from megatron_bitcpm.quantizer import Quantizer

_WHOLE = "Name the whole model; of a sharded one the folder"


class QatOptions(QuantizerOptions):
    """Options of `qat_convert`."""

    input_bin: PathOption
    output: PathOption
    force: bool = Field(False)
    overwrite: bool = Field(False)


def qat_convert(
    input_bin: str | Path, output: str | Path, quant_type: str, group_size: int | str, **more: Any
) -> dict[str, Any]:
    """Quantise the projections of a weight file, or of a Hugging Face folder.

    Args:
        input_bin: ``.bin``, ``.pt`` or ``.safetensors`` file, or a folder with a model. A stamp in
            the config.json beside it must agree with the settings.
        output: a file, written as what its name says; a folder for a folder.
        quant_type: one of `GRIDS`.
        group_size: inputs per scale, -1 for a row, "tensor" for a projection.
        **more: numerics, eps (default those of the stamp, fp32 and 1e-5 without one), force
            (continue although the weights show no training on their grid), overwrite.
    Returns:
        For a file: input, output, quant_type, group_size, numerics, stamped, projections, weights,
        other_tensors, bytes, write_seconds, verify_seconds, warnings. For a folder the report of
        `convert`. Without a stamp on the ternary grid also other_numerics, changed_codes,
        changed_fraction and weights.

    Raises:
        CheckpointError: bad input or settings; the output is absent or as it was.
    """
    options = QatOptions.read(
        input_bin=input_bin, output=output, quant_type=quant_type, group_size=group_size, **more
    )
    if not options.input_bin.is_dir():
        return _convert_file(options)
    source = open_source(options.input_bin)
    if source.form == "pseudo":
        raise _quantized_already(source.path)
    if source.quantizer is not None:
        more.pop("force", None)  # a stamp says how they were trained: nothing to look at
    report = convert(
        input_bin, output, form="pseudo", quant_type=quant_type, group_size=group_size, **more
    )
    if source.quantizer is not None:
        return report
    named = dataclasses.replace(source, quantizer=options.quantizer(), form="latent")
    return report | _count_changed_codes(named)


def _convert_file(options: QatOptions) -> dict[str, Any]:
    path, output = options.input_bin, Path(os.path.realpath(options.output))
    if output.suffix not in SUFFIXES:
        raise CheckpointError(
            f"output={output}: is not a weight file by its name. Use {', '.join(SUFFIXES)}."
        )
    if Path(os.path.realpath(path)) == output:
        raise CheckpointError(f"output={output}: is the input. Name another file.")
    file = open_tensor_file(path)
    stamped = _find_quantizer(path)
    if stamped is not None:
        options.check_agrees(stamped)
    source, aliases = _open_latents(file, stamped or options.quantizer())
    warnings = _warn_of_latent_folder(output)
    if stamped is None:
        warnings += check_trained(source, "input_bin", options.force)
    quantizer, quantized = source.quantizer, source.quantized_tensors()
    assert quantizer is not None
    report: dict[str, Any] = {
        "input": str(path),
        "output": str(output),
        "quant_type": quantizer.config.grid,
        "group_size": quantizer.config.group_size,
        "numerics": quantizer.numerics,
        "stamped": stamped is not None,
        "projections": len(quantized),
        "weights": sum(torch.Size(file.shape(name)).numel() for name in quantized),
        "other_tensors": len(file.names()) - len(quantized),
    }
    with new_file(output, options.overwrite) as scratch:
        start = time.perf_counter()
        report["bytes"] = _write(scratch, source, aliases)
        written = time.perf_counter()
        _verify(scratch, source)
        report["write_seconds"] = round(written - start, 3)
        report["verify_seconds"] = round(time.perf_counter() - written, 3)
    if stamped is None:
        report |= _count_changed_codes(source)
    return {**report, "warnings": warnings}


# -- reading ---------------------------------------------------------------------------------------


def _error(path: Path, rule: str, fix: str) -> CheckpointError:
    return CheckpointError(f"input_bin={path}: {rule}. {fix}.")


def _quantized_already(path: Path) -> CheckpointError:
    return _error(path, f"was quantised before, says {QUANTIZER_FILE}", "Name the latent weights")


def _find_quantizer(path: Path) -> Quantizer | None:
    """Return the quantiser of a latent folder's config.json beside a weight file."""
    config = path.parent / CONFIG_FILE
    if not config.is_file():
        return None
    origin = read_origin(path.parent, read_json(config))
    if origin.form == "pseudo":
        raise _quantized_already(path)
    return origin.quantizer


def _open_latents(file: TensorFile, quantizer: Quantizer) -> tuple[FileSource, dict[str, str]]:
    """Return the tensors of a file of whole latent layers, and second names -> first ones."""
    aliases: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    layers: dict[int, set[str]] = {}
    for name in file.names():
        tensor, place = file.raw_tensor(name), find_projection(name)
        if tensor.dtype not in TYPE_NAMES:
            rule = f"{name} is {tensor.dtype}, which is not written here"
            raise _error(file.path, rule, "Name a file without it")
        if place is not None and place.layer is not None:
            layers.setdefault(place.layer, set()).add(place.local_hf)
            _check_projection(file.path, name, place, tensor, quantizer)
        elif isinstance(file, BinFile) and tensor.numel():
            # Safetensors knows no tensor with two names. A projection's other name is written
            # apart: that one stays as it is.
            memory = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
            if memory in seen:
                aliases[name] = seen[memory]
            seen.setdefault(memory, name)
    _check_whole(file.path, layers)
    source = FileSource(
        path=file.path,
        kind="file",
        form="latent",
        quantizer=quantizer,
        files=dict.fromkeys(file.names(), file),
        layers=_count_layers(file.path, len(layers), quantizer),
    )
    return source, aliases


def _check_projection(
    path: Path, name: str, place: Place, tensor: torch.Tensor, quantizer: Quantizer
) -> None:
    """Refuse a projection that cannot be quantised, or has been already."""
    if tensor.ndim != 2 or not tensor.numel() or tensor.dtype not in WEIGHT_DTYPES:
        rule = f"{name} is {tensor.dtype} {list(tensor.shape)}, not a matrix of float32, bfloat16"
        raise _error(path, f"{rule} or float16", "Name latent weights")
    try:
        quantizer.weights_per_scale(place, tuple(tensor.shape))
    except BitcpmError as error:
        raise _error(path, f"{name}: {str(error).rstrip('.')}", "Nothing was written") from error
    check_off_grid(name, tensor, quantizer.config.eps, f"input_bin={path}")


def _check_whole(path: Path, layers: dict[int, set[str]]) -> None:
    """Refuse a file that lacks projections, which then would stay in full precision."""
    if not layers:
        rule = "holds no projection such as model.layers.0.self_attn.q_proj.weight"
        raise _error(path, rule, "Name the weights of a Llama or MiniCPM")
    absent = next((n for n in range(max(layers)) if n not in layers), None)
    if absent is not None:
        rule = f"holds layer {max(layers)}, but nothing of layer {absent}"
        raise _error(path, rule, _WHOLE)
    missing = [
        place.name("hf")
        for layer in sorted(layers)
        for spec in all_specs()
        if spec.role == "projection"
        for place in (Place(spec, part, layer) for part in range(len(spec.parts)))
        if place.local_hf not in layers[layer]
    ]
    if missing:
        more = ", ..." if len(missing) > 5 else ""
        rule = f"lacks {len(missing)} projections: {', '.join(missing[:5])}{more}"
        raise _error(path, rule, _WHOLE)


def _count_layers(path: Path, held: int, quantizer: Quantizer) -> int:
    """Return the layers of the model that a file holds the first ones of."""
    last = quantizer.config.full_precision_last_layers
    if last == 0:
        return held  # then no filter counts from the end
    # The file may be the first shard of several: only config.json knows the last layer.
    config = path.parent / CONFIG_FILE
    count = read_json(config).get("num_hidden_layers") if config.is_file() else None
    if type(count) is int and count >= held:
        return count
    said = f"says num_hidden_layers {count!r}" if config.is_file() else "is missing"
    rule = f"holds {held} layers, of a model whose last {last} stay in full precision, but {config}"
    raise _error(path, f"{rule} {said}", f"Put the model's {CONFIG_FILE} beside the file")


def _warn_of_latent_folder(output: Path) -> list[str]:
    """Say so when the config.json beside the output would quantise its weights again."""
    config = output.parent / CONFIG_FILE
    if not config.is_file() or QUANTIZER_KEY not in read_json(config):
        return []
    return [
        f"{config} is that of latent weights, whose modelling file would quantise {output.name} "
        "again; to serve it, convert the folder instead"
    ]


# -- writing ---------------------------------------------------------------------------------------


def _read(source: FileSource, name: str, quantized: dict[str, int]) -> torch.Tensor:
    """Read a tensor of any type, quantised where it is to be."""
    if name not in quantized:
        return source.files[name].raw_tensor(name)
    try:
        return source.forward_tensor(name)
    except BitcpmError as error:
        rule = f"{name}: {str(error).rstrip('.')}"
        raise _error(source.path, rule, "Name another") from error


def _layout(source: FileSource) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    raw = {name: file.raw_tensor(name) for name, file in source.files.items()}
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in raw.items()}


def _iter_tensors(source: FileSource, sizes: dict[str, int]) -> Iterator[tuple[str, torch.Tensor]]:
    quantized = source.quantized_tensors()
    for name in track_tensors(sizes, "convert"):
        tensor = _read(source, name, quantized)
        check_finite(name, tensor, f"input_bin={source.path}")
        yield name, tensor.contiguous()
        del tensor


def _write(path: Path, source: FileSource, aliases: dict[str, str]) -> int:
    layout = _layout(source)
    if path.suffix != ".safetensors":  # which writes a tensor of two names twice
        layout = {name: entry for name, entry in layout.items() if name not in aliases}
    sizes = {name: count_bytes(*entry) for name, entry in layout.items()}
    with closing(read_ahead(_iter_tensors(source, sizes))) as tensors:
        if path.suffix == ".safetensors":
            return write_safetensors(path, layout, tensors)
        return write_bin(path, layout, tensors, aliases)


def _verify(path: Path, source: FileSource) -> None:
    """Compare the written file with its input, quantised again, byte for byte."""
    found, quantized = open_tensor_file(path), source.quantized_tensors()
    sizes = {name: count_bytes(*entry) for name, entry in _layout(source).items()}
    assert set(found.names()) == set(sizes)
    for name in track_tensors(sizes, "verify"):
        if not equal_bytes(found.raw_tensor(name), _read(source, name, quantized)):
            rule = f"{name} was not written as it was computed"
            raise _error(source.path, rule, "Try again; check disk and memory")


def _count_changed_codes(source: TensorSource) -> dict[str, Any]:
    """Count the codes that the other numerics would make of latents; empty where there are none."""
    names, other = source.quantized_tensors(), source.with_other_numerics()
    if other is None or other.quantizer is None:
        return {}
    shapes, changed = source.shapes(), 0
    sizes = {name: count_bytes(shapes[name], source.dtype(name)) for name in names}
    for name in track_tensors(sizes, "count"):
        # A code has the sign of its latent weight in both: only zeros can differ.
        zeros = (s.forward_tensor(name) == 0 for s in (source, other))
        changed += int(torch.count_nonzero(next(zeros) ^ next(zeros)))
    weights = sum(torch.Size(shapes[name]).numel() for name in names)
    return {
        "other_numerics": other.quantizer.numerics,
        "changed_codes": changed,
        "changed_fraction": changed / weights,
        "weights": weights,
    }
