"""Any two models compare: equal ones pass, and each small difference is counted where it is."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from helpers.memory_source import (
    MINICPM,
    copy_of,
    make_latent,
    make_megatron,
    make_pseudo,
    make_stamp,
)

from megatron_bitcpm.conversion import verify as verify_module
from megatron_bitcpm.conversion.hf.fold import fold
from megatron_bitcpm.conversion.verify import compare, verify_written
from megatron_bitcpm.errors import CheckpointError

GRIDS = ("ternary", "asym4", "half_sym4", "int_sym4", "five")
GATE, UP = (f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up"))
DOWN = "model.layers.2.mlp.down_proj.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"
NORM = "model.layers.2.input_layernorm.weight"


@pytest.fixture(scope="module")
def latent():
    return make_latent(make_stamp())


@pytest.fixture(scope="module")
def pseudo(latent):
    return make_pseudo(latent)


def refuse(message, found, wanted=None):
    with pytest.raises(CheckpointError, match=message) as caught:
        compare(found, wanted).proof()
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"model={found.path}: ")


def bits(tensor):
    """The bits of a bfloat16 tensor, to change in place."""
    return tensor.view(torch.int16)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("group_size", [-1, 16, "tensor"])
def test_all_forms_of_a_model_are_equal(grid, group_size):
    latent = make_latent(make_stamp(tp_size=2, grid=grid, group_size=group_size))
    pseudo, megatron = make_pseudo(latent), make_megatron(latent, rows=64)
    for found in (latent, pseudo, megatron):
        for wanted in (latent, pseudo, megatron):
            report = compare(found, wanted).proof()
            assert report["compared_tensors"] == 30
            for kind in ("codes", "scales", "values"):
                assert report[f"differing_{kind}"] == 0
    names = latent.quantized_tensors()
    assert len(names) == report["ternary_tensors"] == 21
    weights = torch.cat([pseudo.tensors[name].flatten() for name in names])
    assert report["zero_fraction"] == pytest.approx(float((weights == 0).float().mean()))
    assert report["weights"] == weights.numel()
    assert report["grid"] == grid


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_types(dtype):
    latent = make_latent(make_stamp(group_size=16, grid="five"), dtype=dtype)
    assert compare(make_pseudo(latent), latent).proof()["differing_codes"] == 0


def test_plain_models(latent):
    plain = make_latent()
    assert compare(plain, copy_of(plain)).proof()["ternary_tensors"] == 0
    other = copy_of(plain)
    bits(other.tensors[QUERY])[3, 5] += 1
    refuse(rf"not the model of plain: 1 values differ: {re.escape(QUERY)} \(1\)\.", other, plain)


def test_a_wider_type_of_the_same_values_is_equal(pseudo, latent):
    tensors = {name: tensor.float() for name, tensor in pseudo.tensors.items()}
    wide = dataclasses.replace(pseudo, tensors=tensors)
    compare(wide, latent).proof()
    tensors[NORM][0] = torch.nextafter(tensors[NORM][0], torch.tensor(9.0))
    refuse(rf"1 values differ: {re.escape(NORM)} \(1\)", wide, latent)


def test_swapped_gate_and_up(pseudo, latent):
    found = copy_of(pseudo)
    gate, up = found.tensors[GATE], found.tensors[UP]
    found.tensors[GATE], found.tensors[UP] = up, gate
    differing = int((gate.sign() != up.sign()).sum())
    message = rf"{2 * differing} codes differ: .*gate_proj.weight \({differing}\)"
    refuse(message, found, latent)
    rows = compare(found, latent).content["layers"]
    assert [row["codes"] for row in rows] == [0, 2 * differing, 0, 0]
    assert [row["layer"] for row in rows] == [0, 1, 2, None]


def test_permuted_rows_of_the_attention(pseudo, latent):
    """What a wrong split of a fused weight does: the rows are right, their order is not."""
    found = copy_of(pseudo)
    rows = found.tensors[QUERY]
    found.tensors[QUERY] = rows.roll(24, 0)
    codes = int((rows.roll(24, 0).sign() != rows.sign()).sum())
    scales = int((rows.roll(24, 0).abs().amax(1) != rows.abs().amax(1)).sum())
    assert codes and scales
    refuse(rf"{codes} codes differ: {re.escape(QUERY)} .*; {scales} scales differ", found, latent)


def test_one_flipped_sign(pseudo, latent):
    found = copy_of(pseudo)
    row, column = found.tensors[DOWN].nonzero()[7]
    found.tensors[DOWN][row, column] *= -1
    compare(found).proof()
    refuse(rf"1 codes differ: {re.escape(DOWN)} \(1\)\.", found, latent)


@pytest.mark.parametrize("wanted", ["pseudo", "latent"])
def test_a_scale_one_unit_off(wanted, pseudo, latent):
    found = copy_of(pseudo)
    row = bits(found.tensors[DOWN])[4]
    row[row != 0] += 1
    compare(found).proof()
    other = {"pseudo": pseudo, "latent": latent}[wanted]
    refuse(rf"{wanted}: 1 scales differ: {re.escape(DOWN)} \(1\)\.", found, other)


def test_a_negative_zero_is_a_zero(pseudo, latent):
    found = copy_of(pseudo)
    row, column = (found.tensors[DOWN] == 0).nonzero()[0]
    found.tensors[DOWN][row, column] = -0.0
    compare(found, latent).proof()


def test_one_value_of_a_norm(pseudo, latent):
    found = copy_of(pseudo)
    bits(found.tensors[NORM])[9] ^= 1
    refuse(rf"1 values differ: {re.escape(NORM)} \(1\)", found, latent)


def test_padding_rows_do_not_count(pseudo, latent):
    megatron = make_megatron(latent, rows=64)
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        megatron.tensors.tensors[name][50:] = torch.nan
    compare(pseudo, megatron).proof()
    megatron.tensors.tensors["output_layer.weight"][49, 0] += 1
    refuse(r"1 values differ: lm_head.weight \(1\)", pseudo, megatron)


def test_latents_are_compared_bit_for_bit(latent):
    other = copy_of(latent)
    bits(other.tensors[UP])[0, 0] += 1
    message = rf"1 values differ: {re.escape(UP)} \(1\)"
    refuse(message, other, latent)


def test_nan_latents(latent):
    other = copy_of(latent)
    other.tensors[DOWN][5, 3] = torch.nan
    # The whole group of the forward is NaN then: a row of 96.
    refuse(rf"{re.escape(DOWN)} holds 96 NaN or infinite values", other)
    plain = make_latent()
    plain.tensors[NORM][1] = torch.inf
    refuse(rf"{re.escape(NORM)} holds 1 NaN or infinite values", plain)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eps": 1e-4}, "eps of the quantiser is 0.0001, there 1e-05"),
        ({"activation": "int8_per_token"}, "activation of the quantiser is int8_per_token, there"),
        ({"full_precision_last_layers": 1}, "the quantisers make other tensors or groups"),
        ({"exclude": ("*.linear_proj",)}, "the quantisers make other tensors or groups"),
    ],
)
def test_another_quantizer(change, message, latent):
    other = dataclasses.replace(latent, quantizer=make_stamp(**change))
    refuse(message, other, latent)


def test_slices_of_the_training_matter_where_rows_were_cut(latent):
    message = "tensor_model_parallel_size of the quantiser is 2, there 1"
    refuse(message, dataclasses.replace(latent, quantizer=make_stamp(tp_size=2)), latent)
    for quant in ({"group_size": 16}, {"grid": "five"}):
        one, two = (make_latent(make_stamp(tp_size=size, **quant)) for size in (1, 2))
        compare(one, two).proof()
    one, two = (
        make_latent(make_stamp(tp_size=size, scale_sync="local", grid="five")) for size in (1, 2)
    )
    refuse("the quantisers make other tensors or groups", one, two)


def unstamped(source, path):
    return dataclasses.replace(copy_of(source), form="plain", quantizer=None, path=Path(path))


def test_values_without_a_stamp(pseudo, latent):
    """What `save_pretrained` leaves of a pseudo-quantised folder."""
    bare = unstamped(pseudo, "bare")
    for stamped in (pseudo, latent):
        for pair in ((bare, stamped), (stamped, bare)):
            report = compare(*pair).proof()
            assert report["differing_codes"] == report["differing_values"] == 0
            assert report["ternary_tensors"] == 21
            (note,) = report["notes"]
            assert note.startswith("bare carries no quantiser stamp: its values, which lie on a g")
            assert str(stamped.path) in note
    row, column = bare.tensors[DOWN].nonzero()[7]
    bare.tensors[DOWN][row, column] *= -1
    refuse("1 codes differ: .*; bare carries no .* Name the model it was made from", bare, latent)


@pytest.mark.parametrize("model", ["llama", "minicpm"])
def test_latents_without_a_stamp(model):
    changes = {"model": MINICPM} if model == "minicpm" else {}
    latent = make_latent(make_stamp(tp_size=2, full_precision_last_layers=1), **changes)
    bare, pseudo = unstamped(latent, "bare"), make_pseudo(latent)
    sides = [pseudo] if model == "llama" else [pseudo, fold(pseudo)]
    for stamped in sides:
        for pair in ((bare, stamped), (stamped, bare)):
            report = compare(*pair).proof()
            assert report["ternary_tensors"] == 14
            (note,) = report["notes"]
            assert note.endswith(
                "weights were quantised with the stamp of pseudo for the comparison"
            )
    (note,) = compare(latent, bare).proof()["notes"]
    assert note.endswith("its weights were compared with the latents of latent")

    # In the last layer, which stays in full precision, and then in a quantised one.
    bits(bare.tensors[DOWN])[0, 0] += 1
    refuse(rf"1 values differ: {re.escape(DOWN)} \(1\); bare carries no", pseudo, bare)
    bare.tensors[UP][3] *= -1
    codes = int((pseudo.tensors[UP][3] != 0).sum())
    refuse(rf"bare: {codes} codes differ: .*Name the model it was made from", pseudo, bare)
    refuse(r"values differ: .*; bare carries no .* with the latents of", bare, latent)


def test_one_damaged_tensor_does_not_make_latents(pseudo, latent):
    bare = unstamped(pseudo, "bare")
    bare.tensors[QUERY] = latent.tensors[QUERY].clone()
    refuse(
        rf"{re.escape(QUERY)} is not on the ternary grid: .*; bare carries no .* values, which",
        bare,
        pseudo,
    )


def test_folded_latents_cannot_be_quantised():
    latent = make_latent(make_stamp(), MINICPM)
    bare = fold(unstamped(latent, "bare"))
    refuse("carries no quantiser stamp, and folding has rounded its latents", bare, latent)
    compare(fold(unstamped(make_pseudo(latent), "bare")), latent).proof()


def test_an_output_has_the_stamp_of_its_source(pseudo, latent, tmp_path, monkeypatch):
    for lost in (unstamped(pseudo, "bare"), unstamped(latent, "bare")):
        monkeypatch.setattr(verify_module, "open_source", lambda _, lost=lost: lost)
        with pytest.raises(CheckpointError, match=r"is not what was to .*no quantiser"):
            verify_written(tmp_path, pseudo, tmp_path / "out")


def test_the_other_numerics_are_recognised(latent):
    other = make_stamp(numerics="bf16_reciprocal")
    foreign = make_pseudo(dataclasses.replace(latent, quantizer=other))
    report = compare(foreign, latent)
    assert report.content["differing_codes"] > 0
    refuse(
        "numerics of the quantiser is bf16_reciprocal, there fp32; .* codes differ: .*; "
        "all codes and scales are equal when latent is quantised with the other numerics, "
        "bf16_reciprocal",
        foreign,
        latent,
    )
    # Not said where it is not so.
    row, column = foreign.tensors[DOWN].nonzero()[0]
    foreign.tensors[DOWN][row, column] *= -1
    assert "other numerics" not in compare(foreign, latent).problems[-1]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("stamped", [True, False])
def test_folding_is_repeated_for_the_comparison(grid, stamped):
    latent = make_latent(make_stamp(grid=grid) if stamped else None, MINICPM)
    folded = fold(latent)
    report = compare(folded, latent).proof()
    assert report["folded_for_comparison"]
    assert report["architecture"] == "llama"
    compare(latent, folded).proof()
    # Untied: the folded model has an output layer of its own.
    assert report["compared_tensors"] == len(latent.shapes()) + 1


def test_a_wrong_folding():
    latent = make_latent(make_stamp(), MINICPM)
    other = dataclasses.replace(latent, model=MINICPM.model_copy(update={"scale_emb": 11.0}))
    refuse("folding is .*'scale_emb': 11.0.* there .*'scale_emb': 12.0", fold(other), latent)


def test_other_architectures_are_not_compared_by_tensor(latent):
    wider = latent.model.model_copy(update={"num_layers": 2, "rotary_base": 5000})
    other = dataclasses.replace(latent, model=wider)
    refuse("num_layers is 2, there 3; rotary_base is 5000, there 10000", other, latent)
    assert "compared_tensors" not in compare(other, latent).content


def test_a_value_off_the_grid_is_placed(pseudo, latent):
    found = copy_of(pseudo)
    row = found.tensors[DOWN][17]
    row[3] = 1.0
    message = rf"{re.escape(DOWN)} is not on the ternary grid: row 17, group 0 of 96 inputs holds "
    message += "-.*, 0, .*, 1"
    refuse(message, found)
    report = compare(found, latent)
    assert len(report.problems) == 2


def test_many_unsound_tensors_make_one_short_line(pseudo, latent):
    found = copy_of(pseudo)
    for name in found.quantized_tensors():
        found.tensors[name][0, :2] = torch.tensor([0.25, 0.5])
    report = compare(found, latent)
    assert report.problems[3] == "18 more tensors like these"
    assert report.problems[4].startswith("not the model of latent: ")
    assert len(report.problems) == 5


def test_the_table_by_layer(pseudo, latent):
    found = copy_of(pseudo)
    found.tensors[NORM][:4] += 1
    assert compare(found, latent).render().splitlines()[1:] == [
        "| --- | --- | --- | --- | --- |",
        "| 0 | 9 | 0 | 0 | 0 |",
        "| 1 | 9 | 0 | 0 | 0 |",
        "| 2 | 9 | 0 | 0 | 4 |",
        "| outside | 3 | 0 | 0 | 0 |",
    ]
    assert compare(found).render() == ""
