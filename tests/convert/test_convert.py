"""`convert`: which options it refuses, and that nothing unproven gets a name."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from released_models import TINY, make_tensors, write_hf_folder

from megatron_bitcpm.conversion import convert as convert_module
from megatron_bitcpm.conversion.convert import convert, parse_size
from megatron_bitcpm.conversion.quantizer_settings import parse_quantizer_settings
from megatron_bitcpm.errors import BitcpmError, CheckpointError

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
            convert(self["minicpm"], path, "pseudo", architecture="llama", **QUANTIZER)
        elif name == "torch_dist":
            convert(self["plain"], path, name)
        else:
            convert(self["plain"], path, name, **QUANTIZER)
        return path


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return Models(tmp_path_factory.mktemp("models"))


REFUSED = [
    ("plain", "gguf", {}, "to=gguf: is no format. Use torch_dist, legacy, plain, latent, pseudo."),
    (
        "plain",
        "plain",
        {"tensor_parallel_size": 2},
        "tensor_parallel_size=2: has no effect on to=plain. Leave it out, or use",
    ),
    (
        "plain",
        "plain",
        {"virtual_pipeline_parallel_size": 2},
        "virtual_pipeline_parallel_size=2: has no effect on to=plain.",
    ),
    ("plain", "plain", {"transformer_impl": "local"}, "transformer_impl=local: has no effect on"),
    ("plain", "torch_dist", {"transformer_impl": "local"}, "transformer_impl=local: has no effect"),
    (
        "plain",
        "legacy",
        {"pipeline_parallel_size": 2, "virtual_pipeline_parallel_size": 1},
        "virtual_pipeline_parallel_size=1: is no interleaving. Leave it out.",
    ),
    (
        "plain",
        "legacy",
        {"max_shard_size": "1GB"},
        "max_shard_size=1GB: has no effect on to=legacy. Leave it out",
    ),
    ("plain", "torch_dist", {"weights": "bin"}, "weights=bin: has no effect on to=torch_dist"),
    ("plain", "torch_dist", {"force": True}, "force=True: has no effect on to=torch_dist"),
    ("minicpm", "torch_dist", {"architecture": "llama"}, "architecture=llama: has no effect"),
    ("plain", "plain", {"max_shard_size": "5 GO"}, "max_shard_size=5 GO: is no size of a file."),
    ("plain", "plain", {"max_shard_size": "9" * 400 + "GB"}, "9: is no size of a file."),
    ("plain", "plain", {"force": True}, "force=True: has no effect: only latents whose"),
    ("latent", "pseudo", {"force": True}, "force=True: has no effect: only latents whose"),
    ("pseudo", "pseudo", {"force": True}, "force=True: has no effect: only latents whose"),
    ("plain", "plain", {"weights": "pickle"}, "weights=pickle: is unknown. Use safetensors or bin"),
    ("plain", "pseudo", {}, "the input does not say which quantiser trained it"),
    ("plain", "latent", {}, "Name it with --quant-type and --group-size, or use --to plain."),
    ("latent", "plain", {}, "to=plain: the input is a latent model"),
    ("pseudo", "plain", {}, "to=plain: the input is a pseudo model"),
    ("pseudo", "latent", {}, "to=latent: a pseudo-quantised model has lost its latent weights"),
    ("plain", "pseudo", {"quant_type": "ternary"}, "group_size=None: must be named with the other"),
    ("plain", "pseudo", {"group_size": 64}, "quant_type=None: must be named with the other"),
    ("plain", "pseudo", {**QUANTIZER, "quant_type": "septenary"}, "quant_type=septenary: "),
    ("plain", "pseudo", {**QUANTIZER, "group_size": "row"}, "group_size=row: "),
    ("plain", "pseudo", {**QUANTIZER, "eps": -1.0}, "eps=-1.0: "),
    ("plain", "pseudo", {**QUANTIZER, "numerics": "fp8"}, "numerics=fp8: is unknown. Use fp32 or"),
    (
        "plain",
        "pseudo",
        {**QUANTIZER, "quant_type": "five", "numerics": "bf16_reciprocal"},
        "numerics=bf16_reciprocal: exists for the ternary grid, not for five.",
    ),
    ("plain", "plain", QUANTIZER, "quant_type=ternary: has no effect on to=plain"),
    ("plain", "legacy", QUANTIZER, "quant_type=ternary: has no effect on to=legacy"),
    ("latent", "pseudo", {"group_size": 64}, "group_size=64: the model was trained with -1, says"),
    (
        "latent",
        "legacy",
        {"numerics": "bf16_reciprocal"},
        "numerics=bf16_reciprocal: the model was trained with fp32, says its stamp.",
    ),
    (
        "plain",
        "plain",
        {"architecture": "llama"},
        "architecture=llama: has an effect on a MiniCPM only, and the input is a Llama.",
    ),
    ("minicpm", "plain", {"architecture": "qwen"}, "architecture=qwen: is unknown."),
    (
        "minicpm",
        "latent",
        {"architecture": "llama", **QUANTIZER},
        "architecture=llama: latent weights are not folded",
    ),
    (
        "folded",
        "pseudo",
        {"architecture": "minicpm"},
        "architecture=minicpm: the input is a folded MiniCPM, and folding cannot be undone.",
    ),
    ("plain", "legacy", {"tokenizer": "elsewhere"}, "tokenizer=elsewhere: has no effect: "),
    ("plain", "torch_dist", {"tensor_parallel_size": 3}, "=3: does not divide num_attention"),
]


@pytest.mark.parametrize(("source", "to", "settings", "message"), REFUSED)
def test_refusals(source, to, settings, message, models, tmp_path):
    with pytest.raises(BitcpmError, match=re.escape(message)) as error:
        convert(models[source], tmp_path / "out", to, **settings)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("tensor_parallel_size", "2", "='2': is of type str, takes int or None. Change it."),
        ("tensor_parallel_size", 2.0, "=2.0: is of type float, takes int or None."),
        ("pipeline_parallel_size", True, "=True: is of type bool, takes int or None."),
        ("eps", "1e-5", "='1e-5': is of type str, takes float or None."),
        ("group_size", True, "=True: is of type bool, takes int or str or None."),
        ("quant_type", [], "=[]: is of type list, takes str or None."),
        ("max_shard_size", True, "=True: is of type bool, takes int or str or None."),
        ("overwrite", "no", "='no': is of type str, takes bool."),
        ("to", None, "=None: is of type NoneType, takes str."),
        ("input", None, "=None: is of type NoneType, takes str or Path."),
        ("output", None, "=None: is of type NoneType, takes str or Path."),
        ("output", "x\0", r"='x\x00': holds a null character, which no path can. Change it."),
        ("input", "", "='': is no path. Change it."),
        ("tokenizer", "", "='': is no path. Change it."),
    ],
)
def test_values_of_wrong_types(name, value, message, tmp_path):
    arguments = {"input": "absent", "output": tmp_path / "out", "to": "torch_dist", name: value}
    with pytest.raises(CheckpointError, match=f"^{re.escape(name + message)}") as error:
        convert(**arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("setting", [{"group_size": True}, {"group_size": 64.5}, {"eps": "1e-5"}])
def test_quantizer_settings_of_wrong_types(setting):
    settings = {"quant_type": "ternary", "group_size": -1, "numerics": None, "eps": None}
    with pytest.raises(CheckpointError, match=f"^{next(iter(setting))}="):
        parse_quantizer_settings(**settings | setting)


def test_settings_equal_to_the_stamp_are_no_mistake(models, tmp_path):
    report = convert(models["latent"], tmp_path / "out", "pseudo", group_size="-1", eps=1e-5)
    assert (report["input_form"], report["to"], report["input_kind"]) == ("latent", "pseudo", "hf")


def test_input_and_output_may_not_contain_each_other(models, tmp_path):
    run = models["torch_dist"]
    with pytest.raises(CheckpointError, match=r"output=.*: is the input. Name another folder"):
        convert(run, run, "plain", overwrite=True)
    with pytest.raises(CheckpointError, match=r"output=.*: lies in the input"):
        convert(run, run / "hf", "plain")
    with pytest.raises(CheckpointError, match=r"output=.*: holds the input"):
        convert(run / "release", run, "plain", overwrite=True)
    (tmp_path / "link").symlink_to(run)
    with pytest.raises(CheckpointError, match=r"output=.*link: is the input"):
        convert(run, tmp_path / "link", "plain", overwrite=True)
    # An equal beginning of the name is no containment.
    convert(run, Path(f"{run}-plain"), "plain")


@pytest.mark.parametrize("to", ["torch_dist", "plain"])
def test_an_existing_output_is_replaced_only_on_demand(to, models, tmp_path):
    output = tmp_path / "out"
    convert(models["plain"], output, to)
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    with pytest.raises(CheckpointError, match=r"output=.*exists"):
        convert(models["plain"], output, to)
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before
    convert(models["plain"], output, to, overwrite=True)
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

    @pytest.mark.parametrize("to", ["torch_dist", "legacy", "plain"])
    def test_a_difference_leaves_nothing_behind(self, to, lying, models, tmp_path):
        with pytest.raises(CheckpointError, match=r"model\.layers\.2\.mlp\.up_proj\.weight"):
            convert(models["plain"], tmp_path / "out", to)
        assert list(tmp_path.iterdir()) == []


def test_report(models, tmp_path, capsys):
    report = convert(models["plain"], tmp_path / "out", "torch_dist", tensor_parallel_size=2)
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
        (None, 5 * 10**9),
        ("5GB", 5 * 10**9),
        ("500 mb", 5 * 10**8),
        ("2GiB", 2**31),
        (7, 7),
        ("1.5KB", 1500),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["0", "-1GB", "GB", "1 TB", "nan", "", 0])
def test_no_sizes(text):
    with pytest.raises(CheckpointError, match=r"max_shard_size=.*: is no size"):
        parse_size(text)


def test_a_group_of_the_pseudo_folder_has_one_magnitude(models):
    """By hand, on one row: the folder of `QUANTIZER` is ternary, the plain one is not."""
    from safetensors.torch import load_file

    name = "model.layers.1.mlp.gate_proj.weight"
    pseudo = load_file(models["pseudo"] / "model.safetensors")[name]
    plain = load_file(models["plain"] / "model.safetensors")[name]
    assert len(pseudo[0].abs().unique()) == 2
    assert len(plain[0].abs().unique()) > 20
    assert torch.equal(pseudo.sign()[pseudo != 0], plain.sign()[pseudo != 0])
