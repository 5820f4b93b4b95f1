"""Grids and one scale per projection in training, against numpy on the unsharded weights."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from helpers.model_factory import tiny_model
from helpers.numpy_sums import row_sums
from helpers.ranks import run_ranks
from helpers.tiny_models import SEQ, VOCAB, model_parallel, tiny_run

from megatron_bitcpm import ops
from megatron_bitcpm.config import QuantConfig
from megatron_bitcpm.errors import ModelError
from megatron_bitcpm.parallel import scale_sync
from megatron_bitcpm.patching.versions import megatron_version

pytestmark = pytest.mark.both_versions

HEADS, HEAD_DIM, FFN = 4, 16, 256


def rows_of_projections(kind: str, groups: int) -> dict[str, list[int]]:
    """Rows of a full fused weight by projection, in the order of Hugging Face, counted out."""
    if kind == "linear_fc1":
        return {"gate": list(range(FFN)), "up": list(range(FFN, 2 * FFN))}
    if kind != "linear_qkv":
        return {kind: list(range(HEADS * HEAD_DIM))}
    rows: dict[str, list[int]] = {"q": [], "k": [], "v": []}
    row = 0
    for _ in range(groups):
        for slot in range(HEADS // groups + 2):
            name = "q" if slot < HEADS // groups else "kv"[slot - HEADS // groups]
            rows[name] += range(row, row + HEAD_DIM)
            row += HEAD_DIM
    return rows


def numpy_scales(
    w_OI: np.ndarray, kind: str, group_size, grid: str, slices: int, groups: int, eps: float = 1e-5
) -> np.ndarray:
    """One scale per row, [O, 1], from the full weight; `slices` cut its rows in training."""
    in_features = w_OI.shape[1]
    stats = row_sums(w_OI, slices) if grid == "ternary" else np.abs(w_OI).max(axis=1)
    divisor = np.float32(1.5 if grid in ("asym4", "half_sym4") else 2)

    def scale(stat, count):
        value = stat * np.float32(1 / count) if grid == "ternary" else stat / divisor
        return np.maximum(np.float32(value), np.float32(eps))

    if group_size == -1:
        return np.array([scale(stat, in_features) for stat in stats])[:, None]
    scales = np.zeros((len(stats), 1), np.float32)
    for rows in rows_of_projections(kind, groups).values():
        stat = row_sums(stats[None, rows])[0] if grid == "ternary" else stats[rows].max()
        scales[rows] = scale(stat, len(rows) * in_features)
    return scales


LEVELS = {
    "ternary": (-1, 0, 1),
    "asym4": (-2, -1, 0, 1),
    "half_sym4": (-1.5, -0.5, 0.5, 1.5),
    "int_sym4": (-2, -1, 1, 2),
    "five": (-2, -1, 0, 1, 2),
}


def numpy_fake_quantize(w_OI: np.ndarray, scales: np.ndarray, grid: str, dtype) -> np.ndarray:
    """The level nearest to w / s, by midpoints times s in float32; a tie takes the smaller."""
    magnitude, chosen = np.abs(w_OI), np.zeros_like(w_OI)
    for sign, side in ((-1, w_OI < 0), (1, w_OI >= 0)):
        steps = sorted(abs(level) for level in LEVELS[grid] if level * sign >= 0)
        value = np.full_like(w_OI, sign * steps[0])
        for low, high in itertools.pairwise(steps):
            above = magnitude > np.float32((low + high) / 2) * scales
            value = np.where(above, np.float32(sign * high), value)
        chosen = np.where(side, value, chosen)
    # + 0 turns -0 into +0.
    return torch.from_numpy((chosen + np.float32(0)) * scales).to(dtype).float().numpy()


def full_weight(name: str, shape: tuple[int, int]) -> torch.Tensor:
    """Values that the name decides; projections of very different size, so that scales are too."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    rows = torch.linspace(0.01, 0.09, shape[0]).unsqueeze(1)
    return torch.randn(shape, generator=generator) * rows


