"""What a model on disk is, found out from its tensors: architecture, grid, groups, memory.

Unlike `open_source` this works on a folder whose config.json is wrong or absent, on a single file,
and on a pseudo-quantised model without a stamp. Tensors are read one at a time; transformers is not
needed.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_bitcpm.arch.hf_config import (
    CONFIG_FILE,
    find_model_type,
    is_tied,
    parse_architecture,
)
from megatron_bitcpm.arch.model import ModelConfig, shapes_of
from megatron_bitcpm.arch.tensors import EMBEDDING, OUTPUT, Shape, find_tensor, split_layer
from megatron_bitcpm.conversion.codes import count_not_finite
from megatron_bitcpm.conversion.derive_architecture import (
    DerivedArchitecture,
    correct_config,
    count_layers,
    derive_architecture,
    find_contradictions,
    fix_config,
)
from megatron_bitcpm.conversion.difference import compare_shapes, list_first
from megatron_bitcpm.conversion.file_source import FileSource
from megatron_bitcpm.conversion.hf.config import Origin, read_origin
from megatron_bitcpm.conversion.hf.source import open_weights
from megatron_bitcpm.conversion.hf.tensor_files import SUFFIXES, TensorFile, open_tensor_file
from megatron_bitcpm.conversion.infer_grid import is_zero
from megatron_bitcpm.conversion.open import detect_kind, find_model, open_source
from megatron_bitcpm.conversion.projection_totals import ProjectionTotals
from megatron_bitcpm.conversion.source import Kind, ModelSource, TensorSource
from megatron_bitcpm.conversion.tensor_stream import dtype_name
from megatron_bitcpm.data.tokenizer_ids import check_tokenizer_folder
from megatron_bitcpm.errors import CheckpointError
from megatron_bitcpm.files import read_json
from megatron_bitcpm.progress import track_tensors

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of a value by the name of its type; of others it does not matter."""
_PARTS = {
    "embedding": "embedding",
    "projection": "projections",
    "norm": "norms",
    "output": "output",
    "other": "other",
}
"""Role of a tensor -> part of the memory."""


@dataclass
class _Inspected:
    """What is inspected; `config` is the content of config.json."""

    source: TensorSource
    config: dict[str, Any] | None = None
    problems: list[str] = field(default_factory=list)

    def dtype_name(self, name: str) -> str:
        """Name of a type, of unsupported ones too."""
        if isinstance(self.source, FileSource):
            return self.source.files[name].torch_dtype_name(name)
        return dtype_name(self.source.dtype(name))


def inspect(
    path: str | Path, fix_config: bool = False, tokenizer: str | Path | None = None
) -> dict[str, Any]:
    """Find out what a Hugging Face folder, Megatron checkpoint, run, or file of tensors is.

    Args:
        fix_config: correct the fields of config.json that the tensors contradict; the old file is
            kept as config.json.bak.
        tokenizer: as for `open_source`.
    Returns:
        path, kind (hf, torch_dist, legacy, file), form (latent, pseudo, plain by the stamp),
        architecture (keys as in config.json, with head_dim_from), parameters, contradictions
        (field, config, weights), unfixable (why `fix_config` could not correct them, or None),
        fixed (name of the file with the old config.json, or None), stamp,
        folding, facts, projections (tensor -> group sizes found), grids (grid -> tensors, groups,
        weights, zero_fraction, entropy_bits_per_weight, packed_bits_per_weight), latents (figures
        of what is on no grid, or None), memory (part -> parameters, stored_bytes, packed_bytes),
        dtypes (type -> bytes), problems (sentences).

    Raises:
        CheckpointError: no model, no such tokenizer, damaged files, or a config.json that cannot be
            corrected.
    """
    if tokenizer is not None:
        check_tokenizer_folder(tokenizer)
    model = _open(find_model(path), tokenizer)
    source, shapes = model.source, model.source.shapes()
    sizes = {n: math.prod(s) * _BYTES.get(model.dtype_name(n), 1) for n, s in shapes.items()}
    found, tied, dtypes = _read_tensors(model, shapes, sizes)
    return {
        "path": str(source.path),
        "kind": source.kind,
        "form": source.form,
        **_describe_architecture(model, shapes, tied, dtypes, fix_config),
        "stamp": source.quantizer.stamp() if source.quantizer else None,
        "folding": source.folding.model_dump() if source.folding else None,
        "facts": source.facts,
        **found.describe(),
        "memory": _measure_memory(shapes, sizes, found),
        "dtypes": dict(dtypes),
        "problems": model.problems,
    }


def _open(path: Path, tokenizer: str | Path | None) -> _Inspected:
    """Open what there is, tolerating everything that this report is about."""
    if path.is_file() and path.suffix in SUFFIXES:
        file = open_tensor_file(path)
        return _Inspected(_loose(path, "file", dict.fromkeys(file.names(), file), Origin("plain")))
    if path.is_file():
        path = path.parent
    kind = detect_kind(path)
    if kind != "hf":
        return _Inspected(open_source(path, tokenizer))
    files, config = open_weights(path), None
    if (path / CONFIG_FILE).is_file():
        config = read_json(path / CONFIG_FILE)
    source = _loose(path, kind, files, read_origin(path, config or {}))
    problems = [] if config is not None else ["there is no config.json"]
    return _Inspected(source, config, problems)


def _loose(path: Path, kind: Kind, files: dict[str, TensorFile], origin: Origin) -> FileSource:
    layers, _ = count_layers({name: file.shape(name) for name, file in files.items()})
    return FileSource(path=path, kind=kind, files=files, layers=layers, **vars(origin))


