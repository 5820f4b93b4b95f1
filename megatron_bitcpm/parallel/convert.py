"""`ternarize_`: give a built Megatron model ternary linears.

The swap changes the class of each linear *instance* to a ternary subclass of whatever class it has,
so that parameters stay where optimizers and checkpoints expect them. Every matrix inside a
transformer layer must be swapped, excluded by the configuration, or a router's, so that none
silently trains in full precision.
"""

from __future__ import annotations

import fnmatch
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.moe.router import Router
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_bitcpm import ops
from megatron_bitcpm.arch.tensors import Dimensions, TensorSpec, all_specs, layer_prefix
from megatron_bitcpm.config import QuantConfig, RunConfig
from megatron_bitcpm.errors import ModelError
from megatron_bitcpm.parallel.agree import first_reason
from megatron_bitcpm.parallel.linear import ternary_class
from megatron_bitcpm.parallel.megatron_api import tensor_parallel_group
from megatron_bitcpm.parallel.requantize.base import Requantizer
from megatron_bitcpm.parallel.requantize.unattached import Unattached
from megatron_bitcpm.parallel.site import TernarySite
from megatron_bitcpm.patching.versions import check_megatron_version
from megatron_bitcpm.quantizer import Quantizer

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class TernaryModel:
    """The ternary linears of this rank, and the names of those that stay in full precision."""

    quantizer: Quantizer
    sites: list[TernarySite]
    excluded: list[str]
    requantizer: Unattached | Requantizer

    def attach_optimizer(self, optimizer: Any) -> None:
        """Follow the optimizer's steps (see `Unattached.attach`); log the report on rank 0."""
        assert isinstance(self.requantizer, Unattached), "one optimizer per model"
        self.requantizer = self.requantizer.attach(optimizer)
        if torch.distributed.get_rank() == 0:
            logger.info(self.report())

    def latents(self) -> AbstractContextManager[None]:
        """See `Requantizer.latents`."""
        return self.requantizer.latents()

    def report(self) -> str:
        """Say what was swapped, what was not, and who computes, in several lines."""
        kinds = Counter(
            (site.name.rsplit(".", 1)[-1], tuple(site.weight.shape), site.row_parallel)
            for site in self.sites
        )
        weights = sum(site.weight.numel() for site in self.sites)
        quant = self.quantizer.config
        lines = [
            f"{len(self.sites)} ternary linears, {weights:,} weights on this rank; "
            f"{quant.grid}, group_size {quant.group_size}, scale_sync {quant.scale_sync}, "
            f"requantize {self.requantizer.mode}"
        ]
        if quant.activation != "none":
            lines[0] += f", activation {quant.activation}"
        for (kind, shape, row_parallel), count in kinds.items():
            way = "row" if row_parallel else "column"
            lines.append(f"  {count:4d} x {kind:<12} {way:<6} {list(shape)}")
        lines += [f"  full precision by configuration: {name}" for name in self.excluded]
        if self.sites:
            device = self.sites[0].weight.device.type
            backend = ops.describe_backend(device, quant.grid, quant.activation)
            lines.append(f"  operators: {backend}")
        return "\n".join(lines)


def ternarize_(
    model: torch.nn.Module | list[torch.nn.Module],
    config: QuantConfig | RunConfig,
    expected: int | None = None,
) -> TernaryModel:
    """Swap the linears of a built Megatron model to ternary ones, in place; collective.

    Embeddings, the output layer, norms, routers and biases are left alone. Call `attach_optimizer`
    of the result once the optimizer exists.

    Args:
        model: a model, or the list of its (virtual) pipeline chunks; wrapped or not.
        config: the quantiser's configuration, or the run's.
        expected: ternary linears that must result on this rank, None for at least one.

    Raises:
        ModelError: on any rank; the model is unchanged then.
    """
    quant = config.quant if isinstance(config, RunConfig) else config
    if not quant.enabled:
        raise ModelError("quant.enabled=False: there is nothing to swap. Do not call ternarize_.")
    check_megatron_version()
    chunks = model if isinstance(model, list) else [model]
    sites: list[TernarySite] = []
    excluded: list[str] = []
    problem = None
    try:
        sites, excluded = _plan(chunks, quant, expected)
    except ModelError as error:
        problem = str(error)
    # Stages hold different layers; what one of them cannot do stops all, or the others would wait.
    if problem := first_reason(problem):
        raise ModelError(problem)
    if sites:
        device = sites[0].weight.device.type
        ops.use_backend(quant.backend, device, quant.grid, quant.activation)
    for site in sites:
        site.module.__class__ = ternary_class(site.module.__class__)
        site.module.ternary = site
    tp_size = parallel_state.get_tensor_model_parallel_world_size()
    requantizer = Unattached(sites, quant.requantize)
    return TernaryModel(Quantizer(quant, tp_size), sites, excluded, requantizer)


