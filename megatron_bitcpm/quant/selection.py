"""Which linears are ternary: filters by name and by global layer number.

One rule for training and for exports, so that both always mean the same layers.
"""

from __future__ import annotations

import fnmatch

from megatron_bitcpm.config import QuantConfig


def is_excluded(name: str, layer: int, num_layers: int, quant: QuantConfig) -> bool:
    """Whether a linear stays in full precision by configuration.

    Args:
        name: global name, for example ``decoder.layers.3.mlp.linear_fc2``.
        layer: global layer number, from 0, whatever the pipeline stage.
        num_layers: layers of the whole model.
        quant: the quantiser's configuration.
    """
    at_the_edge = (
        layer < quant.full_precision_first_layers
        or layer >= num_layers - quant.full_precision_last_layers
    )
    return at_the_edge or any(fnmatch.fnmatchcase(name, pattern) for pattern in quant.exclude)