def _read_tensors(
    model: _Inspected, shapes: Mapping[str, Shape], sizes: Mapping[str, int]
) -> tuple[ProjectionTotals, bool, Counter[str]]:
    """Read every tensor once; return the projections, whether the output is tied, bytes by type."""
    source, found = model.source, ProjectionTotals(model.source)
    dtypes = Counter[str]()
    for name in track_tensors(sizes, "inspect"):
        dtypes[model.dtype_name(name)] += sizes[name]
        tensor, place = source.tensor(name), find_tensor(name)
        if not tensor.numel():
            model.problems.append(f"{name} is empty")
        elif bad := count_not_finite(tensor):
            model.problems.append(f"{name} holds {bad} NaN or infinite values")
        elif place is not None and place.spec.role == "projection":
            if is_zero(tensor):
                model.problems.append(f"{name} holds only zeros")
            elif tensor.dim() == 2:
                found.add(name, place, tensor)
    model.problems.extend(found.list_problems())
    tied = OUTPUT.hf not in shapes
    if not tied and shapes[OUTPUT.hf] == shapes.get(EMBEDDING.hf):
        tied = torch.equal(source.tensor(OUTPUT.hf), source.tensor(EMBEDDING.hf))
        # Stored twice although tied is what some writers do; then config.json decides.
        with contextlib.suppress(CheckpointError):
            tied = tied and is_tied(model.config or {}, source.path)
    return found, tied, dtypes


def _describe_architecture(
    model: _Inspected, shapes: Mapping[str, Shape], tied: bool, dtypes: Counter[str], fix: bool
) -> dict[str, Any]:
    main = dtypes.most_common(1)[0][0] if dtypes else "float32"
    dtype, source = getattr(torch, main, torch.float32), model.source
    config, path = model.config, source.path / CONFIG_FILE
    kind: str | None = None
    if isinstance(source, ModelSource):  # its arguments, compared with the tensors when opened
        kind, config = source.model.architecture, {"head_dim": source.model.head_dim}
    elif model.config is not None:
        try:
            kind = find_model_type(model.config, path)
        except CheckpointError as error:
            model.problems.append(str(error))
    derived = derive_architecture(shapes, dtype, tied, config)
    result: dict[str, Any] = {
        "architecture": {"model_type": kind},
        "parameters": sum(math.prod(shape) for shape in shapes.values()),
        "contradictions": [],
        "unfixable": None,
        "fixed": None,
    }
    if derived is None:
        model.problems.append("the tensors are not those of a Llama or MiniCPM")
        return result
    result["architecture"] |= {**derived.sizes, "head_dim_from": derived.head_dim_from}
    model.problems.extend(_compare_names(shapes, derived))
    if model.config is None:
        if fix:
            raise CheckpointError(
                f"--fix-config={source.path}: has no config.json to correct. Copy it from the "
                "model's source."
            )
        return result
    result["contradictions"] = find_contradictions(model.config, derived, path)
    try:
        if kind:
            parse_architecture({**model.config, **derived.sizes}, path)
    except CheckpointError as error:
        model.problems.append(str(error))
    if result["contradictions"]:
        result |= _correct(model.config, derived, shapes, path, fix)
    return result


def _correct(
    config: dict[str, Any],
    derived: DerivedArchitecture,
    shapes: Mapping[str, Shape],
    path: Path,
    fix: bool,
) -> dict[str, Any]:
    """Return why a config.json cannot be corrected, or the file that keeps the old one."""
    try:
        new = correct_config(config, derived, shapes, path)
    except CheckpointError as error:
        if fix:
            raise
        return {"unfixable": str(error)}
    return {"fixed": fix_config(path.parent, new).name} if fix else {}


def _compare_names(shapes: Mapping[str, Shape], derived: DerivedArchitecture) -> Iterator[str]:
    """Yield what layers of this architecture have and the tensors lack, and the reverse."""
    sizes, strays = derived.sizes, derived.strays
    by_layer: dict[int | None, list[str]] = {}
    for name in strays:
        by_layer.setdefault(split_layer(name, "hf")[0], []).append(name)
    for layer, held in sorted(by_layer.items(), key=lambda entry: entry[0] or 0):
        yield f"layer {layer} is incomplete, it holds only {list_first(held, 'tensors')}"
    if "head_dim" not in sizes:
        return
    model = ModelConfig(
        num_layers=sizes["num_hidden_layers"],
        hidden_size=sizes["hidden_size"],
        ffn_hidden_size=sizes["intermediate_size"],
        num_attention_heads=sizes["num_attention_heads"],
        num_query_groups=sizes["num_key_value_heads"],
        kv_channels=sizes["head_dim"],
        max_position_embeddings=2,
        share_embeddings_and_output_weights=OUTPUT.hf not in shapes,
    )
    found = {name: shape for name, shape in shapes.items() if name not in strays}
    if misfits := compare_shapes(found, shapes_of(model, sizes["vocab_size"])).describe():
        yield misfits


def _measure_memory(
    shapes: Mapping[str, Shape], sizes: Mapping[str, int], found: ProjectionTotals
) -> dict[str, dict[str, float]]:
    """Return parameters and bytes by part, as stored and with the codes packed."""
    parts = _PARTS.values()
    memory = {part: {"parameters": 0, "stored_bytes": 0, "packed_bytes": 0.0} for part in parts}
    for name, shape in shapes.items():
        place = find_tensor(name)
        role = "other" if place is None else place.spec.role
        part = memory[_PARTS.get(role, "other")]
        part["parameters"] += math.prod(shape)
        part["stored_bytes"] += sizes[name]
        part["packed_bytes"] += found.packed_bytes.get(name, sizes[name])
    return {part: values for part, values in memory.items() if values["parameters"]}
