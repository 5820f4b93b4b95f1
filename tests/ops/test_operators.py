"""The operators as torch sees them: schema, fakes, gradients, lists, refusals."""

import pytest
import torch
from helpers.operator_cases import GRIDS, random_weight

from megatron_bitcpm import ops
from megatron_bitcpm.arch.tensors import find_projection
from megatron_bitcpm.config import QuantConfig
from megatron_bitcpm.errors import BitcpmError
from megatron_bitcpm.ops._schema import SCHEMAS
from megatron_bitcpm.quant import groups
from megatron_bitcpm.quant.grids import find_grid
from megatron_bitcpm.quantizer import Quantizer

SCALES = torch.full((8, 4), 0.5)
CODES = torch.tensor([[-1, 0, 1, 1, 0]] * 8, dtype=torch.int8)
OPCHECKS = [
    ("fake_quantize", lambda w: (w, 16, 1e-5)),
    ("fake_quantize", lambda w: (w, 16, 1e-5, "five")),
    ("quantize", lambda w: (w, 16, 1e-5, "half_sym4")),
    ("abs_sums", lambda w: (w, 16)),
    ("fake_quantize_with_scales", lambda w: (w, SCALES, "asym4")),
    ("fake_quantize_", lambda w: (w.detach(), 16, 1e-5, "int_sym4")),
    ("fake_quantize_with_scales_", lambda w: (w.detach(), SCALES)),
    ("foreach_fake_quantize_", lambda w: ([w.detach(), random_weight(4, 32).bfloat16()], 16)),
    ("foreach_fake_quantize_with_scales_", lambda w: ([w.detach()], [SCALES], "five")),
    ("pack2", lambda w: (CODES,)),
    ("unpack2", lambda w: (torch.full((2, 64), 0b10010100, dtype=torch.uint8), 130)),
    ("int8_per_token", lambda w: (w,)),
]


@pytest.mark.parametrize(
    ("which", "name", "make_args"),
    # Schema, fakes and gradients are the same for every backend.
    [("auto", *check) for check in OPCHECKS] + [("reference", *OPCHECKS[0])],
    ids=[f"auto-{name}" for name, _ in OPCHECKS] + [f"reference-{OPCHECKS[0][0]}"],
)
def test_opcheck(which, name, make_args):
    ops.use_backend(which)
    try:
        args = make_args(random_weight().requires_grad_())
        torch.library.opcheck(getattr(torch.ops.bitcpm, name).default, args)
    finally:
        ops.use_backend("auto")


def test_every_operator_is_checked_and_exported():
    assert {name for name, _ in OPCHECKS} == set(SCHEMAS)
    assert set(SCHEMAS) <= set(ops.__all__)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradient_is_identity_and_values_are_on_the_grid(torch_backend, dtype, grid):
    grad = torch.randn(8, 64, generator=torch.Generator().manual_seed(2)).to(dtype)
    for function in (
        lambda w: ops.fake_quantize(w, 16, grid=grid),
        lambda w: ops.fake_quantize_with_scales(w, ops.quantize(w, 16, grid=grid)[1], grid),
    ):
        w = random_weight(dtype=dtype).requires_grad_()
        wq = function(w)
        wq.backward(grad)
        assert torch.equal(w.grad, grad)
        for group in wq.detach().reshape(-1, 16):
            assert 2 <= len(group.unique()) <= len(find_grid(grid).levels)


@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 3, 4, 16)])
def test_int8_per_token_of_any_rank_is_straight_through(torch_backend, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3)).requires_grad_()
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    x_q = ops.int8_per_token(x)
    x_q.backward(grad)
    assert torch.equal(x.grad, grad)
    with torch.no_grad():
        rows = x.reshape(-1, shape[-1])
        assert torch.equal(x_q, ops.int8_per_token(rows).reshape(shape))
        strided = x.repeat_interleave(2, -1)[..., ::2]
        assert not strided.is_contiguous() and torch.equal(ops.int8_per_token(strided), x_q)


