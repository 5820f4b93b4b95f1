"""The quantisers as torch operators, one contract and a backend per device.

    fake_quantize(w)   -> wq               what a ternary linear multiplies with; straight-through
    quantize(w)        -> codes, scales    what exports store
    abs_sums(w)        -> sums             for scales that span shards: gather, add, then
    scales_from_sums(sums, n) and fake_quantize_with_scales(w, scales)
    fake_quantize_(w), fake_quantize_with_scales_(w, scales)     the same in place
    foreach_fake_quantize_(ws), foreach_fake_quantize_with_scales_(ws, scales)     a whole model
    pack2(codes), unpack2(packed, in_features)     ternary codes in two bits each
    int8_per_token(x)  -> x_q              activations; straight-through

`_api` has the functions with their documentation, `_schema` what torch knows of them, `_operators`
the checks and copies around kernels, `_checks` the refusals. Kernels are in `_reference`, `_cpu`
and `_npu`; `_backends` chooses between them.

The only importer of compiled modules. Without them everything runs on the pure-torch reference and
one warning says so; `backend_report` tells which backend is live and why.
"""

from __future__ import annotations

import logging

from megatron_bitcpm.config import env_cpu_isa
from megatron_bitcpm.ops import _cpu, _npu, _schema
from megatron_bitcpm.ops._api import (
    abs_sums,
    fake_quantize,
    fake_quantize_,
    fake_quantize_with_scales,
    fake_quantize_with_scales_,
    foreach_fake_quantize_,
    foreach_fake_quantize_with_scales_,
    int8_per_token,
    pack2,
    quantize,
    unpack2,
)
from megatron_bitcpm.ops._backends import backend_report, describe_backend, use_backend
from megatron_bitcpm.quant.scales import scales_from_sums

__all__ = [
    "abs_sums",
    "backend_report",
    "describe_backend",
    "fake_quantize",
    "fake_quantize_",
    "fake_quantize_with_scales",
    "fake_quantize_with_scales_",
    "foreach_fake_quantize_",
    "foreach_fake_quantize_with_scales_",
    "int8_per_token",
    "pack2",
    "quantize",
    "scales_from_sums",
    "unpack2",
    "use_backend",
]

_schema.register()
_cpu.register(env_cpu_isa())
if _cpu.load_error:
    logging.getLogger(__name__).warning(
        "no compiled CPU operators (%s): using the pure-torch reference, slower, equal bits",
        _cpu.load_error,
    )
_npu.register()
