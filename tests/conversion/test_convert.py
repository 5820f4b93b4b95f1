"""`convert`: what it refuses, and that nothing unproven gets a name."""

from __future__ import annotations

import dataclasses
import re
from itertools import product, takewhile
from pathlib import Path

import pytest
import torch
from helpers.released_models import TINY, make_tensors, write_hf_folder

from megatron_bitcpm.conversion import convert as convert_module
from megatron_bitcpm.conversion.convert import convert
from megatron_bitcpm.conversion.options import (
    INPUTS,
    OUTPUTS,
    REFUSALS,
    ConvertOptions,
    describe_conversions,
)
from megatron_bitcpm.errors import BitcpmError, CheckpointError

ROOT = Path(__file__).parents[2]
QUANTIZER = {"quant_type": "ternary", "group_size": -1}


class Models(dict):
    """Folders by name, each written when it is first asked for."""

    def __init__(self, folder):
        self.folder = folder

    def __missing__(self, name):
        path = self[name] = self.folder / name
        if name in ("plain", "minicpm"):
            shape = TINY["8B" if name == "minicpm" else "1B"]
            write_hf_folder(path, shape, make_tensors(shape))
        elif name == "folded":
            convert(self["minicpm"], path, form="pseudo", architecture="llama", **QUANTIZER)
        elif name == "torch_dist":
            convert(self["plain"], path, format=name)
        else:
            start, form = ("minicpm", name[8:]) if name.startswith("minicpm") else ("plain", name)
            convert(self[start], path, form=form, **QUANTIZER)
        return path


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return Models(tmp_path_factory.mktemp("models"))