def test_codes_scales_and_sums_carry_no_gradient(torch_backend):
    w = random_weight().requires_grad_()
    codes, scales = ops.quantize(w)
    assert not (codes.requires_grad or scales.requires_grad or ops.abs_sums(w).requires_grad)
    scales = scales.clone().requires_grad_()
    ops.fake_quantize_with_scales(w, scales).sum().backward()
    assert scales.grad is None


def test_fake_tensors_have_the_right_shapes():
    w = torch.empty(6, 64, dtype=torch.bfloat16, device="meta").t().contiguous().t()
    assert (ops.fake_quantize(w).shape, ops.fake_quantize(w).dtype) == (w.shape, w.dtype)
    assert ops.fake_quantize(w).is_contiguous()
    codes, scales = ops.quantize(w, 16)
    assert (codes.shape, codes.dtype) == ((6, 64), torch.int8)
    assert (scales.shape, scales.dtype) == ((6, 4), torch.float32)
    assert ops.abs_sums(w).shape == (6, 1)
    assert ops.pack2(codes).shape == (6, 32) and ops.pack2(codes).dtype == torch.uint8
    assert ops.unpack2(ops.pack2(codes), 64).shape == (6, 64)
    assert ops.int8_per_token(w).shape == w.shape
    ops.foreach_fake_quantize_([w, w], 16)
    with pytest.raises(BitcpmError, match=r"w.shape=\[3\]: must be \[out, in\]"):
        ops.fake_quantize(torch.empty(3, device="meta"))


def test_in_place_writes_through_any_strides(torch_backend):
    for w in (random_weight(), random_weight(64, 8).t(), random_weight(8, 128)[:, ::2]):
        want, version = ops.fake_quantize(w, 16), w._version
        scales = ops.quantize(w, 16)[1]
        given = ops.fake_quantize_with_scales(w, scales)
        other = w.clone(memory_format=torch.preserve_format)
        assert ops.fake_quantize_(w, 16) is w
        assert torch.equal(w, want) and w._version > version
        version = other._version
        assert ops.fake_quantize_with_scales_(other, scales) is other
        assert torch.equal(other, given) and other._version > version


def test_in_place_on_a_parameter(torch_backend):
    w = random_weight().requires_grad_()
    message = r"w.requires_grad=True: autograd cannot record this. Call it under torch.no_grad\(\)."
    with pytest.raises(BitcpmError, match=message):
        ops.fake_quantize_(w)
    want = ops.fake_quantize(w.detach())
    with torch.no_grad():
        ops.fake_quantize_(w)
    assert w.is_leaf and torch.equal(w, want)


def test_autograd_notices_an_in_place_change(torch_backend):
    w = random_weight().requires_grad_()
    loss = (w * w).sum()
    with torch.no_grad():
        ops.fake_quantize_(w)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_non_contiguous_inputs_equal_their_copies(torch_backend):
    w = random_weight(64, 96).t()[::2]
    assert torch.equal(ops.fake_quantize(w, 32), ops.fake_quantize(w.contiguous(), 32))
    assert torch.equal(ops.quantize(w, 32)[0], ops.quantize(w.contiguous(), 32)[0])
    assert torch.equal(ops.abs_sums(w, 32), ops.abs_sums(w.contiguous(), 32))
    per_tensor = torch.full((1, 1), 0.5).expand(48, 1)
    wq = ops.fake_quantize_with_scales(w, per_tensor)
    assert torch.equal(wq, ops.fake_quantize_with_scales(w.contiguous(), per_tensor.contiguous()))


