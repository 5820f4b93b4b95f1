"""Latent weights of a file, quantised once: what the fake quantiser of the training forward made.

The file stays what it is: the same names, types and shapes, everything but the seven projections of
each layer bit for bit, ``.bin`` or safetensors by the name of the output. A folder is converted as
a whole, by `hf.writer`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from megatron_bitcpm.config import QuantConfig
from megatron_bitcpm.conversion.hf.bin_writer import write_bin
from megatron_bitcpm.conversion.hf.config import CONFIG_FILE
from megatron_bitcpm.conversion.hf.modeling.writer import QUANTIZER_KEY
from megatron_bitcpm.conversion.hf.safetensors_writer import write_safetensors
from megatron_bitcpm.conversion.hf.tensor_files import TensorFile, open_tensor_file
from megatron_bitcpm.conversion.hf.writer import write_folder
from megatron_bitcpm.conversion.names import LINEARS, find_projection
from megatron_bitcpm.conversion.open import open_source
from megatron_bitcpm.conversion.output_folder import new_file
from megatron_bitcpm.conversion.progress import track_tensors
from megatron_bitcpm.conversion.quantization_error import measure_latents
from megatron_bitcpm.conversion.stamp import (
    BF16_RECIPROCAL,
    FP32,
    NUMERICS,
    QuantizerStamp,
    fake_quantize_projection,
    parse_stamp,
)
from megatron_bitcpm.conversion.tensor_stream import count_bytes, equal_bytes, is_finite, read_ahead
from megatron_bitcpm.errors import BitcpmError, CheckpointError
from megatron_bitcpm.files import read_json
from megatron_bitcpm.quant.grids import GRIDS
from megatron_bitcpm.quant.scales import DEFAULT_EPS, check_eps

_WRITERS: dict[str, Callable[..., int]] = {
    ".safetensors": write_safetensors,
    ".bin": write_bin,
    ".pt": write_bin,
    ".pth": write_bin,
}
_BLOCK = 8
_ROWS = 64


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
        other_tensors, bytes, write_seconds, verify_seconds, warnings; without a stamp on the
        ternary grid also other_numerics, changed_codes and changed_fraction. For a folder the
        report of `write_folder`.

    Raises:
        CheckpointError: bad input or settings; the output is absent or as it was.
    """
    settings = _check_settings(quant_type, group_size, numerics, eps)
    if Path(input_bin).is_dir():
        source = open_source(input_bin)
        if source.stamp is not None:
            _check_agrees(source.stamp, settings)
            return write_folder(source, output, "pseudo", overwrite=overwrite)
        stamp = settings.make_stamp()
        return write_folder(source, output, "pseudo", overwrite=overwrite, stamp=stamp, force=force)
    return _convert_file(
        Path(input_bin), Path(os.path.realpath(output)), settings, force, overwrite
    )


@dataclass(frozen=True)
class _Settings:
    """The quantiser as asked for; None: the stamp's, or the default."""

    grid: str
    group_size: int | str
    numerics: str | None
    eps: float | None

    def make_stamp(self) -> QuantizerStamp:
        """Return the quantiser of weights that do not name one."""
        eps = DEFAULT_EPS if self.eps is None else self.eps
        content = {"grid": self.grid, "group_size": self.group_size, "eps": eps}
        return QuantizerStamp(QuantConfig(**content), 1, self.numerics or FP32)


def _check_settings(
    quant_type: str, group_size: int | str, numerics: str | None, eps: float | None
) -> _Settings:
    if quant_type not in GRIDS:
        raise CheckpointError.of(
            "quant_type", quant_type, "is no quantiser", f"Use {', '.join(GRIDS)}"
        )
    if group_size != "tensor":
        try:
            group_size = int(group_size)
        except ValueError:
            group_size = 0
        if group_size < 1 and group_size != -1:
            raise CheckpointError.of(
                "group_size", group_size, "must be at least 1, -1 for the whole row, or tensor",
                "Use the one of the training",
            )  # fmt: skip
    if numerics is not None and numerics not in NUMERICS:
        raise CheckpointError.of("numerics", numerics, "is unknown", f"Use {' or '.join(NUMERICS)}")
    if numerics == BF16_RECIPROCAL and quant_type != "ternary":
        raise CheckpointError.of(
            "numerics", numerics, f"exists for the ternary grid, not for {quant_type}",
            f"Use numerics {FP32}",
        )  # fmt: skip
    if eps is not None:
        check_eps(eps)
    return _Settings(quant_type, group_size, numerics, eps)


def _check_agrees(stamp: QuantizerStamp, settings: _Settings) -> None:
    """Refuse settings that are not those of the training."""
    for name, given, stamped in (
        ("quant_type", settings.grid, stamp.quant.grid),
        ("group_size", settings.group_size, stamp.quant.group_size),
        ("numerics", settings.numerics, stamp.numerics),
        ("eps", settings.eps, stamp.quant.eps),
    ):
        if given is not None and given != stamped:
            raise CheckpointError.of(
                name, given, f"the weights were trained with {stamped}, says the config.json "
                "beside them",
                f"Use {stamped}",
            )  # fmt: skip