EFFECT = "has no effect on format"
OTHER = "Leave it out, or use another format."
SIZE = "must be the size of a file, for example 5GB or 500MB. Correct the option."
DIST, LEGACY = {"format": "torch_dist"}, {"format": "legacy"}
PLAIN, LATENT, PSEUDO = {"form": "plain"}, {"form": "latent"}, {"form": "pseudo"}
VPP = {"pipeline_parallel_size": 2, "virtual_pipeline_parallel_size": 1}
REFUSED = [
    ("plain", {"format": "gguf"}, "format='gguf': must be 'hf', 'torch_dist' or 'legacy'."),
    ("plain", {"form": "packed"}, "form='packed': must be 'latent', 'pseudo' or 'plain'."),
    ("plain", {"to": "gguf"}, "to='gguf': must be 'torch_dist', 'legacy', 'plain', 'latent' or"),
    ("plain", {"to": "plain", **PLAIN}, "to=plain: is the old name of format and form. Use only"),
    ("plain", {"to": "plain", **LEGACY}, "to=plain: is the old name of format and form."),
    ("plain", {"formats": "hf"}, "formats is not a known field. Correct the option."),
    ("plain", {"tensor_parallel_size": 2}, f"tensor_parallel_size=2: {EFFECT} hf. {OTHER}"),
    ("plain", {"pipeline_parallel_size": 2}, f"pipeline_parallel_size=2: {EFFECT} hf. {OTHER}"),
    (
        "plain",
        {"virtual_pipeline_parallel_size": 2},
        f"virtual_pipeline_parallel_size=2: {EFFECT} hf. {OTHER}",
    ),
    (
        "plain",
        {"transformer_impl": "transformer_engine"},
        f"transformer_impl=transformer_engine: {EFFECT} hf. {OTHER}",
    ),
    (
        "plain",
        {**DIST, "transformer_impl": "transformer_engine"},
        f"transformer_impl=transformer_engine: {EFFECT} torch_dist. {OTHER}",
    ),
    ("plain", {**LEGACY, **VPP}, "virtual_pipeline_parallel_size=1: must be greater than or equal"),
    ("plain", {**LEGACY, "max_shard_size": "1GB"}, f"max_shard_size=1000000000: {EFFECT} legacy."),
    ("plain", {**DIST, "weights": "bin"}, f"weights=bin: {EFFECT} torch_dist. {OTHER}"),
    ("plain", {**DIST, "force": True}, f"force=True: {EFFECT} torch_dist. {OTHER}"),
    ("minicpm", {**DIST, "architecture": "llama"}, "architecture=llama: a Megatron checkpoint"),
    ("minicpm", {**LEGACY, "architecture": "minicpm"}, "architecture=minicpm: a Megatron checkp"),
    ("plain", {**PLAIN, "force": True}, "force=True: has no effect: only latents whose"),
    ("latent", {"force": True}, "force=True: has no effect: only latents whose"),
    ("pseudo", {"force": True}, "force=True: has no effect: only latents whose"),
    ("plain", {"weights": "pickle"}, "weights='pickle': must be 'safetensors' or 'bin'."),
    ("plain", PSEUDO, "form=pseudo: the input does not say which quantiser trained it"),
    ("plain", LATENT, "Name it with --quant-type and --group-size, or use --form plain."),
    ("plain", {"quant_type": "ternary"}, "group_size=None: must be named with the other"),
    ("plain", {"group_size": 64}, "quant_type=None: must be named with the other"),
    (
        "plain",
        {**QUANTIZER, "quant_type": "septenary"},
        "quant_type='septenary': must be 'ternary'",
    ),
    ("plain", {**QUANTIZER, "group_size": "row"}, "group_size='row': must be a whole number"),
    ("plain", {**QUANTIZER, "eps": -1.0}, "eps=-1.0: the smallest scale must be a positive"),
    ("plain", {**QUANTIZER, "eps": 1e39}, "eps=1e+39: the smallest scale must be a positive"),
    ("plain", {**QUANTIZER, "numerics": "fp8"}, "numerics='fp8': must be 'fp32' or 'bf16_recip"),
    (
        "plain",
        {**QUANTIZER, "quant_type": "five", "numerics": "bf16_reciprocal"},
        "numerics=bf16_reciprocal: exists for the ternary grid, not for five. Use numerics fp32.",
    ),
    ("plain", {**PLAIN, "group_size": 64}, "group_size=64: a quantiser has no effect on weights"),
    ("plain", {**LEGACY, "numerics": "fp32"}, "numerics=fp32: a quantiser has no effect on"),
    ("plain", {**LEGACY, **PSEUDO}, "form=pseudo: a Megatron checkpoint keeps the form of its"),
    ("latent", {**DIST, **PSEUDO}, "form=pseudo: a Megatron checkpoint keeps the form of its"),
    ("latent", {"group_size": 64}, "group_size=64: the model was trained with -1, says its stamp"),
    (
        "latent",
        {**LEGACY, "numerics": "bf16_reciprocal"},
        "numerics=bf16_reciprocal: the model was trained with fp32, says its stamp.",
    ),
    (
        "plain",
        {"architecture": "llama"},
        "architecture=llama: has an effect on a MiniCPM only, and the input is a Llama.",
    ),
    (
        "latent",
        {**LATENT, "architecture": "minicpm"},
        "architecture=minicpm: has an effect on a MiniCPM only, and the input is a Llama.",
    ),
    ("minicpm", {"architecture": "qwen"}, "architecture='qwen': must be 'llama' or 'minicpm'."),
    (
        "minicpm",
        {**LATENT, "architecture": "llama", **QUANTIZER},
        "architecture=llama: latent weights are not folded, as training would continue",
    ),
    (
        "folded",
        {"architecture": "minicpm"},
        "architecture=minicpm: the input is a folded MiniCPM, and folding cannot be undone.",
    ),
    ("plain", {**LEGACY, "tokenizer": "elsewhere"}, "tokenizer=elsewhere: has no effect: "),
    (
        "plain",
        {**DIST, "tensor_parallel_size": 3},
        "tensor_parallel_size=3: does not divide num_attention",
    ),
]


@pytest.mark.parametrize(("source", "options", "message"), REFUSED)
def test_refusals(source, options, message, models, tmp_path):
    with pytest.raises(BitcpmError, match=re.escape(message)) as error:
        convert(models[source], tmp_path / "out", **options)
    assert "\n" not in str(error.value)
    assert str(error.value).endswith(".")
    assert list(tmp_path.iterdir()) == []


TABLE_INPUTS = {
    "latent": ("minicpm-latent", {}),
    "latent, --architecture llama": ("minicpm-latent", {"architecture": "llama"}),
    "pseudo": ("minicpm-pseudo", {}),
    "plain": ("minicpm", {}),
    "plain, --quant-type": ("minicpm", QUANTIZER),
}
TABLE_OUTPUTS = {
    "hf latent": [LATENT],
    "hf pseudo": [PSEUDO],
    "hf plain": [PLAIN],
    "Megatron": [DIST, LEGACY],
}


