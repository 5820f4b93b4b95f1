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

from megatron_bitcpm.config import ModelConfig
from megatron_bitcpm.conversion.derive_architecture import (
    DerivedArchitecture,
    correct_config,
    count_layers,
    derive_architecture,
    describe_misfit,
    find_contradictions,
    fix_config,
)
from megatron_bitcpm.conversion.difference import list_first
from megatron_bitcpm.conversion.grid_reading import count_not_finite
from megatron_bitcpm.conversion.hf.config import (
    CONFIG_FILE,
    find_model_type,
    is_tied,
    parse_architecture,
    read_stamp,
)
from megatron_bitcpm.conversion.hf.source import open_weights
from megatron_bitcpm.conversion.hf.tensor_files import TensorFile, open_tensor_file
from megatron_bitcpm.conversion.infer_grid import is_zero
from megatron_bitcpm.conversion.names import (
    HF_EMBEDDING,
    HF_OUTPUT,
    find_projection,
    hf_shapes,
)
from megatron_bitcpm.conversion.open import detect_kind, open_source
from megatron_bitcpm.conversion.progress import track_tensors
from megatron_bitcpm.conversion.projection_totals import ProjectionTotals
from megatron_bitcpm.conversion.source import Folding, ModelSource
from megatron_bitcpm.conversion.stamp import QuantizerStamp
from megatron_bitcpm.data.tokenizer_ids import check_tokenizer_folder
from megatron_bitcpm.errors import CheckpointError
from megatron_bitcpm.files import read_json

_TORCH_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
PARTS = ("embedding", "projections", "norms", "output", "other")


@dataclass
class _Model:
    """What is being inspected.

    Attributes:
        path, kind, form: see `inspect`.
        files: tensor -> its file, of Hugging Face models and single files.
        source: of Megatron checkpoints.
        config: content of config.json, None where there is none.
        stamp, folding, facts: of the files.
        problems: what is wrong with the files.
    """

    path: Path
    kind: str
    form: str = "plain"
    files: Mapping[str, TensorFile] = field(default_factory=dict)
    source: ModelSource | None = None
    config: dict[str, Any] | None = None
    stamp: QuantizerStamp | None = None
    folding: Folding | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        if self.source is not None:
            return self.source.shapes()
        return {name: file.shape(name) for name, file in self.files.items()}

    def dtype_name(self, name: str) -> str:
        if self.source is not None:
            return str(self.source.dtype(name)).removeprefix("torch.")
        written = self.files[name].dtype_name(name)
        return _TORCH_NAMES.get(written, written)

    def tensor(self, name: str) -> torch.Tensor:
        return (self.source or self.files[name]).tensor(name)


def inspect(
    path: str | Path, fix_config: bool = False, tokenizer: str | Path | None = None
) -> dict[str, Any]:
    """Find out what a model is.

    Args:
        path: a Hugging Face folder, a Megatron checkpoint, a run, or a single file of tensors.
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
    model = _open(Path(path), tokenizer)
    shapes = model.shapes()
    found, tied, dtypes = _read_tensors(model, shapes)
    report: dict[str, Any] = {
        "path": str(model.path),
        "kind": model.kind,
        "form": model.form,
        **_describe_architecture(model, shapes, tied, dtypes, fix_config),
        "stamp": model.stamp.content() if model.stamp else None,
        "folding": vars(model.folding) if model.folding else None,
        "facts": model.facts,
        **found.describe(),
        "memory": _measure_memory(model, shapes, found),
        "dtypes": dict(dtypes),
    }
    return {**report, "problems": model.problems}


def _open(path: Path, tokenizer: str | Path | None) -> _Model:
    """Open what there is, tolerating everything that this report is about."""
    if path.is_file() and path.suffix in (".safetensors", ".bin", ".pt", ".pth"):
        file = open_tensor_file(path)
        return _Model(path, "file", files=dict.fromkeys(file.names(), file))
    if path.is_file():
        path = path.parent
    kind = detect_kind(path)
    if kind != "hf":
        source = open_source(path, tokenizer)
        return _Model(
            source.path,
            kind,
            source.form,
            source=source,
            stamp=source.stamp,
            folding=source.folding,
            facts=source.facts,
        )
    model = _Model(path, kind, files=open_weights(path))
    if (path / CONFIG_FILE).is_file():
        model.config = read_json(path / CONFIG_FILE)
    else:
        model.problems.append("there is no config.json")
    model.form, model.stamp, model.folding, model.facts = read_stamp(path, model.config or {})
    return model


def _read_tensors(
    model: _Model, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[ProjectionTotals, bool, Counter[str]]:
    """Read every tensor once; return the projections, whether the output is tied, bytes by type."""
    found = ProjectionTotals(model.stamp, model.form, model.folding is not None)
    dtypes = Counter[str]()
    sizes = {n: math.prod(s) * _bytes_of(model.dtype_name(n)) for n, s in shapes.items()}
    num_layers, _ = count_layers(shapes)
    for name in track_tensors(sizes, "inspect"):
        dtypes[model.dtype_name(name)] += sizes[name]
        tensor = model.tensor(name)
        if not tensor.numel():
            model.problems.append(f"{name} is empty")
            continue
        bad = count_not_finite(tensor)
        if bad:
            model.problems.append(f"{name} holds {bad} NaN or infinite values")
            continue
        projection = find_projection(name)
        if projection is not None and is_zero(tensor):
            model.problems.append(f"{name} holds only zeros")
        elif projection is not None and tensor.dim() == 2:
            found.add(name, projection, tensor, num_layers)
    model.problems.extend(found.list_problems())
    tied = HF_OUTPUT not in shapes
    if not tied and shapes[HF_OUTPUT] == shapes.get(HF_EMBEDDING):
        tied = torch.equal(model.tensor(HF_OUTPUT), model.tensor(HF_EMBEDDING))
        # Stored twice although tied is what some writers do; then config.json decides.
        with contextlib.suppress(CheckpointError):
            tied = tied and is_tied(model.config or {}, model.path)
    return found, tied, dtypes


def _bytes_of(dtype_name: str) -> int:
    """Return the bytes of a value by the name of its type; only weights' types matter."""
    return {"float32": 4, "bfloat16": 2, "float16": 2}.get(dtype_name, 1)