@pytest.mark.parametrize("grid", ["ternary", "half_sym4"])
@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (0, 0)])
def test_empty_weights(torch_backend, shape, grid):
    w = torch.empty(shape)
    num_groups = 1 if shape[1] else 0
    assert ops.fake_quantize(w, grid=grid).shape == shape
    codes, scales = ops.quantize(w, grid=grid)
    assert codes.shape == shape and scales.shape == (shape[0], num_groups)
    assert ops.abs_sums(w).shape == (shape[0], num_groups)
    assert ops.fake_quantize_(w, grid=grid) is w
    assert ops.fake_quantize_with_scales(w, scales, grid).shape == shape
    assert ops.fake_quantize_with_scales_(w, scales, grid) is w
    ops.foreach_fake_quantize_([w, torch.empty(shape)], grid=grid)
    packed = ops.pack2(codes)
    assert packed.shape == (shape[0], 32 if shape[1] else 0)
    assert ops.unpack2(packed, shape[1]).shape == shape
    assert ops.int8_per_token(w).shape == shape


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: ops.fake_quantize(torch.ones(2, 4544), 128),
            "group_size=128: in_features 4544 is not a multiple. "
            "Use 71 or 142, or -1 for the whole row.",
        ),
        (
            lambda: ops.quantize(torch.ones(2, 4), 0),
            "group_size=0: must be at least 1, or -1 for the whole row. Use 64 or -1.",
        ),
        (
            lambda: ops.abs_sums(torch.ones(4)),
            "w.shape=[4]: must be [out, in]. Reshape the weight to two dimensions.",
        ),
        (
            lambda: ops.fake_quantize_(torch.ones(2, 4, dtype=torch.float64)),
            "w.dtype=torch.float64: must be float32, bfloat16 or float16. "
            "Convert the weight first.",
        ),
        (
            lambda: ops.fake_quantize(torch.ones(2, 4), eps=0.0),
            "eps=0.0: the smallest scale must be a positive normal float32. Use 1e-5.",
        ),
        (
            lambda: ops.fake_quantize_with_scales(torch.ones(2, 4), torch.ones(2, 3)),
            "scales.shape=[2, 3]: must be [2, G] with G a divisor of 4, the inputs of w. "
            "Pass one scale per group, e.g. expand a scale per row to [out, 1].",
        ),
        (
            lambda: ops.fake_quantize_with_scales_(torch.ones(2, 4), torch.ones(1, 1)),
            "scales.shape=[1, 1]: must be [2, G] with G a divisor of 4, the inputs of w. "
            "Pass one scale per group, e.g. expand a scale per row to [out, 1].",
        ),
        (
            lambda: ops.fake_quantize_with_scales(torch.ones(2, 4), torch.ones(2, 1).double()),
            "scales.dtype=torch.float64: must be float32. Take them from scales_from_sums.",
        ),
        (
            lambda: ops.fake_quantize(torch.ones(2, 4), grid="six"),
            "grid=six: is not a grid. Use ternary, asym4, half_sym4, int_sym4, five.",
        ),
        (
            lambda: ops.fake_quantize_with_scales_(torch.ones(2, 4), torch.ones(2, 1), "six"),
            "grid=six: is not a grid. Use ternary, asym4, half_sym4, int_sym4, five.",
        ),
        (
            lambda: ops.pack2(torch.ones(2, 4)),
            "codes.dtype=torch.float32: must be int8. Take the codes from quantize.",
        ),
        (
            lambda: ops.pack2(torch.ones(4, dtype=torch.int8)),
            "codes.shape=[4]: must be [out, in]. Reshape to two dimensions.",
        ),
        (
            lambda: ops.pack2(torch.tensor([[0, 1], [1, -3]], dtype=torch.int8)),
            "codes[1, 1]=-3: two bits hold -1, 0 and 1. Pack the codes of the ternary grid.",
        ),
        (
            lambda: ops.unpack2(torch.full((2, 32), 7, dtype=torch.uint8), 128),
            "packed[0, 0]=7: a field of 3 is not a code. Pass what pack2 returned.",
        ),
        (
            lambda: ops.unpack2(torch.ones(2, 32, dtype=torch.int8), 128),
            "packed.dtype=torch.int8: must be uint8. Take the bytes from pack2.",
        ),
        (
            lambda: ops.unpack2(torch.ones(2, 32, dtype=torch.uint8), 129),
            "packed.shape=[2, 32]: must be [out, 64] for in_features 129. "
            "Pass the bytes of pack2 and the inputs they came from.",
        ),
        (
            lambda: ops.unpack2(torch.ones(2, 32, dtype=torch.uint8), -1),
            "in_features=-1: is a number of inputs. Pass 0 or more.",
        ),
        (
            lambda: ops.int8_per_token(torch.ones(2, dtype=torch.float64)),
            "x.dtype=torch.float64: must be float32, bfloat16 or float16. Convert it first.",
        ),
        (
            lambda: ops.int8_per_token(torch.tensor(1.0)),
            "x.shape=[]: must be [..., in]. Pass at least one dimension.",
        ),
        (
            lambda: ops.foreach_fake_quantize_([torch.ones(2, 4), torch.ones(4)]),
            "ws[1].shape=[4]: must be [out, in]. Reshape the weight to two dimensions.",
        ),
        (
            lambda: ops.foreach_fake_quantize_([torch.ones(2, 4), torch.ones(2, 6)], 4),
            "ws[1].group_size=4: in_features 6 is not a multiple. "
            "Use 3 or 6, or -1 for the whole row.",
        ),
        (
            lambda: ops.foreach_fake_quantize_with_scales_([torch.ones(2, 4)], []),
            "scales=0 tensors: ws has 1. Pass one per weight.",
        ),
        (
            lambda: ops.foreach_fake_quantize_with_scales_([], [torch.ones(2, 1)]),
            "scales=1 tensors: ws has 0. Pass one per weight.",
        ),
        (
            lambda: ops.foreach_fake_quantize_with_scales_([torch.ones(2, 4)], [torch.ones(3, 1)]),
            "scales[0].shape=[3, 1]: must be [2, G] with G a divisor of 4, the inputs of ws[0]. "
            "Pass one scale per group, e.g. expand a scale per row to [out, 1].",
        ),
        (
            lambda: ops.fake_quantize_(torch.ones(1, 4).expand(3, 4)),
            "w.strides=[0, 1]: elements share memory. Pass a clone.",
        ),
    ],
)
def test_refusals_are_one_line(torch_backend, call, message):
    with pytest.raises(BitcpmError) as caught:
        call()
    assert str(caught.value) == message