class TestTable:
    """`REFUSALS`, which docs/conversion.md shows, is what happens."""

    def test_it_has_all_inputs_and_outputs(self):
        assert tuple(TABLE_INPUTS) == INPUTS
        assert tuple(TABLE_OUTPUTS) == OUTPUTS
        assert {pair for pair in REFUSALS if pair not in product(INPUTS, OUTPUTS)} == set()

    @pytest.mark.parametrize("pair", list(product(INPUTS, OUTPUTS)), ids=" to ".join)
    def test_each_pair(self, pair, models, tmp_path):
        name, settings = TABLE_INPUTS[pair[0]]
        for wanted in TABLE_OUTPUTS[pair[1]]:
            options = {**wanted, **settings}
            if pair not in REFUSALS:
                report = convert(models[name], tmp_path / wanted.get("format", "hf"), **options)
                assert {key: report[key] for key in wanted} == wanted
                assert report["verify"]["differing_values"] == 0
                continue
            option, rule, fix = REFUSALS[pair]
            message = f"{option}={options[option]}: {rule} ({models[name]}). {fix}."
            with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
                convert(models[name], tmp_path / "out", **options)
            assert list(tmp_path.iterdir()) == []

    def test_the_documented_table_is_this_one(self):
        text = (ROOT / "docs" / "conversion.md").read_text(encoding="utf-8")
        below = text.split("<!-- table: conversions -->\n")[1]
        shown = takewhile(lambda line: line.startswith("|"), below.splitlines())
        assert "\n".join(shown) + "\n" == describe_conversions()


@pytest.mark.parametrize("to", ["torch_dist", "legacy", "plain", "latent", "pseudo"])
def test_the_old_option_still_works_and_names_the_new_ones(to, models, tmp_path):
    source = "latent" if to in ("latent", "pseudo") else "plain"
    report = convert(models[source], tmp_path / "out", to=to)
    new = f"--format {to}" if to in ("torch_dist", "legacy") else f"--form {to}"
    assert report["warnings"] == [f"--to {to} is now {new}; --to is removed in the next release"]
    assert to in (report["format"], report["form"])
    assert report["format"] in ("hf", to)


def test_the_form_that_nobody_named(models, tmp_path):
    """Pseudo where a quantiser is known, otherwise that of the input; Megatron keeps it."""
    for number, (source, options, form) in enumerate(
        [
            ("plain", {}, "plain"),
            ("plain", QUANTIZER, "pseudo"),
            ("latent", {}, "pseudo"),
            ("pseudo", {}, "pseudo"),
            ("latent", DIST, "latent"),
        ]
    ):
        report = convert(models[source], tmp_path / str(number), **options)
        assert report["form"] == form, (source, options)
        assert report["warnings"] == []


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("tensor_parallel_size", "2", "='2': must be a valid integer. Correct the option."),
        ("tensor_parallel_size", 2.0, "=2.0: must be a valid integer."),
        ("pipeline_parallel_size", True, "=True: must be a valid integer."),
        ("pipeline_parallel_size", 0, "=0: must be greater than or equal to 1."),
        ("eps", "1e-5", "='1e-5': must be a valid number."),
        ("eps", float("nan"), "=nan: must be a finite number."),
        ("group_size", True, "=True: must be a whole number of at least 1, -1 for the whole row"),
        ("group_size", 64.5, "=64.5: must be a whole number of at least 1, -1 for the whole row"),
        ("quant_type", [], "=[]: must be 'ternary', 'asym4'"),
        ("max_shard_size", True, f"=True: {SIZE}"),
        ("overwrite", "no", "='no': must be a valid boolean."),
        ("format", None, "=None: must be 'hf', 'torch_dist' or 'legacy'."),
        ("to", 3, "=3: must be 'torch_dist', 'legacy', 'plain', 'latent' or 'pseudo'."),
        ("input", None, "=None: must be a path."),
        ("output", None, "=None: must be a path."),
        ("output", "x\0", r"='x\x00': must be a path. Correct the option."),
        ("input", "", "='': must be a path."),
        ("tokenizer", "", "='': must be a path."),
        ("tokenizer", 3, "=3: must be a path."),
    ],
)
def test_values_of_wrong_types(name, value, message, tmp_path):
    arguments = {"input": "absent", "output": tmp_path / "out", name: value}
    with pytest.raises(CheckpointError, match=f"^{re.escape(name + message)}") as error:
        convert(**arguments)
    assert "\n" not in str(error.value)


def test_settings_equal_to_the_stamp_are_no_mistake(models, tmp_path):
    report = convert(models["latent"], tmp_path / "out", form="pseudo", group_size="-1", eps=1e-5)
    assert (report["input_form"], report["input_kind"]) == ("latent", "hf")
    assert (report["form"], report["format"]) == ("pseudo", "hf")


