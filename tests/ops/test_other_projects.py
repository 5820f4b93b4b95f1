"""The operators against the code they have to agree with: Transformers and llama.cpp's gguf."""

import importlib.util

import numpy as np
import pytest
import torch
from helpers.operator_cases import DTYPES, LENGTHS, dtypes, make_activations

from megatron_bitcpm import ops

needs_gguf = pytest.mark.skipif(
    importlib.util.find_spec("gguf") is None, reason="gguf is not installed"
)


def assert_same_floats(actual: torch.Tensor, want: torch.Tensor) -> None:
    """Equal bits, so also equal signs of zero; of NaN only that it is one."""
    assert actual.dtype == want.dtype
    assert torch.equal(actual.isnan(), want.isnan())
    assert torch.equal(actual.nan_to_num(), want.nan_to_num())
    assert torch.equal(actual.signbit() & ~actual.isnan(), want.signbit() & ~want.isnan())


@dtypes
def test_int8_per_token_is_that_of_transformers(torch_backend, dtype):
    from transformers.integrations.bitnet import ActQuant

    with torch.compiler.set_stance("force_eager"):
        for cols in [*LENGTHS, 1000, 4096]:
            x = make_activations(cols, dtype, rows=100).requires_grad_()
            want = ActQuant.apply(x)
            assert_same_floats(ops.int8_per_token(x), want)
        grad = torch.randn(want.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        (theirs,) = torch.autograd.grad(want, x, grad)
        (ours,) = torch.autograd.grad(ops.int8_per_token(x), x, grad)
        assert torch.equal(ours, theirs)
        every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
        x = every.view(torch.bfloat16).reshape(4096, 16).to(dtype)
        assert_same_floats(ops.int8_per_token(x), ActQuant.apply(x))


@pytest.mark.slow
def test_int8_per_token_is_that_of_transformers_compiled(torch_backend):
    from transformers.integrations.bitnet import ActQuant

    for dtype in DTYPES:
        x = make_activations(1024, dtype, rows=256)
        assert_same_floats(ops.int8_per_token(x), ActQuant.apply(x))


@needs_gguf
def test_packed_bytes_are_those_of_llama_cpp(torch_backend):
    from gguf import GGMLQuantizationType, quants

    gen = torch.Generator().manual_seed(7)
    codes = torch.randint(-1, 2, (5, 1024), generator=gen, dtype=torch.int8)
    blocks = quants.quantize(codes.numpy().astype(np.float32), GGMLQuantizationType.TQ2_0)
    # A TQ2_0 block is 64 bytes of fields for 256 inputs and a float16 scale.
    fields = blocks.reshape(5, -1, 66)[:, :, :64].reshape(5, -1)
    assert np.array_equal(ops.pack2(codes).numpy(), fields)
    assert torch.equal(ops.unpack2(torch.from_numpy(fields.copy()), 1024), codes)
