"""Distributed pretraining of ternary (1.58-bit) language models with Megatron.

Importing this package patches nothing and loads neither Megatron nor an accelerator's libraries.

    megatron_bitcpm.load_config(path)            -> validated configuration
    megatron_bitcpm.ternarize_(model, config)    -> swaps the linears of a built Megatron model
    megatron_bitcpm.ops.fake_quantize(weight)    -> the operator
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from megatron_bitcpm.version import __version__

if TYPE_CHECKING:
    from megatron_bitcpm.config import load_config
    from megatron_bitcpm.parallel.convert import ternarize_

__all__ = ["__version__", "load_config", "ternarize_"]

_LAZY = {
    "load_config": "megatron_bitcpm.config",
    "ternarize_": "megatron_bitcpm.parallel.convert",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name == "ops":
        return importlib.import_module("megatron_bitcpm.ops")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
