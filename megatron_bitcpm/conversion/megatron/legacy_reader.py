"""Full tensors out of legacy ``mp_rank_*`` shards, as `pretrain_gpt.py` and MindSpeed write them.

Each tensor rank of each pipeline stage has a pickle of its own with its part of the model, its
arguments, its optimizer and its random states. The pickles are read without running any of their
code (`checkpoint.torch_file`), tensors lie in mapped files, and of the optimizer nothing is read.
Which layers a stage holds is taken from its shards, so that uneven splits need no arguments.
"""

from __future__ import annotations

import itertools
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_bitcpm.arch.tensors import (
    EMBEDDING,
    OUTPUT,
    Dimensions,
    Shape,
    TensorSpec,
    find_tensor,
    layer_prefix,
    name_of,
    split_layer,
)
from megatron_bitcpm.checkpoint.torch_file import StoredTensor, TorchFile, map_file
from megatron_bitcpm.conversion.difference import list_first
from megatron_bitcpm.conversion.megatron.folder import OTHER_MODEL, SHARD_FILE
from megatron_bitcpm.conversion.megatron.source import MegatronTensors, refuse_dtype
from megatron_bitcpm.conversion.megatron.stock_args import StockModel, read_args
from megatron_bitcpm.conversion.tensor_stream import dtype_name, equal_bytes
from megatron_bitcpm.errors import CheckpointError, describe, refusal

_FOLDER = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?(_\d{3,})?")
_IGNORED = ("_extra_state", "rotary_pos_emb.inv_freq")
_LEAST_VERSION = 3.0


