"""Small models and batches for the tests of `models`, with weights that their names decide."""

from __future__ import annotations

import zlib

import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_layer import TransformerLayer

from helpers.tiny_models import model_parallel  # noqa: F401  prepares the platform

VOCAB = 96
SHORT = (1.0, 1.1, 1.3, 1.7, 2.0, 2.5, 3.0, 4.0)
LONG = (1.0, 1.5, 2.5, 4.0, 6.0, 9.0, 14.0, 20.0)
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": SHORT,
    "long_factor": LONG,
    "original_max_position_embeddings": 16,
}


def global_name(model: torch.nn.Module, name: str) -> str:
    """The parameter's name in the whole model; a tied output layer has the embedding's."""
    if name == "output_layer.weight" and model.share_embeddings_and_output_weights:
        return "embedding.word_embeddings.weight"
    for prefix, module in model.named_modules():
        if isinstance(module, TransformerLayer) and name.startswith(f"{prefix}."):
            local = name.removeprefix(f"{prefix}.")
            return f"decoder.layers.{module.layer_number - 1}.{local}"
    return name


def shard(full: torch.Tensor, name: str, parameter: torch.nn.Parameter, rank: int, size: int):
    """This tensor rank's part of a full matrix."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return full
    stacked = 2 if name.endswith("linear_fc1.weight") else 1  # gate and up
    parts = (part.chunk(size, parameter.partition_dim)[rank] for part in full.chunk(stacked))
    return torch.cat(list(parts))


@torch.no_grad()
def fill_by_name_(model: torch.nn.Module) -> None:
    """Values that do not depend on the layout; norms are not all ones, logits not all equal."""
    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    for local, parameter in model.named_parameters():
        name = global_name(model, local)
        shape = list(parameter.shape)
        if getattr(parameter, "tensor_model_parallel", False):
            shape[parameter.partition_dim] *= size
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        full = torch.randn(shape, generator=generator)
        full = 1 + 0.2 * full if len(shape) == 1 else full / shape[1] ** 0.5
        parameter.copy_(shard(full, name, parameter, rank, size))


def batch(lengths: list[list[int]], vocab: int = VOCAB, seed: int = 0) -> dict[str, torch.Tensor]:
    """Sequences made of documents of the given lengths; positions start anew at each."""
    seq = sum(lengths[0])
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocab, (len(lengths), seq + 1), generator=generator)
    numbers = torch.stack(
        [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in lengths]
    )
    starts = torch.stack(
        [
            (torch.tensor(row).cumsum(0) - torch.tensor(row)).repeat_interleave(torch.tensor(row))
            for row in lengths
        ]
    )
    return {
        "tokens": tokens[:, :-1],
        "labels": tokens[:, 1:],
        "position_ids": torch.arange(seq) - starts,
        "document_start": starts,
        "documents": numbers,
    }