def local_part(full: torch.Tensor, site, rank: int) -> torch.Tensor:
    if site.row_parallel:
        return full.chunk(site.quantizer.tp_size, 1)[rank]
    if site.name.endswith("linear_fc1"):
        return torch.cat([half.chunk(site.quantizer.tp_size)[rank] for half in full.chunk(2)])
    return full.chunk(site.quantizer.tp_size)[rank]


def weights_of_forward(rank: int, changes: dict, tp: int, dtype, groups: int) -> dict:
    """(is row parallel, latent shard, quantised shard, local scales) of every linear."""
    found = {}
    model = tiny_model(num_layers=1, num_query_groups=groups)
    with tiny_run(QuantConfig(**changes), tp=tp, model=model, dtype=dtype) as run:
        for site in run.ternary.sites:
            rows, columns = site.weight.shape
            shape = (rows, columns * tp) if site.row_parallel else (rows * tp, columns)
            with torch.no_grad():
                site.weight.copy_(local_part(full_weight(site.name, shape), site, rank))
        latents = {site.name: site.weight.detach().clone() for site in run.ternary.sites}
        original = run.ternary.requantizer.weight_for_forward

        def spy(site, weight):
            wq = original(site, weight).detach().float().numpy().copy()
            latent = latents[site.name].float().numpy()
            scales = None if site.scales_OG is None else site.scales_OG.numpy().copy()
            found[site.name.split(".")[-1]] = (site.row_parallel, latent, wq, scales)
            return original(site, weight)

        run.ternary.requantizer.weight_for_forward = spy
        run.forward_backward(0, forward_only=True)
    return found


def join(shards: list[np.ndarray], kind: str, row_parallel: bool) -> np.ndarray:
    if row_parallel:
        return np.concatenate(shards, 1)
    if kind == "linear_fc1":
        halves = zip(*(np.split(shard, 2) for shard in shards), strict=True)
        return np.concatenate([np.concatenate(half) for half in halves])
    return np.concatenate(shards)


def gather(changes: dict, tp: int, dtype=torch.bfloat16, groups: int = 2) -> dict:
    """Full (latent, quantised) weight and scales by kind of linear; scales None where not given."""
    ranks = run_ranks(tp, weights_of_forward, changes, tp, dtype, groups)
    full = {}
    for kind, (row_parallel, *_) in ranks[0].items():
        latent, wq = (join([rank[kind][i] for rank in ranks], kind, row_parallel) for i in (1, 2))
        scales = [rank[kind][3] for rank in ranks]
        if scales[0] is not None:
            if row_parallel:
                assert all(np.array_equal(s, scales[0]) for s in scales)
            scales = scales[0] if row_parallel else join(scales, kind, False)
        full[kind] = row_parallel, latent, wq, scales
    assert len(full) == 4
    return full


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("grid", "group_size", "mode", "tp", "dtype", "eps"),
    [
        ("ternary", "tensor", "every_forward", 1, torch.float32, 1e-5),
        ("ternary", "tensor", "every_step", 2, torch.bfloat16, 1e-5),
        ("five", "tensor", "every_forward", 2, torch.bfloat16, 1e-5),
        # Here eps is the scale of many rows.
        ("five", -1, "every_step", 2, torch.bfloat16, 0.03),
        ("half_sym4", -1, "every_forward", 2, torch.float32, 0.03),
        pytest.param("half_sym4", "tensor", "every_step", 2, torch.bfloat16, 1e-5, marks=SLOW),
        pytest.param("asym4", -1, "every_forward", 2, torch.float32, 1e-5, marks=SLOW),
        pytest.param("int_sym4", -1, "every_step", 2, torch.bfloat16, 1e-5, marks=SLOW),
        pytest.param("int_sym4", "tensor", "every_forward", 2, torch.float32, 1e-5, marks=SLOW),
        pytest.param("ternary", "tensor", "every_forward", 2, torch.float16, 1e-5, marks=SLOW),
    ],
)
def test_weights_of_the_forward_are_those_of_numpy(grid, group_size, mode, tp, dtype, eps):
    changes = {"grid": grid, "group_size": group_size, "requantize": mode, "eps": eps}
    for kind, (row_parallel, latent, wq, given) in gather(changes, tp, dtype).items():
        slices = tp if row_parallel else 1
        scales = numpy_scales(latent, kind, group_size, grid, slices, 2, eps)
        if group_size == "tensor" or (row_parallel and tp > 1):
            np.testing.assert_array_equal(given, scales, err_msg=kind)
        expected = numpy_fake_quantize(latent, scales, grid, dtype)
        np.testing.assert_array_equal(wq, expected, err_msg=kind)
        at_eps = (scales == np.float32(eps)).mean()
        assert 0 < at_eps < 0.9 if eps > 1e-5 else at_eps == 0
        used = np.unique(np.round(wq / scales * 2) / 2)
        assert set(used) <= set(LEVELS[grid]) and len(used) >= len(LEVELS[grid]) - (grid == "asym4")


