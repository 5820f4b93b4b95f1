"""The proof that a model is what it says, and that two models are the same.

Two questions. Is a model sound by itself: its tensors have the shapes of its architecture and are
finite, every group of a quantised one is on its grid, the list of quantised tensors is the one that
its quantiser makes, ids of the tokenizer fit. And, with a second model, is it *that* model: same
architecture and quantiser; codes and scales of the values that the forward multiplies with are
equal, latents, norms and embeddings are equal bit for bit. Any two of Megatron checkpoint and
Hugging Face folder, in any form, compare; rows that only pad the vocabulary do not count.

Tensors are read one at a time. `codes` says what codes and scales are.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_bitcpm.conversion.codes import (
    CodeCount,
    count_not_finite,
    describe_group,
    read_codes,
)
from megatron_bitcpm.conversion.comparison import (
    Comparison,
    compare_architectures,
    fold_alike,
    share_quantizer,
)
from megatron_bitcpm.conversion.difference import KINDS, list_first, markdown_table
from megatron_bitcpm.conversion.hf.config import QUANTIZER_FILE
from megatron_bitcpm.conversion.hf.modeling.writer import MODELING_FILE, trusted_modeling_files
from megatron_bitcpm.conversion.hf.source import HfSource
from megatron_bitcpm.conversion.open import open_source
from megatron_bitcpm.conversion.source import ModelSource
from megatron_bitcpm.conversion.tensor_stream import count_bytes, dtype_name
from megatron_bitcpm.data.tokenizer_ids import has_vocabulary, read_tokenizer_ids
from megatron_bitcpm.errors import BitcpmError, CheckpointError, one_line
from megatron_bitcpm.files import read_json
from megatron_bitcpm.progress import track_tensors

_SHOWN = 3
"""Unsound tensors that the line names."""


@dataclass
class Report:
    """What a check of the model at `path` found: the counts, see `verify`, and what is wrong."""

    content: dict[str, Any]
    path: Path
    problems: list[str] = field(default_factory=list)

    def proof(self) -> dict[str, Any]:
        """Return the content; raise a CheckpointError of one line where there are problems."""
        if self.problems:
            wanted = self.content["checkpoint"]
            fix = "Convert the model again"
            if self.content.get("notes"):
                # Of an unstamped model nothing says which of both is the original.
                fix = "Name the model it was made from, or that was made from it"
                fix += "; convert a damaged one again"
            elif wanted is not None:
                fix += ", or name the one it was made from"
            raise CheckpointError(f"model={self.path}: {'; '.join(self.problems)}. {fix}.")
        return self.content

    def render(self) -> str:
        """Return the counts by layer as a Markdown table, '' where nothing was compared."""
        rows = self.content.get("layers")
        if not rows:
            return ""
        return markdown_table(
            ("layer", "tensors", *(f"differing {kind}" for kind in KINDS)),
            (
                ("outside" if layer is None else layer, *counts)
                for layer, *counts in (row.values() for row in rows)
            ),
        )


def verify(
    model: str | Path, other: str | Path | None = None, tokenizer: str | Path | None = None
) -> dict[str, Any]:
    """Prove that a model is sound and, with a second one, that both are the same.

    Args:
        model: Hugging Face folder or Megatron checkpoint.
        other: the model it must equal, of any format and form; None checks `model` by itself.
        tokenizer: tokenizer folder, for checkpoints that do not say how many ids they have and for
            folders without a tokenizer.
    Returns:
        folder, kind, form, architecture; checked_tokenizer: folder of the tokenizer whose ids fit,
        None where there was none to check; counts over the tensors on the grid (ternary_tensors,
        groups, weights) and other_parameters, group_sizes, zero_fraction, entropy_bits_per_weight
        (of the codes), packed_bits_per_weight (codes and float32 scales); grid and numerics;
        activation: what entered the quantised linears in training, "none" or "int8_per_token";
        checkpoint: path of `other`, or None. With `other` also its checkpoint_kind and
        checkpoint_form, iteration, folded_for_comparison, compared_tensors, differing_codes,
        differing_scales and differing_values, all 0, and layers: the same by layer; notes: what
        was assumed of a model without a stamp, to compare it with one that has one.

    Raises:
        CheckpointError: anything is not so; names the tensors.
    """
    found = open_source(model, tokenizer)
    wanted = None if other is None else open_source(other, tokenizer)
    return compare(found, wanted, tokenizer).proof()


def verify_written(written: Path, source: ModelSource, output: Path) -> dict[str, Any]:
    """Compare a model just written with its source, before it gets the name `output`.

    Raises:
        CheckpointError: they differ, or the source is unsound; names the one to blame.
    """
    try:
        report = compare(open_source(written), source)
        report.problems += report.content["notes"]  # a stamp was lost, or came from nowhere
        content = report.proof() | {"folder": str(output)}
    except CheckpointError as error:
        # What is wrong with the copy may be wrong with the original.
        compare(source, source).proof()
        raise CheckpointError(
            f"output={output}: is not what was to be written: {str(error).rstrip('.')}. Convert "
            "again, to another disk if need be."
        ) from error
    if checked := content["checked_tokenizer"]:
        # It lies in the hidden folder that becomes `output`.
        inside = Path(checked).relative_to(output.parent).parts[1:]
        content["checked_tokenizer"] = str(output.joinpath(*inside))
    return content


def compare(
    found: ModelSource, wanted: ModelSource | None = None, tokenizer: str | Path | None = None
) -> Report:
    """Check a model, and compare it with another one, without raising on differences.

    `tokenizer` is a folder whose ids must fit, beside that of `found`. The report is complete also
    where there are problems; only when the architectures differ are tensors not compared.

    Raises:
        CheckpointError: files are damaged or absent.
    """
    report = Report(_describe(found, wanted), found.path)
    report.problems += _check_list(found) + _check_code(found) + _check_types(found)
    if wanted is not None and wanted is not found:
        report.problems += [f"{wanted.path}: {problem}" for problem in _check_list(wanted)]
    report.content["checked_tokenizer"] = _check_tokenizer(found, tokenizer)
    if wanted is not None:
        originals = found, wanted
        sides = fold_alike(found, wanted)
        report.content["folded_for_comparison"] = sides != originals
        found, wanted = sides
        if problems := compare_architectures(found, wanted):
            report.problems += [f"not the model of {wanted.path}: {'; '.join(problems)}"]
            return report
        *shared, note = share_quantizer(*originals)
        if note is not None:
            report.content["notes"] = [note]
            found, wanted = fold_alike(*shared)
    count = _Count(found)
    comparison = None if wanted is None else Comparison(found, wanted)
    sizes = {name: count_bytes(shape, found.dtype(name)) for name, shape in count.shapes.items()}
    odd = []
    for name in track_tensors(sizes, "verify"):
        value = found.forward_tensor(name)
        if problem := count.add(name, value):
            odd.append(problem)
        if comparison is not None:
            comparison.add(name, value)
    report.problems += odd[:_SHOWN]
    if len(odd) > _SHOWN:
        report.problems.append(f"{len(odd) - _SHOWN} more tensors like these")
    report.content |= count.content()
    if comparison is not None:
        report.content |= comparison.content()
        if problems := comparison.problems():
            problems += report.content["notes"]
            report.problems.append(f"not the model of {comparison.path}: {'; '.join(problems)}")
    return report


class _Count:
    """Totals over the tensors of a model, which are checked on the way."""

    def __init__(self, source: ModelSource) -> None:
        self.source = source
        self.shapes = source.shapes()
        self.groups = source.quantized_tensors()
        self.codes = None if source.quantizer is None else CodeCount(source.quantizer.grid)
        self.other = 0

    def add(self, name: str, value: torch.Tensor) -> str | None:
        """Count a tensor of the forward; return what is wrong with it."""
        shape = self.shapes[name]
        if tuple(value.shape) != shape:
            return f"{name} has shape {list(value.shape)}, the architecture calls for {list(shape)}"
        if name not in self.groups:
            self.other += value.numel()
        if bad := count_not_finite(value):
            return f"{name} holds {bad} NaN or infinite values"
        if name in self.groups and self.codes is not None:
            return self._add_codes(name, value, self.codes)
        return None

    def _add_codes(self, name: str, value: torch.Tensor, total: CodeCount) -> str | None:
        size, quantizer = self.groups[name], self.source.quantizer
        assert quantizer is not None
        if self.source.form == "latent":  # its quantiser knows the codes
            codes_OI, _ = self.source.codes_scales(name)
            count = CodeCount(total.grid, 1, value.numel() // size, value.numel())
            count.add_codes(codes_OI.numpy())
            total.add(count)
            return None
        folded = self.source.folding is not None
        count, odd = read_codes(value, size, total.grid, quantizer.config.eps, folded)
        total.add(count)
        if odd is None:
            return None
        return f"{name} is not on the {total.grid.name} grid: {describe_group(value, size, odd)}"

    def content(self) -> dict[str, Any]:
        """Return the totals for the report."""
        codes = self.codes
        found: dict[str, Any] = {
            "ternary_tensors": codes.tensors if codes else 0,
            "group_sizes": sorted(set(self.groups.values())),
            "groups": codes.groups if codes else 0,
            "weights": codes.weights if codes else 0,
            "other_parameters": self.other,
        }
        return found | (codes.describe() if codes and codes.weights else {})


def _describe(found: ModelSource, wanted: ModelSource | None) -> dict[str, Any]:
    quantizer = found.quantizer
    content: dict[str, Any] = {
        "folder": str(found.path),
        "kind": found.kind,
        "form": found.form,
        "architecture": found.model.architecture,
        "grid": None if quantizer is None else quantizer.grid.name,
        "numerics": None if quantizer is None else quantizer.numerics,
        "activation": "none" if quantizer is None else quantizer.config.activation,
        "checkpoint": None,
    }
    if wanted is not None:
        content |= {
            "checkpoint": str(wanted.path),
            "checkpoint_kind": wanted.kind,
            "checkpoint_form": wanted.form,
            "iteration": wanted.facts.get("iteration"),
            "notes": [],
        }
    return content


# -- a model by itself -----------------------------------------------------------------------------


def _check_list(source: ModelSource) -> list[str]:
    """Compare the list of a pseudo-quantised folder with what its quantiser makes."""
    path = source.path / QUANTIZER_FILE
    try:
        made = source.quantized_tensors()
    except BitcpmError as error:
        raise CheckpointError(
            f"quantizer={source.path}: does not fit the model: {one_line(error)}. Use the "
            "files that belong to the weights."
        ) from error
    if source.kind != "hf" or not path.is_file():
        return []
    listed = read_json(path).get("ternary_tensors")
    if not isinstance(listed, dict):
        return [f"{QUANTIZER_FILE} lists no quantised tensors"]
    if listed == made:
        return []
    odd = [name for name in sorted({*listed, *made}) if listed.get(name) != made.get(name)]
    return [
        f"{QUANTIZER_FILE} lists other tensors or groups than its quantizer makes: "
        f"{list_first(odd, 'tensors')}"
    ]


def _check_code(source: ModelSource) -> list[str]:
    """A latent folder is the model that its modelling file computes."""
    if not isinstance(source, HfSource) or source.form != "latent":
        return []
    if trusted_modeling_files(source.path):
        return []
    return [f"its {MODELING_FILE}, which computes the forward, is not that of this package"]


def _check_types(source: ModelSource) -> list[str]:
    """Values on the grid must have the declared type: another one would round them in loading."""
    if not isinstance(source, HfSource):
        return []
    declared = source.declared_dtype
    if declared is None:
        return []
    names = source.quantized_tensors() or list(source.shapes())[:1]
    odd = [name for name in names if source.dtype(name) != declared]
    if not odd:
        return []
    found, said = dtype_name(source.dtype(odd[0])), dtype_name(declared)
    return [f"{list_first(odd, 'tensors')}: stored as {found}, config.json says {said}"]


def _check_tokenizer(source: ModelSource, named: str | Path | None) -> str | None:
    """Refuse ids that the model lacks, of its tokenizer or a named one; return the folder."""
    own = source.side_files if has_vocabulary(source.side_files) else None
    checked = None
    for folder in (own, named):
        if folder is None:
            continue
        checked = str(folder)
        ids = read_tokenizer_ids(folder)
        if ids.size > source.vocab_size:
            fix = "Put the tokenizer of the model in its place" if folder is own else "Name another"
            raise CheckpointError(
                f"tokenizer={folder}: has {ids.size} ids, the model of {source.path} "
                f"{source.vocab_size}. {fix}."
            )
    return checked
