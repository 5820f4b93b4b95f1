"""What the operators refuse, one line each: types, shapes, and memory that is freed or shared.

Types and shapes are those of `_api`. Each check raises BitcpmError.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from megatron_bitcpm.errors import BitcpmError
from megatron_bitcpm.quant.packing import count_packed_bytes

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _check_layout(name: str, x: torch.Tensor) -> None:
    if x.layout != torch.strided:
        raise BitcpmError(f"{name}.layout={x.layout}: must be strided. Call to_dense() first.")


def check_weight(w: torch.Tensor, name: str = "w") -> None:
    """Latent weights: [O, I], float32, bfloat16 or float16."""
    _check_layout(name, w)
    if w.dtype not in DTYPES:
        raise BitcpmError(
            f"{name}.dtype={w.dtype}: must be float32, bfloat16 or float16. Convert the weight "
            "first."
        )
    if w.dim() != 2:
        raise BitcpmError(
            f"{name}.shape={list(w.shape)}: must be [out, in]. Reshape the weight to two "
            "dimensions."
        )


def check_scales(
    w: torch.Tensor, scales: torch.Tensor, name: str = "scales", of: str = "w"
) -> None:
    """Scales of w: float32, [O, G], G a divisor of I."""
    _check_layout(name, scales)
    if scales.dtype != torch.float32:
        raise BitcpmError(
            f"{name}.dtype={scales.dtype}: must be float32. Take them from scales_from_sums."
        )
    if scales.device != w.device:
        raise BitcpmError(
            f"{name}.device={scales.device}: {of} is on {w.device}. Move the scales to the weight."
        )
    if scales.dim() != 2 or scales.shape[0] != w.shape[0] or not _divides(scales, w):
        raise BitcpmError(
            f"{name}.shape={list(scales.shape)}: must be [{w.shape[0]}, G] with G a divisor of "
            f"{w.shape[1]}, the inputs of {of}. Pass one scale per group, e.g. expand a scale per "
            "row to [out, 1]."
        )


def _divides(scales: torch.Tensor, w: torch.Tensor) -> bool:
    num_groups, in_features = scales.shape[1], w.shape[1]
    return in_features == 0 if num_groups == 0 else in_features % num_groups == 0


def check_list(ws: Sequence[torch.Tensor], scales: Sequence[torch.Tensor] | None = None) -> None:
    """Latent weights of one device, and one tensor of scales for each."""
    if scales is not None and len(scales) != len(ws):
        raise BitcpmError(f"scales={len(scales)} tensors: ws has {len(ws)}. Pass one per weight.")
    for index, w in enumerate(ws):
        check_weight(w, f"ws[{index}]")
        if w.device != ws[0].device:
            raise BitcpmError(
                f"ws[{index}].device={w.device}: ws[0] is on {ws[0].device}. Call once per device."
            )
        if scales is not None:
            check_scales(w, scales[index], f"scales[{index}]", f"ws[{index}]")


def check_codes(codes: torch.Tensor) -> None:
    """Codes: int8, [O, I]."""
    _check_layout("codes", codes)
    if codes.dtype != torch.int8:
        raise BitcpmError(f"codes.dtype={codes.dtype}: must be int8. Take the codes from quantize.")
    if codes.dim() != 2:
        raise BitcpmError(
            f"codes.shape={list(codes.shape)}: must be [out, in]. Reshape to two dimensions."
        )


def check_packed(packed: torch.Tensor, in_features: int) -> None:
    """Packed codes: uint8, [O, P] for in_features codes."""
    _check_layout("packed", packed)
    if packed.dtype != torch.uint8:
        raise BitcpmError(f"packed.dtype={packed.dtype}: must be uint8. Take the bytes from pack2.")
    if in_features < 0:
        raise BitcpmError(f"in_features={in_features}: is a number of inputs. Pass 0 or more.")
    wanted = count_packed_bytes(in_features)
    if packed.dim() != 2 or packed.shape[1] != wanted:
        raise BitcpmError(
            f"packed.shape={list(packed.shape)}: must be [out, {wanted}] for in_features "
            f"{in_features}. Pass the bytes of pack2 and the inputs they came from."
        )


def check_activation(x: torch.Tensor) -> None:
    """Activations: [..., I], float32, bfloat16 or float16."""
    _check_layout("x", x)
    if x.dtype not in DTYPES:
        raise BitcpmError(
            f"x.dtype={x.dtype}: must be float32, bfloat16 or float16. Convert it first."
        )
    if x.dim() == 0:
        raise BitcpmError("x.shape=[]: must be [..., in]. Pass at least one dimension.")


def check_memory(x: torch.Tensor, name: str) -> None:
    """Memory that was not freed under a tensor, as sharded training does. Fakes have none."""
    end = x.storage_offset() * x.element_size() + _span(x)
    if x.numel() and end > x.untyped_storage().nbytes():
        raise BitcpmError(f"{name}={list(x.shape)}: its memory was freed. Gather the weight first.")


def _span(x: torch.Tensor) -> int:
    """Return the bytes from the first of x to one past its last."""
    if x.is_contiguous():
        return x.numel() * x.element_size()
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return (last + 1) * x.element_size() if x.numel() else 0


def check_written(ws: Sequence[torch.Tensor], read: Iterable[torch.Tensor] = ()) -> None:
    """Each byte of ws, which is overwritten, is written once, and none of it is `read` as scales.

    Quantisation is not idempotent, so a weight that is in a list twice would come out wrong. The
    check compares ranges of addresses: views that interleave in memory are refused too.
    """
    single = len(ws) == 1
    ranges = []
    for index, w in enumerate(ws):
        name = "w" if single else f"ws[{index}]"
        if _overlaps_itself(w):
            raise BitcpmError(
                f"{name}.strides={list(w.stride())}: elements share memory. Pass a clone."
            )
        ranges.append((w.data_ptr(), w.data_ptr() + _span(w), name, True))
    for index, scales in enumerate(read):
        name = "scales" if single else f"scales[{index}]"
        ranges.append((scales.data_ptr(), scales.data_ptr() + _span(scales), name, False))
    ranges = sorted(r for r in ranges if r[0] < r[1])
    end, owner = 0, ""  # of the written range that reaches furthest
    read_end, reader = 0, ""
    for start, stop, name, written in ranges:
        other = owner if start < end else reader if written and start < read_end else ""
        if other:
            raise BitcpmError(
                f"{name}.data_ptr={hex(start)}: shares memory with {other}. Pass it once."
            )
        if written and stop > end:
            end, owner = stop, name
        if not written and stop > read_end:
            read_end, reader = stop, name


def _overlaps_itself(x: torch.Tensor) -> bool:
    span = 0  # distance to the last element, over the dimensions of smaller stride
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1 and x.numel():
            if stride <= span:
                return True
            span += stride * (size - 1)
    return False
