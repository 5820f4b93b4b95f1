"""Tensors and lists that no operator takes: one line each, nothing written, nothing crashes."""

import pytest
import torch
from helpers.operator_cases import random_weight

from megatron_bitcpm import ops
from megatron_bitcpm.errors import BitcpmError

ONES = torch.ones(2, 1)


def test_any_iterable_of_weights_is_a_list(torch_backend):
    ws, others = [random_weight(), random_weight(4, 32)], [random_weight(), random_weight(4, 32)]
    wants = [ops.fake_quantize(w) for w in ws]
    scales = [ops.quantize(w)[1] for w in ws]
    ops.foreach_fake_quantize_(w for w in ws)
    ops.foreach_fake_quantize_with_scales_(iter(others), dict(enumerate(scales)).values())
    for w, other, want in zip(ws, others, wants, strict=True):
        assert torch.equal(w, want) and torch.equal(other, want)
    parameters = [torch.nn.Parameter(w) for w in ws]
    with pytest.raises(BitcpmError, match="autograd cannot record this"):
        ops.foreach_fake_quantize_(w for w in parameters)
    ops.foreach_fake_quantize_(w for w in [])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: ops.foreach_fake_quantize_(torch.ones(2, 4)),
            "ws=[2, 4]: must be a list of weights. Pass [w].",
        ),
        (
            lambda: ops.foreach_fake_quantize_with_scales_([torch.ones(2, 4)], ONES),
            "scales=[2, 1]: must be a list of scales. Pass [scales].",
        ),
        (
            lambda: ops.foreach_fake_quantize_(None),
            "ws=None: must be a list of weights. Pass [w].",
        ),
        (
            lambda: ops.foreach_fake_quantize_([torch.ones(2, 4), None]),
            "ws[1]=None: must be a tensor. Pass a torch.Tensor.",
        ),
        (
            lambda: ops.foreach_fake_quantize_with_scales_([torch.ones(2, 4)], [[0.5, 0.5]]),
            "scales[0]=list: must be a tensor. Pass a torch.Tensor.",
        ),
        (lambda: ops.fake_quantize(None), "w=None: must be a tensor. Pass a torch.Tensor."),
        (lambda: ops.fake_quantize_(None), "w=None: must be a tensor. Pass a torch.Tensor."),
        (lambda: ops.quantize([1.0]), "w=list: must be a tensor. Pass a torch.Tensor."),
        (lambda: ops.abs_sums(None), "w=None: must be a tensor. Pass a torch.Tensor."),
        (
            lambda: ops.fake_quantize_with_scales(None, ONES),
            "w=None: must be a tensor. Pass a torch.Tensor.",
        ),
        (
            lambda: ops.fake_quantize_with_scales(torch.ones(2, 4), 0.5),
            "scales=float: must be a tensor. Pass a torch.Tensor.",
        ),
        (
            lambda: ops.fake_quantize_with_scales_(torch.ones(2, 4), None),
            "scales=None: must be a tensor. Pass a torch.Tensor.",
        ),
        (lambda: ops.pack2(None), "codes=None: must be a tensor. Pass a torch.Tensor."),
        (lambda: ops.unpack2(None, 4), "packed=None: must be a tensor. Pass a torch.Tensor."),
        (lambda: ops.int8_per_token(None), "x=None: must be a tensor. Pass a torch.Tensor."),
    ],
)
def test_what_is_no_tensor_or_no_list(call, message):
    with pytest.raises(BitcpmError) as caught:
        call()
    assert str(caught.value) == message


