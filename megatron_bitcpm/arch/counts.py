"""Counting on the map: parameters, linears that become ternary, FLOPs of a training step.

FLOPs are what the mathematics needs, not what the machine did. A product of an m x k and a k x n
matrix is 2 m k n. With W the weights of the layers' projections and the output layer, q the rows of
the queries, L layers and s the sequence length, the forward pass takes per token

    2 W + L 4 q s / 2          products with weights; scores and their product with the values

and training three times that: forward, gradients of inputs, gradients of weights. Attention is
causal, so half of the square of scores is counted, as by Megatron-LM of core 0.12.1 and 0.16.1 (it
counted all of it in core 0.10). Recomputation is not counted, nor are embedding look-ups, norms,
rotary embeddings, softmax, the quantiser and the optimizer. Ternary linears count like any other:
their products run in the model's floating-point type.

As a program it prints the parameter counts of configurations:

    python -m megatron_bitcpm.arch.counts launch/configs/bitcpm-*.yaml
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml

from megatron_bitcpm.arch.model import ModelConfig, iter_tensors, shapes_of
from megatron_bitcpm.arch.tensors import count_values, name_of


def count_parameters(model: ModelConfig, vocab_size: int) -> int:
    """Return the parameters of the whole model; the tokenizer's size counts without padding."""
    return count_values(shapes_of(model, vocab_size))


def count_ternary_linears(
    model: ModelConfig,
    is_excluded: Callable[[str, int, int], bool],
    layers: Sequence[int] | None = None,
) -> int:
    """Return how many linears `ternarize_` must swap in these layers, by default all.

    `is_excluded` is `QuantConfig.excludes`.
    """
    return sum(
        not is_excluded(name_of(spec, layer).removesuffix(".weight"), layer, model.num_layers)
        for spec, layer in iter_tensors(model, layers)
        if layer is not None and spec.role == "projection"
    )


def training_flops_per_token(model: ModelConfig, padded_vocab_size: int, seq_length: int) -> float:
    """Return the floating-point operations of forward and backward, per token."""
    dims = model.dimensions(padded_vocab_size)
    # A tied output layer is a product too; the embedding is a look-up.
    weights = dims.vocab * dims.hidden + sum(
        math.prod(spec.shape(dims)) for spec, _ in iter_tensors(model) if spec.role == "projection"
    )
    attention = model.num_layers * 4 * dims.queries * seq_length / 2
    return 3 * (2 * weights + attention)


def tflops_per_device(flops_per_token: float, tokens_per_s: float, world_size: int) -> float:
    """Return the achieved model TFLOP/s of one device; `tokens_per_s` is the whole run's."""
    return flops_per_token * tokens_per_s / world_size / 1e12


def main(arguments: list[str] | None = None) -> None:
    """Print one line for each configuration named on the command line."""
    parser = argparse.ArgumentParser(description="Parameter counts, without vocabulary padding.")
    parser.add_argument("configs", nargs="+", type=Path, help="YAML files of runs")
    # The default is that of the released models' tokenizer.
    parser.add_argument("--vocab-size", type=int, default=73448)
    options = parser.parse_args(arguments)
    for path in options.configs:
        section = yaml.safe_load(path.read_text(encoding="utf-8"))["model"]
        section.pop("rope_scaling", None)  # has no parameters, and may name a file
        count = count_parameters(ModelConfig.model_validate(section), options.vocab_size)
        print(f"{path.stem:<16}{count:>16,}")


if __name__ == "__main__":
    main()