class _Shard:
    """One rank's file; `chunks` maps, for each virtual stage, local names to tensors."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / SHARD_FILE
        try:
            self.file = TorchFile(map_file(self.path))
        # A damaged or malicious file raises nearly anything while it is decoded.
        except Exception as error:
            raise refusal(
                self.path,
                f"cannot be read: {describe(error)}",
                "The shard is damaged or not of Megatron; use another checkpoint",
            ) from error
        content = self.file.content
        if not isinstance(content, dict):
            raise refusal(self.path, "does not hold a checkpoint of Megatron")
        self.content = content
        version = content.get("checkpoint_version", 0)
        if not isinstance(version, int | float):
            raise refusal(self.path, "checkpoint_version is not a number")
        if version < _LEAST_VERSION:
            raise refusal(
                self.path,
                f"checkpoint_version {version}, rows of linear_qkv in another order",
                f"Load and save it with a Megatron of version {_LEAST_VERSION} or later first",
            )
        self.iteration = content.get("iteration")
        if not isinstance(self.iteration, int | None):
            raise refusal(self.path, "iteration is not a number")
        virtual = [
            f"model{number}" for number in range(len(content)) if f"model{number}" in content
        ]
        keys = ["model"] if "model" in content else virtual
        if not keys:
            raise refusal(self.path, "does not hold a model")
        self.chunks = [self._read_chunk(content[key]) for key in keys]

    def _read_chunk(self, model: Any) -> dict[str, StoredTensor]:
        if not isinstance(model, dict):
            raise refusal(self.path, "does not hold a model")
        if "language_model" in model:
            raise refusal(
                self.path,
                "holds a model of Megatron before Megatron-Core (language_model)",
                "Convert it to Megatron-Core with Megatron's tools first",
            )
        tensors = {}
        for name, value in model.items():
            if not isinstance(name, str) or name.endswith(_IGNORED):
                continue
            if not isinstance(value, StoredTensor):
                raise refusal(self.path, f"{name} is not a tensor")
            refuse_dtype(value.dtype, name, self.path)
            tensors[name] = value
        return tensors

    def tensor(self, stored: StoredTensor, name: str) -> torch.Tensor:
        try:
            return self.file.tensor(stored)
        except Exception as error:
            rule = f"tensor {name} cannot be read: {describe(error)}"
            raise refusal(self.path, rule) from error


@dataclass(frozen=True)
class _Part:
    """What one tensor rank holds of a tensor."""

    shard: _Shard
    stored: StoredTensor
    name: str

    def read(self) -> torch.Tensor:
        return self.shard.tensor(self.stored, self.name)


def _find_shards(folder: Path) -> list[list[_Shard]]:
    """Open the shards; by pipeline and tensor rank."""
    places: dict[tuple[int, int], Path] = {}
    for path in sorted(folder.glob("mp_rank_*")):
        match = _FOLDER.fullmatch(path.name)
        if match is None:
            raise refusal(
                path, "is not the name of a shard's folder", "Remove it, or restore its name"
            )
        if match[3]:
            raise refusal(path, "is a shard of experts", OTHER_MODEL)
        place = int(match[2] or 0), int(match[1])
        if place in places:
            raise refusal(
                path, f"is of the same rank as {places[place].name}", "Remove the wrong one"
            )
        places[place] = path
    stages, ranks = (1 + max(place[axis] for place in places) for axis in (0, 1))
    one_stage = all("_" not in path.name.removeprefix("mp_rank_") for path in places.values())
    for stage in range(stages):
        for rank in range(ranks):
            name = f"mp_rank_{rank:02d}" + ("" if one_stage else f"_{stage:03d}")
            found = places.get((stage, rank))
            if found is None:
                raise _missing_shard(folder, name, (stage, rank), places)
            if not (found / SHARD_FILE).is_file():
                raise refusal(folder, f"{name}/{SHARD_FILE} is missing", "Restore the shard")
    return [[_Shard(places[stage, rank]) for rank in range(ranks)] for stage in range(stages)]


def _missing_shard(
    folder: Path, name: str, missing: tuple[int, int], places: dict[tuple[int, int], Path]
) -> CheckpointError:
    """Build the error of an absent shard; the others that call for it may be the wrong ones."""
    beyond = [
        [path.name for place, path in places.items() if place[axis] >= missing[axis]]
        for axis in (0, 1)
    ]
    fewest = beyond[0] if len(beyond[0]) < len(beyond[1]) else beyond[1]
    called = list_first(fewest, "shards")
    return refusal(
        folder,
        f"{name}/{SHARD_FILE} is missing, beside {called}",
        f"Restore it, or remove {called} if that is surplus",
    )


class LegacyTensors(MegatronTensors):
    """The model tensors of a folder's legacy shards.

    Raises:
        CheckpointError: a shard is missing, damaged, refused, or unlike the others.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._shards = _find_shards(folder)
        self._tied_copy: list[_Part] = []
        self._dims: Dimensions | None = None
        self._parts = self._collect()
        self._stock = self._read_args()
        self._check_args(self._stock)

    def read_args(self) -> StockModel:
        """Return what the arguments say, alike on all ranks."""
        return self._stock

    def _read_args(self) -> StockModel:
        shards = list(itertools.chain(*self._shards))
        found = [read_args(s.content.get("args"), s.iteration, s.path) for s in shards]
        said = [(stock.model, stock.layout) for stock in found]
        _refuse_unlike(shards, said, "model and layout of the arguments")
        return found[0]

    def _check_args(self, stock: StockModel) -> None:
        """Compare layout, names and shapes with the arguments."""
        found = {"tp": len(self._shards[0]), "pp": len(self._shards)}
        for axis, size in found.items():
            if stock.layout[axis] != size:
                raise refusal(
                    self.folder,
                    f"its folders are those of {axis} {size}, its arguments say "
                    f"{axis} {stock.layout[axis]}",
                    "Restore missing folders, or their names",
                )
        if stock.model.share_embeddings_and_output_weights:
            self._tied_copy = self._parts.pop(OUTPUT.name, [])
        rows = self.check(stock.model)
        self._dims = stock.model.dimensions(rows)
        if stock.padded_vocab_size not in (None, rows):
            rule = f"args.padded_vocab_size is {stock.padded_vocab_size}"
            raise refusal(self.folder, f"{EMBEDDING.name} has {rows} rows, {rule}")

    def dtype(self, spec: TensorSpec, layer: int | None) -> torch.dtype:
        """Type of a tensor."""
        return self._find(spec, layer)[0].stored.dtype

    def tensor(self, spec: TensorSpec, layer: int | None) -> torch.Tensor:
        """Read a full tensor; copies on several ranks must be equal."""
        parts = self._find(spec, layer)
        tensors = [part.read() for part in parts]
        if spec == EMBEDDING:
            for copy, tensor in zip(self._tied_copy, tensors, strict=False):
                if not equal_bytes(copy.read(), tensor):
                    rule = f"{OUTPUT.name} differs from the embedding that it is tied to"
                    raise refusal(copy.shard.path, rule)
        if spec.sharded is None:
            shards, what = [part.shard for part in parts], f"values of {name_of(spec, layer)}"
            _refuse_unlike(shards, tensors, what, alike=equal_bytes)
        assert self._dims is not None
        return spec.join_ranks(tensors, self._dims)

    def shapes(self) -> dict[str, Shape]:
        """Return Megatron's name -> full shape of every tensor, layers numbered."""
        return {name: _full_shape(name, parts) for name, parts in self._parts.items()}

    def _find(self, spec: TensorSpec, layer: int | None) -> list[_Part]:
        name = name_of(spec, layer)
        if name not in self._parts:
            raise refusal(self.folder, f"has no tensor {name}", OTHER_MODEL)
        return self._parts[name]

    def _collect(self) -> dict[str, list[_Part]]:
        """Return full name -> parts by tensor rank, layers with their global numbers."""
        parts: dict[str, list[_Part]] = {}
        next_layer = 0
        shards = list(itertools.chain(*self._shards))
        for what, values in (
            ("iteration", [shard.iteration for shard in shards]),
            ("number of virtual stages", [len(shard.chunks) for shard in shards]),
        ):
            _refuse_unlike(shards, values, what, show=str)
        for chunk in range(len(self._shards[0][0].chunks)):
            for ranks in self._shards:
                _check_same_tensors(ranks, chunk)
                names = ranks[0].chunks[chunk]
                numbers = {layer for layer, _ in map(split_layer, names) if layer is not None}
                layers = sorted(numbers)
                if layers != list(range(len(layers))):
                    rule = f"holds layers {layers}, not the first ones of its stage"
                    raise refusal(ranks[0].path, rule)
                for name in names:
                    full = _full_name(name, next_layer)
                    if full in parts:
                        raise refusal(ranks[0].path, f"{full} is in two stages")
                    parts[full] = [_Part(shard, shard.chunks[chunk][name], name) for shard in ranks]
                next_layer += len(layers)
        return parts