# -- files -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _WeightFile:
    """The tensors of a file and what happens to them.

    Attributes:
        file: the opened file.
        layout: name -> (shape, dtype), without aliases.
        aliases: further name -> name of the same tensor.
        num_layers: layers that the projections belong to.
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
        """Read a tensor, quantised where it is to be."""
        tensor = _read(self.file, name)
        projection = find_projection(name)
        stamp = stamp or self.stamp
        if projection is None or not stamp.quantizes(projection, self.num_layers):
            return tensor
        try:
            return fake_quantize_projection(tensor.contiguous(), projection, stamp)
        except BitcpmError as error:
            raise _file_error(self.file.path, f"{name}: {error}".rstrip("."), "Name another") from (
                error
            )


def _convert_file(
    path: Path, output: Path, settings: _Settings, force: bool, overwrite: bool
) -> dict[str, Any]:
    write = _WRITERS.get(output.suffix)
    if write is None:
        raise CheckpointError.of(
            "output", output, "is no weight file by its name", f"Use {', '.join(_WRITERS)}"
        )
    if Path(os.path.realpath(path)) == output:
        raise CheckpointError.of("output", output, "is the input", "Name another file")
    file = open_tensor_file(path)
    stamped = _find_stamp(path)
    if stamped is not None:
        _check_agrees(stamped, settings)
    weights = _survey(file, stamped or settings.make_stamp())
    warnings: list[str] = []
    if stamped is None:
        _check_trained(weights, force, warnings)
    counts = _ChangedCodes(weights) if stamped is None else None
    report: dict[str, Any] = {
        "input": str(path),
        "output": str(output),
        "quant_type": weights.stamp.quant.grid,
        "group_size": weights.stamp.quant.group_size,
        "numerics": weights.stamp.numerics,
        "stamped": stamped is not None,
        "projections": len(weights.quantized_names()),
        "weights": sum(
            torch.Size(weights.layout[name][0]).numel() for name in weights.quantized_names()
        ),
        "other_tensors": len(file.names()) - len(weights.quantized_names()),
    }
    with new_file(output, overwrite) as scratch:
        start = time.perf_counter()
        with closing(read_ahead(_iter_converted(weights, counts))) as tensors:
            if write is write_bin:
                report["bytes"] = write_bin(scratch, weights.layout, tensors, weights.aliases)
            else:
                names = {**{n: n for n in weights.layout}, **weights.aliases}
                layout = {name: weights.layout[target] for name, target in names.items()}
                extra = ((name, _read(file, name)) for name in weights.aliases)
                report["bytes"] = write_safetensors(scratch, layout, chain(tensors, extra))
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
    content = read_json(config)
    block = content.get(QUANTIZER_KEY) if isinstance(content, dict) else None
    return None if block is None else parse_stamp(block.get("quantizer"), config)


def _file_error(path: Path, rule: str, fix: str) -> CheckpointError:
    error = CheckpointError.of("input_bin", path, rule, fix)
    assert isinstance(error, CheckpointError)
    return error


def _read(file: TensorFile, name: str) -> torch.Tensor:
    """Read a tensor of any type."""
    return file.raw_tensor(name)


def _survey(file: TensorFile, stamp: QuantizerStamp) -> _WeightFile:
    """List the tensors of a file; refuse one that holds no whole layers of latent weights."""
    layout: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    layers: dict[int, set[str]] = {}
    for name in file.names():
        tensor = _read(file, name)
        projection = find_projection(name)
        if projection is not None:
            layers.setdefault(projection.layer, set()).add(projection.name)
            _check_projection(file, name, tensor, stamp)
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if projection is None and tensor.numel() and place in seen:
            aliases[name] = seen[place]
            continue
        seen.setdefault(place, name)
        layout[name] = (tuple(tensor.shape), tensor.dtype)
    wanted = [name for linear in LINEARS for name in linear.hf_names]
    count = max(layers, default=-1) + 1
    missing = [
        f"model.layers.{layer}.{name}.weight"
        for layer in range(count)
        for name in wanted
        if name not in layers.get(layer, ())
    ]
    if not count:
        raise _file_error(
            file.path, "holds no projection such as model.layers.0.self_attn.q_proj.weight",
            "Name the weights of a Llama or MiniCPM",
        )  # fmt: skip
    if missing:
        more = ", ..." if len(missing) > 5 else ""
        raise _file_error(
            file.path, f"lacks {len(missing)} projections: {', '.join(missing[:5])}{more}",
            "Name the whole model; of a sharded one the folder",
        )  # fmt: skip
    return _WeightFile(file, layout, aliases, count, stamp)


def _check_projection(
    file: TensorFile, name: str, tensor: torch.Tensor, stamp: QuantizerStamp
) -> None:
    """Refuse a projection that cannot be quantised, or has been already."""
    projection = find_projection(name)
    assert projection is not None
    if tensor.ndim != 2 or not tensor.dtype.is_floating_point or tensor.element_size() > 4:
        raise _file_error(
            file.path, f"{name} is {tensor.dtype} {list(tensor.shape)}, not a matrix of float32, "
            "bfloat16 or float16",
            "Name latent weights",
        )  # fmt: skip
    try:
        stamp.weights_per_scale(projection, tuple(tensor.shape))
    except BitcpmError as error:
        raise _file_error(file.path, f"{name}: {error}".rstrip("."), "Nothing was written") from (
            error
        )
    if lies_on_grid(tensor):
        raise _file_error(
            file.path, f"{name} lies on a grid already: it was quantised before, and quantising "
            "again changes it",
            "Name the latent weights",
        )  # fmt: skip


def lies_on_grid(w_OI: torch.Tensor) -> bool:
    """Whether a weight looks quantised in groups of 8 or more inputs; judged by its first rows.

    Every grid has at most two magnitudes besides 0, which 8 neighbouring latent weights exceed.

    Args:
        w_OI: weight, [O, I].
    """
    columns = w_OI.shape[1] // _BLOCK * _BLOCK
    blocks = w_OI[:_ROWS, :columns].float().abs().reshape(-1, _BLOCK).sort(-1).values
    steps = (blocks[:, 1:] != blocks[:, :-1]).sum(-1) + (blocks[:, 0] != 0)
    # Blocks that are nearly all zeros say nothing.
    telling = (blocks != 0).sum(-1) > 2
    return bool(telling.any() and (steps[telling] <= 2).all())


def _check_trained(weights: _WeightFile, force: bool, warnings: list[str]) -> None:
    shapes = {name: shape for name, (shape, _) in weights.layout.items()}
    for name in weights.quantized_names():
        _check_finite(weights.file.path, name, _read(weights.file, name))
    figures = measure_latents(
        shapes,
        lambda name: _read(weights.file, name).contiguous(),
        weights.num_layers,
        weights.stamp,
    )
    grid = weights.stamp.quant.grid
    if figures.looks_trained(grid):
        return
    rule = f"holds weights that show no training on the {grid} grid: {figures.describe(grid)}"
    if not force:
        raise _file_error(
            weights.file.path, f"{rule}, and no stamp says otherwise",
            "Quantising destroys such a model; add --force to go on",
        )  # fmt: skip
    warnings.append(f"{weights.file.path} {rule}")


def _check_finite(path: Path, name: str, tensor: torch.Tensor) -> None:
    if tensor.dtype.is_floating_point and not is_finite(tensor):
        row = int((~tensor.isfinite()).nonzero()[0][0]) if tensor.ndim else 0
        raise _file_error(
            path, f"{name} holds a NaN or an infinity, first in row {row}",
            "The training had diverged; use an earlier checkpoint",
        )  # fmt: skip


def _iter_converted(
    weights: _WeightFile, counts: _ChangedCodes | None
) -> Iterator[tuple[str, torch.Tensor]]:
    sizes = {name: count_bytes(*entry) for name, entry in weights.layout.items()}
    quantized = set(weights.quantized_names())
    for name in track_tensors(sizes, "convert"):
        tensor = weights.converted(name)
        _check_finite(weights.file.path, name, tensor)
        if counts is not None and name in quantized:
            counts.add(name, tensor)
        yield name, tensor.contiguous()
        del tensor


def _verify(path: Path, weights: _WeightFile) -> None:
    """Compare the written file with its input, quantised again, byte for byte."""
    found = open_tensor_file(path)
    names = {**{name: name for name in weights.layout}, **weights.aliases}
    assert set(found.names()) == set(names)
    for name in track_tensors({n: count_bytes(*weights.layout[t]) for n, t in names.items()},
                              "verify"):  # fmt: skip
        if not equal_bytes(_read(found, name), weights.converted(name)):
            raise _file_error(
                weights.file.path, f"{name} was not written as it was computed",
                "Try again; check disk and memory",
            )  # fmt: skip


class _ChangedCodes:
    """Counts the codes that the other numerics would make of the same latents.

    Args:
        weights: unstamped latents.
    """

    def __init__(self, weights: _WeightFile) -> None:
        self._weights = weights
        quant, numerics = weights.stamp.quant, weights.stamp.numerics
        self.other = BF16_RECIPROCAL if numerics == FP32 else FP32
        self._stamp = QuantizerStamp(quant, weights.stamp.tp_size, self.other)
        dtypes = {weights.layout[name][1] for name in weights.quantized_names()}
        # The other numerics exist for these only.
        self._exists = quant.grid == "ternary" and torch.float16 not in dtypes
        self._changed = self._total = 0

    def add(self, name: str, wq_OI: torch.Tensor) -> None:
        """Count one projection, given its values in the chosen numerics."""
        if self._exists:
            other_OI = self._weights.converted(name, self._stamp)
            self._changed += int((other_OI.sign() != wq_OI.sign()).sum())
            self._total += wq_OI.numel()

    def report(self) -> Mapping[str, Any]:
        """Return other_numerics, changed_codes and changed_fraction; empty where there is none."""
        if not self._exists:
            return {}
        return {
            "other_numerics": self.other,
            "changed_codes": self._changed,
            "changed_fraction": self._changed / self._total,
        }
