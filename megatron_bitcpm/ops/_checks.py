"""What the operators refuse, one line each: types, shapes, and memory that is written twice.

`find_..._problem` returns the line or None, for fakes; `check_...` raises it as BitcpmError, for
backends, which call it before they touch memory.

Shape legend: O out, I in, G groups per row, P packed bytes per row.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from megatron_bitcpm.errors import BitcpmError
from megatron_bitcpm.quant.packing import count_packed_bytes

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _describe_layout(name: str, x: torch.Tensor) -> str:
    return f"{name}.layout={x.layout}: must be strided. Call to_dense() first."


def find_weight_problem(w: torch.Tensor, name: str = "w") -> str | None:
    """Return what is wrong with w as a latent weight, one line, or None."""
    if w.layout != torch.strided:
        return _describe_layout(name, w)
    if w.dtype not in DTYPES:
        return (
            f"{name}.dtype={w.dtype}: must be float32, bfloat16 or float16. Convert the weight "
            "first."
        )
    if w.dim() != 2:
        return (
            f"{name}.shape={list(w.shape)}: must be [out, in]. Reshape the weight to two "
            "dimensions."
        )
    return None


def find_scales_problem(
    w: torch.Tensor, scales: torch.Tensor, name: str = "scales", of: str = "w"
) -> str | None:
    """Return what is wrong with scales_OG for w, one line, or None."""
    if scales.layout != torch.strided:
        return _describe_layout(name, scales)
    if scales.dtype != torch.float32:
        return f"{name}.dtype={scales.dtype}: must be float32. Take them from scales_from_sums."
    if scales.device != w.device:
        return (
            f"{name}.device={scales.device}: {of} is on {w.device}. Move the scales to the weight."
        )
    if scales.dim() != 2 or scales.shape[0] != w.shape[0] or not _divides(scales, w):
        return (
            f"{name}.shape={list(scales.shape)}: must be [{w.shape[0]}, G] with G a divisor of "
            f"{w.shape[1]}, the inputs of {of}. Pass one scale per group, e.g. expand a scale per "
            "row to [out, 1]."
        )
    return None


def _divides(scales: torch.Tensor, w: torch.Tensor) -> bool:
    num_groups, in_features = scales.shape[1], w.shape[1]
    return in_features == 0 if num_groups == 0 else in_features % num_groups == 0


def find_list_problem(
    ws: Sequence[torch.Tensor], scales: Sequence[torch.Tensor] | None = None
) -> str | None:
    """Return what is wrong with a list of latent weights (and their scales), one line, or None."""
    if scales is not None and len(scales) != len(ws):
        return f"scales={len(scales)} tensors: ws has {len(ws)}. Pass one per weight."
    for index, w in enumerate(ws):
        problem = find_weight_problem(w, f"ws[{index}]")
        if problem is None and w.device != ws[0].device:
            problem = (
                f"ws[{index}].device={w.device}: ws[0] is on {ws[0].device}. Call once per device."
            )
        if problem is None and scales is not None:
            problem = find_scales_problem(w, scales[index], f"scales[{index}]", f"ws[{index}]")
        if problem:
            return problem
    return None


def find_codes_problem(codes: torch.Tensor) -> str | None:
    """Return what is wrong with the type and shape of codes_OI, one line, or None."""
    if codes.layout != torch.strided:
        return _describe_layout("codes", codes)
    if codes.dtype != torch.int8:
        return f"codes.dtype={codes.dtype}: must be int8. Take the codes from quantize."
    if codes.dim() != 2:
        return f"codes.shape={list(codes.shape)}: must be [out, in]. Reshape to two dimensions."
    return None


def find_packed_problem(packed: torch.Tensor, in_features: int) -> str | None:
    """Return what is wrong with the type and shape of packed_OP, one line, or None."""
    if packed.layout != torch.strided:
        return _describe_layout("packed", packed)
    if packed.dtype != torch.uint8:
        return f"packed.dtype={packed.dtype}: must be uint8. Take the bytes from pack2."
    if in_features < 0:
        return f"in_features={in_features}: is a number of inputs. Pass 0 or more."
    wanted = count_packed_bytes(in_features)
    if packed.dim() != 2 or packed.shape[1] != wanted:
        return (
            f"packed.shape={list(packed.shape)}: must be [out, {wanted}] for in_features "
            f"{in_features}. Pass the bytes of pack2 and the inputs they came from."
        )
    return None


def find_activation_problem(x: torch.Tensor) -> str | None:
    """Return what is wrong with x as activations, one line, or None."""
    if x.layout != torch.strided:
        return _describe_layout("x", x)
    if x.dtype not in DTYPES:
        return f"x.dtype={x.dtype}: must be float32, bfloat16 or float16. Convert it first."
    if x.dim() == 0:
        return f"x.shape={[]}: must be [..., in]. Pass at least one dimension."
    return None


def raise_problem(problem: str | None) -> None:
    """Raise `problem` as BitcpmError unless it is None."""
    if problem:
        raise BitcpmError(problem)


def check_memory(x: torch.Tensor, name: str) -> None:
    """Raise BitcpmError where a tensor's memory was freed under it, as sharded training does.

    For backends alone: meta and fake tensors have no memory.
    """
    count = x.numel()
    if count and not x.is_contiguous():
        count = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    needed = (x.storage_offset() + count) * x.element_size()
    if count and needed > x.untyped_storage().nbytes():
        raise BitcpmError(f"{name}={list(x.shape)}: its memory was freed. Gather the weight first.")


def check_weight(w: torch.Tensor) -> None:
    """Raise BitcpmError unless w can be a latent weight: 2-D, float32/bfloat16/float16."""
    problem = find_weight_problem(w)
    if problem:
        raise BitcpmError(problem)
    check_memory(w, "w")


def check_weight_and_scales(w: torch.Tensor, scales: torch.Tensor) -> None:
    """Raise BitcpmError unless w is a latent weight and scales_OG float32 fit it."""
    raise_problem(find_weight_problem(w) or find_scales_problem(w, scales))
    check_memory(w, "w")
    check_memory(scales, "scales")


def check_list(ws: Sequence[torch.Tensor], scales: Sequence[torch.Tensor] | None = None) -> None:
    """Raise BitcpmError unless ws are latent weights (and scales fit them)."""
    raise_problem(find_list_problem(ws, scales))
    for name, tensors in (("ws", ws), ("scales", scales or ())):
        for index, x in enumerate(tensors):
            check_memory(x, f"{name}[{index}]")


def check_codes(codes: torch.Tensor) -> None:
    """Raise BitcpmError unless codes are int8 [O, I]."""
    raise_problem(find_codes_problem(codes))
    check_memory(codes, "codes")


def check_packed(packed: torch.Tensor, in_features: int) -> None:
    """Raise BitcpmError unless packed is uint8 and has the bytes of in_features codes."""
    raise_problem(find_packed_problem(packed, in_features))
    check_memory(packed, "packed")


def check_activation(x: torch.Tensor) -> None:
    """Raise BitcpmError unless x can be activations: float32/bfloat16/float16, [..., I]."""
    raise_problem(find_activation_problem(x))
    check_memory(x, "x")


def check_written(ws: Sequence[torch.Tensor], read: Iterable[torch.Tensor] = ()) -> None:
    """Raise BitcpmError unless each byte of ws is written once, and none of it is read as scales.

    Quantisation is not idempotent, so a weight that is in a list twice would come out wrong. The
    check compares ranges of addresses: views that interleave in memory are refused too.

    Args:
        ws: tensors that are overwritten.
        read: tensors that are read meanwhile.
    """
    single = len(ws) == 1
    ranges = []
    for index, w in enumerate(ws):
        name = "w" if single else f"ws[{index}]"
        if _overlaps_itself(w):
            raise BitcpmError(
                f"{name}.strides={list(w.stride())}: elements share memory. Pass a clone."
            )
        ranges.append((*_find_range(w), name, True))
    for index, scales in enumerate(read):
        name = "scales" if single else f"scales[{index}]"
        ranges.append((*_find_range(scales), name, False))
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


def _find_range(x: torch.Tensor) -> tuple[int, int]:
    """Addresses from the first byte of x to one past its last; (0, 0) when it has none."""
    if not x.numel():
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


def _overlaps_itself(x: torch.Tensor) -> bool:
    span = 0  # distance to the last element, over the dimensions of smaller stride
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1 and x.numel():
            if stride <= span:
                return True
            span += stride * (size - 1)
    return False