def _full_name(name: str, first_layer: int) -> str:
    """Return the global name of a tensor whose layer is numbered within its stage."""
    (layer, rest), place = split_layer(name), find_tensor(name, "megatron")
    if layer is None:
        return name
    return layer_prefix(first_layer + layer) + (rest if place is None else place.spec.name)


def _full_shape(name: str, parts: list[_Part]) -> Shape:
    shapes, place = [part.stored.shape for part in parts], find_tensor(name, "megatron")
    if place is None or place.spec.sharded is None:
        return shapes[0]
    axis = 1 if place.spec.row_parallel else 0
    if len(shapes[0]) <= axis:
        return shapes[0]
    return (*shapes[0][:axis], sum(shape[axis] for shape in shapes), *shapes[0][axis + 1 :])


def _check_same_tensors(ranks: list[_Shard], chunk: int) -> None:
    """All tensor ranks hold parts of the same tensors, of equal shape and type."""

    def said(stored: StoredTensor | None) -> str:
        return "absent" if stored is None else f"{dtype_name(stored.dtype)} {list(stored.shape)}"

    for name in dict.fromkeys(itertools.chain(*(shard.chunks[chunk] for shard in ranks))):
        values = [said(shard.chunks[chunk].get(name)) for shard in ranks]
        _refuse_unlike(ranks, values, f"{name} is", show=str)


def _refuse_unlike(
    shards: list[_Shard],
    values: Sequence[Any],
    what: str,
    alike: Callable[[Any, Any], bool] = operator.eq,
    show: Callable[[Any], str] | None = None,
) -> None:
    """Refuse shards that do not agree: the odd one, or two where no majority tells which that is.

    `what` names the value of each that should be alike; without `show` the message leaves it out.
    """
    if all(alike(value, values[0]) for value in values[1:]):
        return
    counts = [sum(alike(value, other) for other in values) for value in values]
    most = counts.index(max(counts))
    odd = next(n for n, value in enumerate(values) if not alike(value, values[most]))
    if 2 * counts[most] > len(values):
        rule = (
            f"{what} {show(values[odd])}, on most ranks {show(values[most])}"
            if show
            else (f"{what} are not those of most ranks")
        )
        fix = "The shard is damaged or of another checkpoint; restore it"
        raise refusal(shards[odd].path, rule, fix)
    first, second = sorted((odd, most))
    names = [f"{shards[n].path.parent.name}/{SHARD_FILE}" for n in (first, second)]
    rule = f"{what} differ in {names[0]} and {names[1]}"
    if show:
        rule = f"{what} {show(values[first])} in {names[0]}, {show(values[second])} in {names[1]}"
    fix = "One of them is damaged or of another checkpoint; restore it"
    raise refusal(shards[odd].path.parent.parent, rule, fix)
