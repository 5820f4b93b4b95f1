"""The two figures of latents: against their definitions, and what tells a trained model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.numpy_ternary import fake_quantize

from megatron_bitcpm.config import QuantConfig
from megatron_bitcpm.conversion import quantization_error
from megatron_bitcpm.conversion.quantization_error import (
    CROWDING,
    LatentFigures,
    measure_latents,
)
from megatron_bitcpm.conversion.source import TensorSource
from megatron_bitcpm.quant.grids import find_grid
from megatron_bitcpm.quantizer import Quantizer


def gaussian(rows=512, columns=512):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(3))


def measure(w, group_size=-1, grid="ternary"):
    figures = LatentFigures()
    figures.add(
        w, fake_quantize(w, group_size, 1e-5, grid), w.shape[1] if group_size == -1 else group_size
    )
    return figures


@pytest.mark.parametrize("group_size", [-1, 64])
@pytest.mark.parametrize("grid", ["ternary", "five"])
def test_error_is_its_definition(grid, group_size):
    w = gaussian()
    before, wq = w.clone(), fake_quantize(w, group_size, 1e-5, grid)
    wanted = float(((w - wq).double() ** 2).sum() / (w.double() ** 2).sum())
    assert measure(w, group_size, grid).error == pytest.approx(wanted, rel=1e-5)
    assert torch.equal(w, before)  # it may lie in a mapped file


def test_gaussian_weights():
    # E(w - wq)^2 / E w^2 with s = sqrt(2 / pi), threshold s / 2, by integration.
    scale = (2 / torch.pi) ** 0.5
    x = torch.linspace(-8, 8, 400_001, dtype=torch.float64)
    density = torch.exp(-x * x / 2) / (2 * torch.pi) ** 0.5
    wq = torch.where(x.abs() > scale / 2, x.sign() * scale, 0.0)
    wanted = float(torch.trapezoid((x - wq) ** 2 * density, x))
    assert wanted == pytest.approx(0.263, abs=5e-4)
    figures = measure(gaussian())
    assert figures.error == pytest.approx(wanted, abs=3e-3)
    assert figures.crowding == pytest.approx(1.006, abs=0.03)
    assert not figures.looks_trained(find_grid("ternary"))


def test_what_tells_a_training():
    w = gaussian()
    scale = w.abs().mean(-1, keepdim=True)
    # A tenth of the weights near the threshold moved onto it.
    near = ((w.abs() / scale - 0.5).abs() < 0.2) & (torch.rand_like(w) < 0.1)
    crowded = torch.where(near, w.sign() * scale * 0.5, w)
    assert measure(crowded).crowding > CROWDING
    assert measure(crowded).looks_trained(find_grid("ternary"))
    close = fake_quantize(w) + 0.05 * scale * w
    assert measure(close).error < 0.1
    assert measure(close).looks_trained(find_grid("ternary"))
    assert not measure(close, grid="five").looks_trained(find_grid("five"))


@pytest.mark.parametrize("group_size", [-1, 64])
def test_rows_stand_for_a_large_tensor(group_size, monkeypatch):
    w = gaussian(2048)
    w[1::2] *= 100  # every other row, which a few neighbouring rows would not show
    w[0::3] *= 0.01
    whole = measure(w, group_size)
    monkeypatch.setattr(quantization_error, "_SAMPLE", w.numel() // 9)
    some = measure(w, group_size)
    assert some.error == pytest.approx(whole.error, abs=0.01)
    assert some.crowding == pytest.approx(whole.crowding, abs=0.03)
    assert 8 * some.beside < whole.beside < 10 * some.beside


class NineLayers(TensorSource):
    """One projection of each of nine layers; notes which are read."""

    num_layers = 9

    def shapes(self):
        return {f"model.layers.{layer}.mlp.up_proj.weight": (8, 64) for layer in range(9)}

    def dtype(self, name):
        return torch.float32

    def tensor(self, name):
        self.facts.setdefault(int(name.split(".")[2]), []).append(name)
        return gaussian(8, 64)


def test_the_sample_is_first_middle_and_last_layer():
    quantizer = Quantizer(QuantConfig(group_size="tensor"))
    source = NineLayers(path=Path("x"), kind="file", form="latent", quantizer=quantizer)
    figures = measure_latents(source)
    assert list(source.facts) == [0, 4, 8]
    w = gaussian(8, 64)
    scale = w.abs().mean()
    wq = torch.where(w.abs() > scale / 2, w.sign() * scale, 0.0)
    assert figures.error == pytest.approx(float(((w - wq) ** 2).sum() / (w**2).sum()), rel=1e-4)
    inside = ((w.abs() / scale - 0.5).abs() < 0.05).sum()
    assert figures.at_threshold == 3 * int(inside)