def make_model():
    """Weights as in a model: several types and lengths, strided ones, an empty one."""
    ws = [
        random_weight(48, 640),
        random_weight(3, 64, torch.bfloat16),
        random_weight(64, 32, torch.float16),
        random_weight(64, 96).t(),
        random_weight(8, 128, torch.bfloat16)[:, ::2],
        torch.empty(0, 32),
        random_weight(1, 4096),
        random_weight(6, 64)[1:4],
    ]
    ws[0][3, 5] = float("nan")
    return ws


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("grid", GRIDS)
def test_a_list_equals_its_members(torch_backend, grid, threads):
    torch.set_num_threads(threads)
    for group_size in (32, -1):
        ws, others = make_model(), make_model()
        wants = [ops.fake_quantize(w, group_size, grid=grid) for w in ws]
        scales = [ops.quantize(w, group_size, grid=grid)[1] for w in ws]
        versions = [w._version for w in ws + others]
        assert ops.foreach_fake_quantize_(ws, group_size, grid=grid) is None
        assert ops.foreach_fake_quantize_with_scales_(tuple(others), scales, grid) is None
        for w, other, want in zip(ws, others, wants, strict=True):
            assert torch.equal(w.nan_to_num(9), want.nan_to_num(9))
            assert torch.equal(other.nan_to_num(9), want.nan_to_num(9))
        assert all(w._version > v for w, v in zip(ws + others, versions, strict=True))
    ops.foreach_fake_quantize_([])
    ops.foreach_fake_quantize_with_scales_([], [])


