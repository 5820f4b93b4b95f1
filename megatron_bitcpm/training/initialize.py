"""Initial weights that do not depend on the parallel layout.

Megatron draws weights in the order in which a rank builds its modules, so that another pipeline
size is another model. Here every matrix has a random stream of its own, seeded by the run's seed
and the parameter's global name; each rank draws it in full on the host and keeps its shard.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_bitcpm.arch.tensors import EMBEDDING, OUTPUT, find_tensor, layer_prefix


def _named_matrices(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield (global name, parameter) of every matrix of one model chunk."""
    names = {id(module): name for name, module in model.named_modules()}
    layers = {
        names[id(module)] + ".": layer_prefix(module.layer_number - 1)
        for module in model.modules()
        if isinstance(module, TransformerLayer)
    }
    tied = getattr(model, "share_embeddings_and_output_weights", False)
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            continue
        # The last pipeline stage's copy of a tied embedding.
        if tied and name == OUTPUT.name:
            name = EMBEDDING.name
        for local, everywhere in layers.items():
            if name.startswith(local):
                name = everywhere + name.removeprefix(local)
                break
        yield name, parameter


@torch.no_grad()
def initialize_weights_(model: torch.nn.Module, seed: int) -> None:
    """Draw all matrices of a model chunk anew by the run's seed; vectors keep their values."""
    config: Any = model.config
    for name, parameter in _named_matrices(model):
        place = find_tensor(name, "megatron")
        assert place is not None, name
        spec = place.spec
        draw = config.output_layer_init_method if spec.writes_residual else config.init_method
        dim, rank, size = _shard_of(parameter)
        shape = list(parameter.shape)
        shape[dim] *= size
        full = torch.empty(shape, dtype=torch.float32, device="cpu")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_stream_seed(seed, name))
            draw(full)
        # SwiGLU's gate and up matrices are stacked, and each is cut by itself.
        stacked = 1 if spec.interleaved else len(spec.parts)
        mine = [part.chunk(size, dim)[rank] for part in full.chunk(stacked, dim)]
        parameter.copy_(torch.cat(mine, dim))


def _stream_seed(seed: int, name: str) -> int:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:7], "little")


def _shard_of(parameter: Any) -> tuple[int, int, int]:
    """Return (the dimension that is cut, which piece this rank holds, the number of pieces)."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return 0, 0, 1
    return (
        parameter.partition_dim,
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_world_size(),
    )