def test_one_scale_per_projection_does_not_depend_on_column_parallelism():
    changes = {"group_size": "tensor", "requantize": "every_forward"}
    one, two = gather(changes, 1), gather(changes, 2)
    for kind, (row_parallel, latent, wq, scales) in one.items():
        np.testing.assert_array_equal(latent, two[kind][1])
        if not row_parallel:
            np.testing.assert_array_equal(scales, two[kind][3])
            np.testing.assert_array_equal(wq, two[kind][2])
        projections = rows_of_projections(kind, groups=2)
        found = []
        for rows in projections.values():
            value = np.unique(scales[rows])
            assert len(value) == 1
            # Another order of the additions, in double precision.
            assert value[0] == pytest.approx(np.abs(latent[rows].astype(float)).mean(), rel=2e-6)
            found.append(value[0])
        assert len(set(found)) == len(projections), "the projections must differ to tell them apart"
        # Only the slices of a row may show.
        np.testing.assert_allclose(scales, two[kind][3], rtol=1e-6)


@pytest.mark.skipif(megatron_version() < (0, 16), reason="0.12 has no fewer groups than ranks")
def test_fewer_query_groups_than_tensor_ranks():
    """The cut between the ranks then falls inside the rows of one query group."""
    changes = {"group_size": "tensor", "requantize": "every_forward"}
    _, latent, wq, _ = gather(changes, 2, groups=1)["linear_qkv"]
    scales = numpy_scales(latent, "linear_qkv", "tensor", "ternary", 1, groups=1)
    np.testing.assert_array_equal(
        wq, numpy_fake_quantize(latent, scales, "ternary", torch.bfloat16)
    )


def scales_of_one_large_slice(rank: int) -> dict:
    """Scales of the row-parallel linears whose first slice sums to 2**24, the others to 1."""
    quant = QuantConfig(requantize="every_forward")
    model = tiny_model(num_layers=1, num_query_groups=4)
    with tiny_run(quant, tp=4, model=model, dtype=torch.float32) as run:
        rows = [site for site in run.ternary.sites if site.row_parallel]
        for site in rows:
            site.weight.data.zero_()
            site.weight.data[:, 5] = 2.0**24 if rank == 0 else 1.0
        run.forward_backward(0, forward_only=True)
        return {site.name.split(".")[-1]: site.scales_OG.unique().tolist() for site in rows}


def test_sums_of_the_ranks_are_added_from_the_first():
    """From the last, or in pairs, the ones would survive: 16777220 or 16777218."""
    for found in run_ranks(4, scales_of_one_large_slice):
        assert found == {"linear_proj": [2.0**24 / 64], "linear_fc2": [2.0**24 / 256]}


def scales_beside_a_nan(rank: int, grid: str) -> dict:
    """Whether each row's scale is NaN, by kind, after rank 1 got one NaN in two of its weights."""
    quant = QuantConfig(group_size="tensor", grid=grid, requantize="every_forward")
    with tiny_run(quant, tp=2, model=tiny_model(num_layers=1)) as run:
        for site in run.ternary.sites:
            if rank == 1 and site.name.endswith(("linear_qkv", "linear_fc2")):
                # Of linear_qkv the last row, which is one of v.
                site.weight.data[-1, 3] = float("nan")
        scale_sync.update_given_scales(run.ternary.sites)
        return {
            site.name.split(".")[-1]: site.scales_OG.isnan().flatten().tolist()
            for site in run.ternary.sites
        }