def test_input_and_output_may_not_contain_each_other(models, tmp_path):
    run = models["torch_dist"]
    with pytest.raises(CheckpointError, match=r"output=.*: is the input. Name another folder"):
        convert(run, run, form="plain", overwrite=True)
    with pytest.raises(CheckpointError, match=r"output=.*: lies in the input"):
        convert(run, run / "hf", form="plain")
    with pytest.raises(CheckpointError, match=r"output=.*: holds the input"):
        convert(run / "release", run, form="plain", overwrite=True)
    (tmp_path / "link").symlink_to(run)
    with pytest.raises(CheckpointError, match=r"output=.*link: is the input"):
        convert(run, tmp_path / "link", form="plain", overwrite=True)
    # An equal beginning of the name is no containment.
    convert(run, Path(f"{run}-plain"), form="plain")


@pytest.mark.parametrize("format", ["torch_dist", "hf"])
def test_an_existing_output_is_replaced_only_on_demand(format, models, tmp_path):
    output = tmp_path / "out"
    convert(models["plain"], output, format=format)
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    with pytest.raises(CheckpointError, match=r"output=.*exists"):
        convert(models["plain"], output, format=format)
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before
    convert(models["plain"], output, format=format, overwrite=True)
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} != before


class TestProof:
    """What is written is compared with the input before it gets its name."""

    @pytest.fixture
    def lying(self, models, monkeypatch):
        """The input answers otherwise each time it is read."""
        wanted = convert_module.open_source(models["plain"])
        reads = {}

        class Liar(type(wanted)):
            def tensor(self, name):
                tensor = super().tensor(name)
                reads[name] = reads.get(name, 0) + 1
                if name == "model.layers.2.mlp.up_proj.weight":
                    tensor = tensor.clone()
                    tensor[3, 5] = reads[name]
                return tensor

        fields = {f.name: getattr(wanted, f.name) for f in dataclasses.fields(wanted) if f.init}
        opened = convert_module.open_source
        monkeypatch.setattr(
            convert_module,
            "open_source",
            lambda path, *rest: Liar(**fields) if path == models["plain"] else opened(path, *rest),
        )

    @pytest.mark.parametrize("format", ["torch_dist", "legacy", "hf"])
    def test_a_difference_leaves_nothing_behind(self, format, lying, models, tmp_path):
        with pytest.raises(CheckpointError, match=r"model\.layers\.2\.mlp\.up_proj\.weight"):
            convert(models["plain"], tmp_path / "out", format=format)
        assert list(tmp_path.iterdir()) == []


def test_report(models, tmp_path, capsys):
    report = convert(models["plain"], tmp_path / "out", format="torch_dist", tensor_parallel_size=2)
    assert capsys.readouterr().out == ""
    assert report["tensors"] == 4 * 9 + 3
    assert report["layout"] == {"tp": 2, "pp": 1, "vpp": 1}
    assert report["padding_rows"] == 56  # 200 ids, multiples of 128
    assert report["verify"]["differing_values"] == 0
    weights = sum(t.numel() * t.element_size() for t in make_tensors(TINY["1B"]).values())
    assert report["bytes"] >= weights
    assert report["write_seconds"] >= 0
    assert report["verify_seconds"] >= 0


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5 * 10**9),
        ("500 mb", 5 * 10**8),
        ("2GiB", 2**31),
        (7, 7),
        ("1.5KB", 1500),
        ("1 TB", 10**12),
    ],
)
def test_sizes(text, size):
    assert ConvertOptions.read(input="a", output="b", max_shard_size=text).max_shard_size == size


def test_the_largest_file_without_an_option():
    assert ConvertOptions.read(input="a", output="b").max_shard_size == 5 * 10**9


@pytest.mark.parametrize(
    "text", ["0", "-1GB", "GB", "5 GO", "1e3", "nan", "", 0, "0.4", "9" * 400 + "GB", 2**63]
)
def test_no_sizes(text):
    with pytest.raises(CheckpointError, match=f"^max_shard_size=.*: {SIZE}$"):
        ConvertOptions.read(input="a", output="b", max_shard_size=text)


def test_a_group_of_the_pseudo_folder_has_one_magnitude(models):
    """By hand, on one row: the folder of `QUANTIZER` is ternary, the plain one is not."""
    from safetensors.torch import load_file

    name = "model.layers.1.mlp.gate_proj.weight"
    pseudo = load_file(models["pseudo"] / "model.safetensors")[name]
    plain = load_file(models["plain"] / "model.safetensors")[name]
    assert len(pseudo[0].abs().unique()) == 2
    assert len(plain[0].abs().unique()) > 20
    assert torch.equal(pseudo.sign()[pseudo != 0], plain.sign()[pseudo != 0])