LAYOUTS = {
    "sparse_coo": lambda x: x.to_sparse(),
    "sparse_csr": lambda x: x.to_sparse_csr(),
    "_mkldnn": lambda x: x.to_mkldnn(),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_other_than_strided(torch_backend, layout):
    convert = LAYOUTS[layout]
    w = convert(torch.ones(2, 4))
    calls = {
        "w": [ops.fake_quantize, ops.fake_quantize_, ops.quantize, ops.abs_sums],
        "ws[0]": [lambda x: ops.foreach_fake_quantize_([x])],
        "x": [ops.int8_per_token],
        "scales": [lambda x: ops.fake_quantize_with_scales(torch.ones(2, 4), x)],
    }
    if layout != "_mkldnn":  # which has no int8
        calls["codes"] = [lambda x: ops.pack2(x.to(torch.int8))]
        calls["packed"] = [lambda x: ops.unpack2(x.to(torch.uint8), 4)]
    for name, functions in calls.items():
        for function in functions:
            with pytest.raises(BitcpmError) as caught:
                function(w)
            assert str(caught.value) == (
                f"{name}.layout=torch.{layout}: must be strided. Call to_dense() first."
            )


def freed(x: torch.Tensor) -> torch.Tensor:
    x.untyped_storage().resize_(0)
    return x


def test_memory_that_was_freed(torch_backend):
    """Sharded training frees weights between uses; reading one would end the process."""
    whole, good = torch.ones(4, 8), torch.ones(2, 8)
    # The address of a view is that of no memory plus an offset.
    part, turned = whole[2:], whole.t()
    freed(whole)
    scales = freed(torch.ones(2, 1))
    codes = freed(torch.ones(2, 8, dtype=torch.int8))
    packed = freed(torch.zeros(2, 32, dtype=torch.uint8))
    calls = [
        *(("w", part, f) for f in (ops.fake_quantize, ops.fake_quantize_, ops.quantize)),
        ("w", part, ops.abs_sums),
        ("w", part, lambda w: ops.fake_quantize_with_scales(w, ONES)),
        ("w", part, lambda w: ops.fake_quantize_with_scales_(w, ONES)),
        ("w", turned, ops.fake_quantize_),
        ("scales", scales, lambda s: ops.fake_quantize_with_scales(good, s)),
        ("scales", scales, lambda s: ops.fake_quantize_with_scales_(good, s)),
        ("ws[1]", part, lambda w: ops.foreach_fake_quantize_([good, w])),
        ("ws[1]", part, lambda w: ops.foreach_fake_quantize_with_scales_([good, w], [ONES, ONES])),
        ("scales[0]", scales, lambda s: ops.foreach_fake_quantize_with_scales_([good], [s])),
        ("codes", codes, ops.pack2),
        ("packed", packed, lambda p: ops.unpack2(p, 128)),
        ("x", part, ops.int8_per_token),
    ]
    for name, x, call in calls:
        with pytest.raises(BitcpmError) as caught:
            call(x)
        assert str(caught.value) == (
            f"{name}={list(x.shape)}: its memory was freed. Gather the weight first."
        )
    assert torch.equal(good, torch.ones(2, 8)), "a list is all or nothing"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tensor",), "group_size='tensor': must be an integer. Use 64, or -1 for the whole row."),
        ((128.0,), "group_size=128.0: must be an integer. Use 64, or -1 for the whole row."),
        ((True,), "group_size=True: must be an integer. Use 64, or -1 for the whole row."),
        ((2**63,), f"group_size={2**63}: is larger than any tensor. Use a smaller one."),
        ((64, None), "eps=None: must be a number. Use 1e-5."),
        ((64, 1e-5, None), "grid=None: must be a name. Use ternary."),
    ],
)
def test_settings_of_another_type_are_refused(arguments, message):
    w = random_weight()
    for call in (ops.fake_quantize, ops.quantize, ops.fake_quantize_):
        with pytest.raises(BitcpmError) as caught:
            call(w, *arguments)
        assert str(caught.value) == message
    with pytest.raises(BitcpmError) as caught:
        ops.foreach_fake_quantize_([w], *arguments)
    assert str(caught.value) == message


def test_memory_that_shrank_is_refused(torch_backend):
    w = random_weight()
    w.untyped_storage().resize_(100)
    strided = torch.zeros(64, 8).t()
    strided.untyped_storage().resize_(64 * 8 * 4 - 4)
    for bad in (w, strided):
        with pytest.raises(BitcpmError, match=r"w=\[8, 64\]: its memory was freed"):
            ops.fake_quantize(bad)
    assert ops.fake_quantize(torch.ones(1, 1).expand(8, 64)).shape == (8, 64)


def test_inference_tensors_change_in_inference_mode_only(torch_backend):
    with torch.inference_mode():
        frozen = random_weight()
    free, before = random_weight(), random_weight()
    for call in (
        lambda: ops.fake_quantize_(frozen),
        lambda: ops.foreach_fake_quantize_([free, frozen]),
    ):
        with pytest.raises(BitcpmError, match=r"w.is_inference=True: it changes only in inference"):
            call()
    assert torch.equal(free, before) and torch.equal(frozen, before)
    with torch.inference_mode():
        ops.fake_quantize_(frozen)
    assert torch.equal(frozen, ops.fake_quantize(before))