def _plan(
    chunks: list[torch.nn.Module], quant: QuantConfig, expected: int | None
) -> tuple[list[TernarySite], list[str]]:
    """Return the sites to make and the names of the linears left out; nothing is changed yet."""
    excluded: list[str] = []
    sites: list[TernarySite] = []
    matrices = [entry for chunk in chunks for entry in _matrices(chunk)]
    if matrices:
        _check_patterns(quant, matrices)
    for name, module, layer, num_layers in matrices:
        if quant.excludes(name, layer, num_layers):
            excluded.append(name)
        else:
            sites.append(_make_site(name, module, quant))
    model = "+".join(type(chunk).__name__ for chunk in chunks)
    if not sites and expected != 0:
        raise ModelError(
            f"model={model}: has no linear to make ternary. Check quant.exclude and the "
            "full-precision layers."
        )
    if expected is not None and len(sites) != expected:
        raise ModelError(
            f"model={model}: {len(sites)} ternary linears, expected {expected}. Check the layer "
            "spec."
        )
    return sites, excluded


def _matrices(chunk: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module, int, int]]:
    """Yield (global name, linear, layer number from 0, number of layers) of every matrix."""
    for layer in (m for m in chunk.modules() if isinstance(m, TransformerLayer)):
        number = layer.layer_number - 1
        for local_name, module in layer.named_modules():
            has_matrix = any(p.ndim >= 2 for p in module.parameters(recurse=False))
            if not has_matrix or isinstance(module, Router):
                continue
            name = layer_prefix(number) + local_name
            if not isinstance(module, ColumnParallelLinear | RowParallelLinear):
                raise ModelError(
                    f"model={name}: {type(module).__name__} cannot be made ternary. Build the "
                    "model from the local layer spec (get_gpt_layer_local_spec)."
                )
            if isinstance(getattr(module, "ternary", None), TernarySite):
                raise ModelError(f"model={name}: is ternary already. Call ternarize_ once.")
            yield name, module, number, layer.config.num_layers


def _check_patterns(
    quant: QuantConfig, matrices: list[tuple[str, torch.nn.Module, int, int]]
) -> None:
    """Refuse a name filter that matches nothing in the whole model."""
    # Other pipeline stages hold layers of the same shape: each local name with each layer number.
    names = {
        name.replace(f".layers.{layer}.", f".layers.{number}.", 1)
        for name, _, layer, num_layers in matrices
        for number in range(num_layers)
    }
    for pattern in quant.exclude:
        if not fnmatch.filter(names, pattern):
            raise ModelError(
                f"quant.exclude={pattern}: matches no linear of the model. Names look like "
                f"{min(names, default='(none)')}."
            )


def _make_site(name: str, module: Any, quant: QuantConfig) -> TernarySite:
    tp_group = tensor_parallel_group(module)
    quantizer = Quantizer(quant, tp_group.size())
    site = TernarySite(name, module, quantizer, tp_group, isinstance(module, RowParallelLinear))
    site.groups = quantizer.groups_of(site.row_parallel, site.in_features_full)
    if quantizer.per_projection:
        site.fused = _find_fused_rows(name, module)
    return site


def _find_fused_rows(name: str, module: Any) -> tuple[TensorSpec, Dimensions]:
    """Return which rows belong to which projection: the linear's row of the map, and the sizes."""
    config, out_features = module.config, module.output_size
    kind = name.rsplit(".", 1)[-1]
    spec = next((spec for spec in all_specs() if spec.module.endswith(f".{kind}")), None)
    if spec is not None and kind == "linear_fc1" and not config.gated_linear_unit:
        spec = replace(spec, parts=spec.parts[:1])
    heads = config.num_attention_heads
    dims = Dimensions(
        hidden=out_features,  # of weights that write to the residual stream
        heads=heads,
        groups=config.num_query_groups or heads,
        head_dim=config.kv_channels,
        ffn=out_features // (len(spec.parts) if spec else 1),  # of experts, their own
    )
    if spec is None or spec.shape(dims)[0] != out_features:
        raise ModelError(
            f"quant.group_size=tensor: cannot tell to which projections the rows of {name} belong "
            f"({type(module).__name__} [{out_features}, {module.input_size}]). Exclude it "
            "(quant.exclude), or use group_size -1."
        )
    return spec, dims
