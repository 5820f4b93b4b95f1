"""Two models side by side: architecture, quantiser, and every tensor.

Codes and scales are compared of the values that the forward multiplies with, whatever form a model
is stored in; latents, and all other tensors, bit for bit.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch

from megatron_bitcpm.arch.model import Form, attention_factor
from megatron_bitcpm.conversion.codes import count_differences, count_different_bits
from megatron_bitcpm.conversion.difference import Differences
from megatron_bitcpm.conversion.hf.fold import fold
from megatron_bitcpm.conversion.infer_grid import lies_on_grid
from megatron_bitcpm.conversion.source import ModelSource
from megatron_bitcpm.conversion.tensor_stream import equal_bytes
from megatron_bitcpm.errors import CheckpointError
from megatron_bitcpm.quant.settings import TENSOR, WHOLE_ROW
from megatron_bitcpm.quantizer import Quantizer

_NOT_COMPUTED = frozenset(
    {"init_method_std", "make_vocab_size_divisible_by", "kv_channels", "rope_scaling"}
)
"""Fields of a model that say nothing about its forward, or that are compared by what they mean."""


class Comparison:
    """Compares the tensors of a model with those of the one that it should be."""

    def __init__(self, found: ModelSource, wanted: ModelSource) -> None:
        self.found, self.wanted, self.path = found, wanted, wanted.path
        self.groups = wanted.quantized_tensors() | found.quantized_tensors()
        quantizer = found.quantizer or wanted.quantizer
        self.grid = None if quantizer is None else quantizer.grid
        self.latent = found.form == wanted.form == "latent"
        self.stamps = _compare_quantizers(found, wanted)
        self.differences = Differences()

    def add(self, name: str, value: torch.Tensor) -> None:
        """Compare a tensor; `value` is what the forward of `found` multiplies with."""
        note = functools.partial(self.differences.note, name)
        self.differences.compared.append(name)
        groups = self.groups.get(name)
        if groups is not None and self.latent:
            latents = _count_values(self.found.tensor(name), self.wanted.tensor(name))
            note(values=latents)
            if not latents and not self.stamps:  # then the forward values are the same as well
                return
        mine, other = _alike(value, self.wanted.forward_tensor(name))
        if mine.shape != other.shape or groups is None or self.grid is None:
            note(values=_count_values(mine, other))
        elif not equal_bytes(mine, other):
            codes, scales = count_differences(mine, other, groups, self.grid)
            note(codes=codes, scales=scales)
            if not codes and not scales:  # off the grid; or zeros of another sign, which are equal
                note(values=int((mine != other).sum()))

    def content(self) -> dict[str, Any]:
        """Return the counts for the report."""
        return {
            "compared_tensors": len(self.differences.compared),
            **{f"differing_{kind}": n.total() for kind, n in self.differences.counts.items()},
            "layers": self.differences.by_layer(),
        }

    def problems(self) -> list[str]:
        """Return what is not equal."""
        problems = self.stamps + self.differences.describe()
        if self.differences.counts["codes"] or self.differences.counts["scales"]:
            problems += _try_other_numerics(self.found, self.wanted)
        return problems


def _count_values(a: torch.Tensor, b: torch.Tensor) -> int:
    """Return how many values are not equal bit for bit."""
    a, b = _alike(a, b)
    if a.shape != b.shape:
        return max(a.numel(), b.numel())
    return 0 if equal_bytes(a, b) else count_different_bits(a, b)


def share_quantizer(
    found: ModelSource, wanted: ModelSource
) -> tuple[ModelSource, ModelSource, str | None]:
    """Give the quantiser of a stamped model to an unstamped one of its architecture, to compare.

    Weights that lie on a grid are taken as values of the forward, others as its latents: whatever
    the two are then compared by means something, and equal ones are what the stamp says. The third
    value says what was assumed; None where both have a stamp, or neither.

    Raises:
        CheckpointError: latents that were folded; no quantiser saw these values.
    """
    if (found.quantizer is None) == (wanted.quantizer is None):
        return found, wanted, None
    plain, stamped = (found, wanted) if found.quantizer is None else (wanted, found)
    note = f"{plain.path} carries no quantiser stamp: its "
    form: Form = "latent"
    if _lies_on_grid(plain, stamped):
        form = "pseudo"
        note += f"values, which lie on a grid, were compared with the forward of {stamped.path}"
    elif plain.folding is not None:
        raise CheckpointError(
            f"model={plain.path}: carries no quantiser stamp, and folding has rounded its latents: "
            f"they cannot be quantised for a comparison with {stamped.path}. Name the MiniCPM "
            "before the folding."
        )
    elif stamped.form == "latent":
        note += f"weights were compared with the latents of {stamped.path}"
    else:
        note += f"weights were quantised with the stamp of {stamped.path} for the comparison"
    lent = dataclasses.replace(plain, form=form, quantizer=stamped.quantizer)
    return (lent, wanted, note) if plain is found else (found, lent, note)


def _lies_on_grid(plain: ModelSource, stamped: ModelSource) -> bool:
    """Whether most of what the stamp quantises was quantised already: some may be damaged."""
    assert stamped.quantizer is not None
    eps, folded = stamped.quantizer.config.eps, plain.folding is not None
    names = stamped.quantized_tensors()
    return 2 * sum(lies_on_grid(plain.tensor(name), eps, folded) for name in names) > len(names)


def fold_alike(found: ModelSource, wanted: ModelSource) -> tuple[ModelSource, ModelSource]:
    """Fold the unfolded one of a folded and an unfolded model: folding cannot be undone."""
    if found.folding is not None and _can_fold(wanted):
        return found, fold(wanted)
    if wanted.folding is not None and _can_fold(found):
        return fold(found), wanted
    return found, wanted


def _can_fold(source: ModelSource) -> bool:
    return source.folding is None and source.model.has_constants


def compare_architectures(found: ModelSource, wanted: ModelSource) -> list[str]:
    """Compare what decides the forward of two models."""
    return _list_unlike(_facts_of(found), _facts_of(wanted))


def _list_unlike(a: dict[str, Any], b: dict[str, Any], of: str = "") -> list[str]:
    return [f"{key}{of} is {a[key]}, there {b[key]}" for key in a if a[key] != b[key]]


def _facts_of(source: ModelSource) -> dict[str, Any]:
    model, rope = source.model, source.model.rope_scaling
    return {
        **model.model_dump(mode="json", exclude=set(_NOT_COMPUTED)),
        "head_dim": model.head_dim,
        "vocab_size": source.vocab_size,
        "rope_type": rope and rope.rope_type,
        "rope_short_factor": rope and list(rope.short_factor),
        "rope_long_factor": rope and list(rope.long_factor),
        "rope_original_max_position_embeddings": rope and rope.original_max_position_embeddings,
        "rope_attention_factor": attention_factor(model),
        "folding": source.folding and source.folding.model_dump(),
    }


def _compare_quantizers(found: ModelSource, wanted: ModelSource) -> list[str]:
    """Compare the quantisers by what they do."""
    if found.quantizer is None or wanted.quantizer is None:
        return []  # neither has one, see `share_quantizer`
    mine, others = _quantizer_facts(found.quantizer), _quantizer_facts(wanted.quantizer)
    problems = _list_unlike(mine, others, " of the quantiser")
    if found.quantized_tensors() != wanted.quantized_tensors():
        problems.append("the quantisers make other tensors or groups")
    return problems


def _quantizer_facts(quantizer: Quantizer) -> dict[str, Any]:
    config = quantizer.config
    return {
        "grid": config.grid,
        "eps": config.eps,
        "numerics": quantizer.numerics,
        "activation": config.activation,
        "tensor_model_parallel_size": quantizer.tp_size if _slices_matter(quantizer) else "any",
    }


def _slices_matter(quantizer: Quantizer) -> bool:
    """Whether the values of the forward depend on how many ranks had shared a row."""
    config = quantizer.config
    if config.activation != "none":
        return True
    if config.group_size == WHOLE_ROW and config.scale_sync == "local":
        return True
    return quantizer.grid.statistic == "abs_sum" and config.group_size in (WHOLE_ROW, TENSOR)


def _alike(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two tensors in one type that holds both exactly."""
    return (a, b) if a.dtype == b.dtype else (a.float(), b.float())


def _try_other_numerics(found: ModelSource, wanted: ModelSource) -> list[str]:
    """Say so when the models are equal under another arithmetic of the quantiser."""
    for source, other in ((found, wanted), (wanted, found)):
        if source.quantizer is None or source.form != "latent" or other.form == "latent":
            continue
        changed = source.with_other_numerics()
        if changed is None or changed.quantizer is None:
            continue
        if all(
            _count_values(changed.forward_tensor(name), other.forward_tensor(name)) == 0
            for name in source.quantized_tensors()
        ):
            return [
                f"all codes and scales are equal when {source.path} is quantised with the "
                f"other numerics, {changed.quantizer.numerics}"
            ]
    return []
