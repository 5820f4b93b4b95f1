"""Counting: layers of a rank, linears that become ternary, rows of the embedding, parameters.

Formulas only; nothing here needs Megatron or builds a model. As a program it prints the parameter
counts of configurations:

    python -m megatron_bitcpm.models.size launch/configs/bitcpm-*.yaml
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

import yaml

from megatron_bitcpm.config import ModelConfig, ParallelConfig, QuantConfig
from megatron_bitcpm.quant.selection import is_excluded

LINEARS = (
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)
"""Names of a layer's linears inside it."""

RELEASED_VOCAB_SIZE = 73448
"""Ids of the released models' tokenizer."""


def layers_of_stage(model: ModelConfig, parallel: ParallelConfig, pp_rank: int) -> list[int]:
    """Return the global numbers, from 0, of the layers on one pipeline stage.

    Virtual chunks go round the stages: chunk c of stage r is piece c * stages + r of the model.

    Args:
        model: the architecture.
        parallel: the layout; its pipeline chunks divide the layers.
        pp_rank: the stage.
    """
    stages = parallel.pipeline_model_parallel_size
    per_chunk = layers_per_chunk(model, parallel)
    return [
        layer
        for piece in range(pp_rank, parallel.pipeline_chunks, stages)
        for layer in range(piece * per_chunk, (piece + 1) * per_chunk)
    ]


def layers_per_chunk(model: ModelConfig, parallel: ParallelConfig) -> int:
    """Return the layers in each pipeline chunk."""
    assert model.num_layers % parallel.pipeline_chunks == 0, "checked by the configuration"
    return model.num_layers // parallel.pipeline_chunks


def count_ternary_linears(
    model: ModelConfig, quant: QuantConfig, layers: Iterable[int] | None = None
) -> int:
    """Return how many linears `ternarize_` must swap.

    Args:
        model: the architecture.
        quant: says which stay in full precision.
        layers: global layer numbers to count in, see `layers_of_stage`; None means all.
    """
    return sum(
        not is_excluded(f"decoder.layers.{layer}.{linear}", layer, model.num_layers, quant)
        for layer in (range(model.num_layers) if layers is None else layers)
        for linear in LINEARS
    )


def pad_vocab_size(vocab_size: int, model: ModelConfig) -> int:
    """Return the rows of the embedding; the same for every tensor-parallel size.

    Padded rows take part in the softmax of training, so a padding that grew with tp would make the
    loss depend on the layout.
    """
    multiple = model.make_vocab_size_divisible_by
    return -(-vocab_size // multiple) * multiple


def count_parameters(model: ModelConfig, vocab_size: int) -> int:
    """Return the parameters of the whole model.

    Args:
        model: the architecture.
        vocab_size: rows of the embedding; give the tokenizer's size to count without padding.
    """
    hidden, head_dim = model.hidden_size, model.head_dim
    queries = model.num_attention_heads * head_dim
    keys = model.num_query_groups * head_dim
    attention = hidden * (queries + 2 * keys) + queries * hidden
    mlp = 3 * hidden * model.ffn_hidden_size
    norms = 2 * hidden
    embeddings = 1 if model.share_embeddings_and_output_weights else 2
    return model.num_layers * (attention + mlp + norms) + hidden + embeddings * vocab_size * hidden


def main(arguments: list[str] | None = None) -> None:
    """Print one line for each configuration named on the command line."""
    parser = argparse.ArgumentParser(description="Parameter counts, without vocabulary padding.")
    parser.add_argument("configs", nargs="+", type=Path, help="YAML files of runs")
    parser.add_argument("--vocab-size", type=int, default=RELEASED_VOCAB_SIZE)
    options = parser.parse_args(arguments)
    for path in options.configs:
        section = yaml.safe_load(path.read_text(encoding="utf-8"))["model"]
        section.pop("rope_scaling", None)  # has no parameters, and may name a file
        count = count_parameters(ModelConfig.model_validate(section), options.vocab_size)
        print(f"{path.stem:<16}{count:>16,}")


if __name__ == "__main__":
    main()