def _describe_architecture(
    model: _Model,
    shapes: Mapping[str, tuple[int, ...]],
    tied: bool,
    dtypes: Counter[str],
    fix: bool,
) -> dict[str, Any]:
    main = dtypes.most_common(1)[0][0] if dtypes else "float32"
    dtype = getattr(torch, main, torch.float32)
    config = model.config
    if model.source is not None:  # its arguments, compared with the tensors when it was opened
        config = {"head_dim": model.source.model.head_dim}
    derived = derive_architecture(shapes, dtype, tied, config)
    kind: str | None = None
    if model.source is not None:
        kind = model.source.model.architecture
    elif model.config is not None:
        try:
            kind = find_model_type(model.config, model.path / CONFIG_FILE)
        except CheckpointError as error:
            model.problems.append(str(error))
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
                f"--fix-config={model.path}: has no config.json to correct. Copy it from the "
                "model's source."
            )
        return result
    path = model.path / CONFIG_FILE
    result["contradictions"] = find_contradictions(model.config, derived, path)
    try:
        if kind:
            parse_architecture({**model.config, **derived.sizes}, path)
    except CheckpointError as error:
        model.problems.append(str(error))
    if result["contradictions"]:
        try:
            new = correct_config(model.config, derived, shapes, path)
        except CheckpointError as error:
            if fix:
                raise
            result["unfixable"] = str(error)
            return result
        if fix:
            result["fixed"] = fix_config(model.path, new).name
    return result


def _compare_names(
    shapes: Mapping[str, tuple[int, ...]], derived: DerivedArchitecture
) -> Iterator[str]:
    """Yield what layers of this architecture have and the tensors lack, and the reverse."""
    sizes, strays = derived.sizes, derived.strays
    for layer in sorted({name.split(".")[2] for name in strays}, key=int):
        held = [name for name in strays if name.split(".")[2] == layer]
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
        share_embeddings_and_output_weights=HF_OUTPUT not in shapes,
    )
    wanted = hf_shapes(model, sizes["vocab_size"])
    for names, word in (
        (wanted.keys() - shapes.keys(), "missing"),
        (shapes.keys() - wanted.keys() - set(strays), "unknown"),
    ):
        if names:
            listed = ", ".join(sorted(names)[:5])
            yield f"{len(names)} {word} tensors: {listed}{', ...' if len(names) > 5 else ''}"
    odd = sorted(n for n in wanted.keys() & shapes.keys() if wanted[n] != shapes[n])
    if odd:
        yield (
            f"{len(odd)} tensors are not shaped like the others, first "
            f"{describe_misfit(odd[0], shapes, wanted)}"
        )


def _measure_memory(
    model: _Model, shapes: Mapping[str, tuple[int, ...]], found: ProjectionTotals
) -> dict[str, dict[str, float]]:
    """Return parameters and bytes by part, as stored and with the codes packed."""
    memory = {part: {"parameters": 0, "stored_bytes": 0, "packed_bytes": 0.0} for part in PARTS}
    for name, shape in shapes.items():
        part = memory[_part_of(name)]
        stored = math.prod(shape) * _bytes_of(model.dtype_name(name))
        part["parameters"] += math.prod(shape)
        part["stored_bytes"] += stored
        part["packed_bytes"] += found.packed_bytes.get(name, stored)
    return {part: values for part, values in memory.items() if values["parameters"]}


def _part_of(name: str) -> str:
    if find_projection(name) is not None:
        return "projections"
    if name in (HF_EMBEDDING, HF_OUTPUT):
        return "embedding" if name == HF_EMBEDDING else "output"
    return "norms" if name.endswith("norm.weight") else "other"