def test_a_list_of_parameters(torch_backend):
    ws = [random_weight().requires_grad_(), random_weight(4, 32).requires_grad_()]
    with pytest.raises(BitcpmError, match=r"Call it under torch.no_grad\(\)."):
        ops.foreach_fake_quantize_(ws)
    loss = (ws[1] ** 2).sum()
    with torch.no_grad():
        ops.foreach_fake_quantize_(ws)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_members_that_share_memory_are_refused_and_nothing_is_written(torch_backend):
    w, other = random_weight(8, 64), random_weight(8, 64)
    before = w.clone(), other.clone()
    scales = torch.ones(8, 1)
    inside = w[:, :1]  # float32 as scales are
    lists = [
        ([w, other, w], None, r"ws\[[02]\].data_ptr=0x[0-9a-f]+: shares memory with ws\[[02]\]"),
        ([other, w[2:5], w], None, r"ws\[1\].data_ptr=.*: shares memory with ws\[2\]"),
        ([w[:, 1::2], w[:, ::2]], None, r"ws\[0\].data_ptr=.*: shares memory with ws\[1\]"),
        ([other, w], [scales, inside], r"data_ptr=.*: shares memory with"),
        ([other, w[:1].expand(8, 64)], None, r"ws\[1\].strides=\[0, 1\]: elements share memory"),
    ]
    for ws, given, message in lists:
        with pytest.raises(BitcpmError, match=message):
            if given is None:
                ops.foreach_fake_quantize_(ws)
            else:
                ops.foreach_fake_quantize_with_scales_(ws, given)
    with pytest.raises(BitcpmError, match=r"w.data_ptr=.*: shares memory with scales."):
        ops.fake_quantize_with_scales_(w, inside)
    with pytest.raises(BitcpmError, match=r"ws\[1\].group_size=48: in_features 64"):
        ops.foreach_fake_quantize_([random_weight(2, 48), w], 48)
    assert torch.equal(w, before[0]) and torch.equal(other, before[1])
    # Neighbours in one buffer, and scales that share memory with each other, are fine.
    ops.foreach_fake_quantize_with_scales_([w[:4], w[4:]], [scales[:4], scales[:4]])
    assert torch.equal(w, ops.fake_quantize_with_scales(before[0], scales))


def test_sums_added_in_rank_order_equal_the_full_row_scale(torch_backend):
    w = random_weight(16, 4096, torch.bfloat16)
    down = find_projection("model.layers.0.mlp.down_proj.weight").spec
    for tp in (1, 2, 4):
        gathered = [ops.abs_sums(part) for part in w.chunk(tp, dim=1)]
        total = gathered[0].numpy().copy()
        for sums in gathered[1:]:
            total = total + sums.numpy()
        assert groups.add_in_rank_order(gathered).tolist() == total.tolist()
        _, scales = Quantizer(QuantConfig(), tp).codes_scales(w, down)
        assert torch.equal(scales, ops.scales_from_sums(torch.from_numpy(total), 4096))
    one = ops.fake_quantize_with_scales(w, ops.scales_from_sums(ops.abs_sums(w), 4096))
    assert torch.equal(one, ops.fake_quantize(w))


@pytest.mark.parametrize("grid", GRIDS[1:])
def test_largest_of_the_shards_gives_the_full_row_scale(torch_backend, grid):
    w = random_weight(16, 4096, torch.bfloat16)
    w[0], w[1] = 1e-7, 0.0  # below eps
    parts = [ops.quantize(part, grid=grid)[1] for part in w.chunk(4, dim=1)]
    scales = torch.stack(parts).amax(0)
    assert torch.equal(scales, ops.quantize(w, grid=grid)[1])
    wq = ops.fake_quantize_with_scales(w, scales, grid)
    assert torch.equal(wq, ops.fake_quantize(w, grid=grid))


def test_one_scale_for_a_whole_tensor(torch_backend):
    # `tensor` granularity: the sums of all rows in order, one scale, expanded to a scale per row.
    w = random_weight(12, 96)
    total = groups.add_in_rank_order(list(ops.abs_sums(w).unbind(0)))
    scale = ops.scales_from_sums(total.reshape(1, 1), w.numel())
    wq = ops.fake_quantize_with_scales(w, scale.expand(12, 1))
    assert scale.item() == pytest.approx(w.abs().mean().item(), rel=1e-6)
    want = (w / scale).round().clamp(-1, 1) * scale
    assert torch.equal(wq, want + 0.0)