@pytest.mark.parametrize("grid", ["ternary", pytest.param("five", marks=SLOW)])
def test_a_weight_that_is_not_finite_shows_in_its_projection_on_all_ranks(grid):
    for found in run_ranks(2, scales_beside_a_nan, grid):
        assert found["linear_qkv"] == [False] * 48 + [True] * 16
        assert all(found["linear_fc2"])
        assert not any(found["linear_fc1"]) and not any(found["linear_proj"])


def operator_calls(rank: int, changes: dict) -> list[list[tuple]]:
    """(operator, weights in the call) of each step, every_step, and the operators of a forward."""
    calls: list[tuple] = []
    originals = {name: getattr(ops, name) for name in dir(ops) if "fake_quantize" in name}

    def counting(name):
        def counted(weights, *args):
            calls.append((name, len(weights) if isinstance(weights, list) else 1))
            return originals[name](weights, *args)

        return counted

    for name in originals:
        setattr(ops, name, counting(name))
    steps = []
    with tiny_run(QuantConfig(requantize="every_step", **changes), tp=2) as run:
        run.train_step(0)
        for step in range(1, 3):
            calls.clear()
            run.train_step(step)
            steps.append(sorted(calls))
    return steps


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {},
            [("foreach_fake_quantize_", 4), ("foreach_fake_quantize_with_scales_", 4)],
        ),
        pytest.param({"group_size": 32}, [("foreach_fake_quantize_", 8)], marks=SLOW),
        ({"group_size": "tensor"}, [("foreach_fake_quantize_with_scales_", 8)]),
    ],
)
def test_one_operator_quantises_all_weights_of_a_kind(changes, expected):
    for steps in run_ranks(2, operator_calls, changes):
        assert steps == [expected, expected]


def experts_and_refusals(rank: int) -> tuple:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_bitcpm.parallel.convert import ternarize_

    with model_parallel(seed=1):
        config = TransformerConfig(
            num_layers=1,
            hidden_size=64,
            num_attention_heads=4,
            num_moe_experts=2,
            gated_linear_unit=True,
            activation_func=torch.nn.functional.silu,
            ffn_hidden_size=32,
            use_cpu_initialization=True,
            gradient_accumulation_fusion=False,
            masked_softmax_fusion=False,
            apply_rope_fusion=False,
            bias_activation_fusion=False,
            bias_dropout_fusion=False,
            persist_layer_norm=False,
            add_bias_linear=False,
        )
        model = GPTModel(
            config,
            get_gpt_layer_local_spec(num_experts=2, moe_grouped_gemm=False),
            vocab_size=VOCAB,
            max_sequence_length=SEQ,
            position_embedding_type="rope",
        )
        attention = model.decoder.layers[0].self_attention
        attention.linear_qkv.output_size += 64  # an output gate, say
        quant = QuantConfig(group_size="tensor")
        try:
            ternarize_(model, quant)
            message = ""
        except ModelError as error:
            message = str(error)
        attention.linear_qkv.output_size -= 64
        ternary = ternarize_(model, quant)
        scale_sync.update_given_scales(ternary.sites)
        counts = {s.name: s.scales_OG.unique().numel() for s in ternary.sites}
        return message, counts


def test_experts_have_their_own_projections_and_unknown_rows_are_refused():
    message, counts = run_ranks(1, experts_and_refusals)[0]
    assert message.startswith(
        "quant.group_size=tensor: cannot tell to which projections the rows of "
        "decoder.layers.0.self_attention.linear_qkv belong (ColumnParallelLinear [256, 64]). "
        "Exclude it"
    ), message
    experts = {name: n for name, n in counts.items() if "experts" in name}
    assert sorted(experts.values()) == [1, 1, 2, 2] and len(counts) == 6
