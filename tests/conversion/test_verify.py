"""Every kind of damage to a folder or a checkpoint is found and named."""

from __future__ import annotations

import json
import pickle
import re
import shutil

import pytest
import torch
from helpers.runs import tensors as load_tensors
from helpers.trained_checkpoints import LAYERS, open_tensors
from safetensors.torch import load_file, save_file

from megatron_bitcpm.arch.tensors import LLAMA, TensorSpec, find_tensor, iter_specs
from megatron_bitcpm.conversion.inspect import inspect
from megatron_bitcpm.conversion.open import open_source
from megatron_bitcpm.conversion.verify import verify
from megatron_bitcpm.errors import CheckpointError

CASE = "tp1_untied"
DOWN = "model.layers.1.mlp.down_proj.weight"
NORM = "model.layers.2.post_attention_layernorm.weight"


def edit_tensors(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def edit_json(path, **changes):
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **changes}))


def refuse(message, folder, checkpoint=None):
    with pytest.raises(CheckpointError, match=message) as caught:
        verify(folder, checkpoint)
    assert "\n" not in str(caught.value)


def nonzero_place(w):
    row, column = w.nonzero()[3].tolist()
    return row, column


def test_a_flipped_sign_needs_the_checkpoint(damaged, trained):
    folder = damaged(CASE)

    def flip(tensors):
        place = nonzero_place(tensors[DOWN])
        tensors[DOWN][place] *= -1

    edit_tensors(folder, flip)
    verify(folder)
    refuse(rf"1 codes differ: {re.escape(DOWN)} \(1\)", folder, trained(CASE).directory)


def test_differences_are_counted_by_tensor(damaged, trained):
    folder = damaged(CASE)

    def spoil(tensors):
        tensors[DOWN][0] = 0
        tensors["model.layers.0.self_attn.q_proj.weight"][:2] *= 2
        tensors[NORM][5] += 1

    before = load_file(folder / "model.safetensors")[DOWN][0]
    edit_tensors(folder, spoil)
    codes = int(before.count_nonzero())
    refuse(
        rf"{codes} codes differ: {re.escape(DOWN)} \({codes}\); 2 scales differ: .*q_proj.weight "
        rf"\(2\); 1 values differ: {re.escape(NORM)} \(1\)",
        folder,
        trained(CASE).directory,
    )


def test_an_extra_magnitude(damaged):
    folder = damaged(CASE)

    def add(tensors):
        tensors[DOWN][7, 100] = 0.125

    edit_tensors(folder, add)
    refuse(
        rf"{re.escape(DOWN)} is not on the ternary grid: row 7, group 0 of 160 inputs .*0\.125",
        folder,
    )


def test_nan(damaged):
    folder = damaged(CASE)
    edit_tensors(folder, lambda tensors: tensors[NORM].fill_(float("nan")))
    refuse(f"{re.escape(NORM)} holds 48 NaN or infinite values", folder)


def test_a_changed_norm(damaged, trained):
    folder = damaged(CASE)
    edit_tensors(folder, lambda tensors: tensors[NORM].mul_(1.5))
    verify(folder)
    refuse(rf"48 values differ: {re.escape(NORM)} \(48\)", folder, trained(CASE).directory)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 4}, r"k_proj.weight is \[64, 48\], not \[128, 48\]"),
        ({"num_hidden_layers": 4}, "9 missing tensors: model.layers.3"),
        ({"num_hidden_layers": 2}, "9 unknown tensors: model.layers.2"),
        ({"tie_word_embeddings": True}, "ties the embeddings, but lm_head.weight differs"),
        ({"vocab_size": 200}, r"embed_tokens.weight is \[300, 48\], not \[200, 48\]"),
        ({"torch_dtype": "float32"}, "16 more tensors: stored as bfloat16, config.json says float"),
        ({"vocab_size": None}, r"vocab_size=\(absent\): must be a whole number"),
        ({"num_hidden_layers": 3.0}, "num_hidden_layers=3.0: must be a whole number"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps=0.0: .*config.json"),
    ],
)
def test_a_wrong_config(changes, message, damaged):
    folder = damaged(CASE)
    edit_json(folder / "config.json", **changes)
    refuse(message, folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_theta": 10000.0}, "rotary_base is 10000, there 5000"),
        ({"rms_norm_eps": 1e-6}, "layernorm_epsilon is 1e-06, there 1e-05"),
        ({"max_position_embeddings": 81}, "max_position_embeddings is 81, there 80"),
    ],
)
def test_a_config_of_another_model_needs_the_checkpoint(changes, message, damaged, trained):
    folder = damaged(CASE)
    edit_json(folder / "config.json", **changes)
    verify(folder)
    refuse(message, folder, trained(CASE).directory)


def test_a_config_that_says_nothing_else_about_the_forward(damaged, trained):
    folder = damaged(CASE)
    edit_json(folder / "config.json", initializer_range=0.5, use_cache=False, torch_dtype=None)
    verify(folder, trained(CASE).directory)


def test_a_report_without_a_checkpoint_says_so(exported):
    report = verify(exported("tp2_tensor"))
    assert report["checkpoint"] is None
    assert report["activation"] == "int8_per_token"


def test_another_activation_needs_the_checkpoint(damaged, trained):
    folder = damaged("tp2_tensor")
    path = folder / "bitcpm_quantizer.json"
    stamp = json.loads(path.read_text())["quantizer"]
    edit_json(path, quantizer={**stamp, "activation": "none"})
    assert verify(folder)["activation"] == "none"
    refuse(
        "activation of the quantiser is none, there int8_per_token",
        folder,
        trained("tp2_tensor").directory,
    )


def test_truncated_weights(damaged):
    folder = damaged(CASE)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refuse("model.safetensors: is truncated: .* bytes", folder)


def test_missing_and_stray_files(damaged):
    folder = damaged(CASE)
    shutil.copy(folder / "model.safetensors", folder / "old.safetensors")
    refuse("old.safetensors does not belong to it", folder)
    (folder / "old.safetensors").unlink()
    (folder / "model.safetensors").unlink()
    refuse("holds neither model.safetensors nor", folder)


def test_without_a_tokenizer_none_is_checked(damaged, exported, trained, tmp_path):
    folder, other = damaged(CASE), exported(CASE)
    assert verify(folder)["checked_tokenizer"] == str(folder)
    for path in folder.glob("tokenizer*"):
        path.unlink()
    assert verify(folder)["checked_tokenizer"] is None
    assert verify(folder, other)["checked_tokenizer"] is None
    assert verify(folder, trained(CASE).directory)["differing_codes"] == 0
    assert verify(other, folder)["checked_tokenizer"] == str(other)


def test_a_named_tokenizer_is_checked(damaged, trained, tmp_path):
    folder, tokenizer = damaged(CASE), trained(CASE).tokenizer
    for path in folder.glob("tokenizer*"):
        path.unlink()
    assert verify(folder, tokenizer=tokenizer)["checked_tokenizer"] == str(tokenizer)
    with pytest.raises(CheckpointError, match=r"tokenizer=.*absent: no such folder"):
        verify(folder, tokenizer=tmp_path / "absent")
    large = {"model": {"vocab": {f"t{i}": i for i in range(301)}}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(large))
    with pytest.raises(CheckpointError, match=r"has 301 ids, the model of .* 300\. Name another"):
        verify(folder, tokenizer=tmp_path)
    (folder / "tokenizer.json").write_text(json.dumps(large))
    refuse("has 301 ids, the model of .* 300. Put the tokenizer of the model in its place", folder)


@pytest.mark.parametrize("text", ["[]", "{", '{"model": 3}'])
@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "bitcpm_quantizer.json"])
def test_other_json(name, text, damaged):
    folder = damaged(CASE)
    (folder / name).write_text(text)
    refuse("=.*(config|tokenizer|quantizer)", folder)


def test_a_shortened_list_of_ternary_tensors(damaged, trained):
    folder = damaged(CASE)
    path = folder / "bitcpm_quantizer.json"
    groups = json.loads(path.read_text())["ternary_tensors"]
    del groups[DOWN]
    edit_json(path, ternary_tensors=groups)
    message = f"lists other tensors or groups than its quantizer makes: {re.escape(DOWN)}"
    refuse(message, folder)
    refuse(message, folder, trained(CASE).directory)


def test_a_latent_weight_hidden_from_the_list(damaged):
    """A tensor that is not ternary passes only if the list, or the quantiser, leaves it out."""
    folder = damaged(CASE)
    edit_tensors(folder, lambda tensors: tensors[DOWN].copy_(torch.randn(tensors[DOWN].shape)))
    path = folder / "bitcpm_quantizer.json"
    groups = json.loads(path.read_text())["ternary_tensors"]
    edit_json(path, ternary_tensors={k: v for k, v in groups.items() if k != DOWN})
    refuse(f"than its quantizer makes: {re.escape(DOWN)}", folder)


@pytest.mark.parametrize(
    ("stamp", "message"),
    [
        ({"group_size": 16}, "lists other tensors or groups .* and 16 more"),
        ({"full_precision_last_layers": 1}, "lists other tensors .*model.layers.2.* and 2 more"),
        ({"group_size": 7}, "does not fit the model: .*in_features"),
        ({"group_size": "x"}, "unreadable stamp"),
        ({"tensor_model_parallel_size": 0}, "unreadable stamp: tensor_model_parallel_size 0"),
        ({"numerics": "bf16"}, "numerics=bf16"),
        (None, "lists other tensors or groups .* and 16 more"),
    ],
)
def test_a_changed_quantizer(stamp, message, damaged):
    folder = damaged(CASE)
    path = folder / "bitcpm_quantizer.json"
    record = json.loads(path.read_text())
    edit_json(path, quantizer=None if stamp is None else {**record["quantizer"], **stamp})
    refuse(message, folder)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["tp2_local", "tp2_groups_filters"])
def test_the_list_is_recomputed_for_every_quantizer(case, exported):
    assert verify(exported(case))["ternary_tensors"] > 0


@pytest.mark.slow
def test_another_checkpoint(exported, trained):
    refuse("codes differ", exported(CASE), trained("tp2_bf16").directory)


def test_not_a_model(tmp_path):
    refuse("holds neither a Hugging Face model nor a Megatron checkpoint", tmp_path)
    refuse("no such file or folder", tmp_path / "absent")


# -- damaged checkpoints ---------------------------------------------------------------------------


@pytest.fixture
def checkpoint(trained, tmp_path):
    """A copy of a checkpoint, to damage."""
    source = open_tensors(trained(CASE).directory).folder
    return shutil.copytree(source, tmp_path / source.name)


def read_all(checkpoint):
    reader = open_tensors(checkpoint)
    return [reader.tensor(spec, layer) for spec, layer in iter_specs(LLAMA, range(LAYERS), False)]


def test_a_missing_file(checkpoint):
    with pytest.raises(CheckpointError, match=r"tensor \S+ in __0_\d.distcp.* cannot be read"):
        for path in checkpoint.glob("*.distcp"):
            path.unlink()
        read_all(checkpoint)


def test_a_truncated_file(checkpoint):
    for path in checkpoint.glob("*.distcp"):
        path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(CheckpointError, match=r"tensor \S+ in __0_\d.distcp.* cannot be read"):
        read_all(checkpoint)


@pytest.mark.parametrize("size", [0, 100, 3000])
def test_a_truncated_index(checkpoint, size):
    path = checkpoint / ".metadata"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"\.metadata: .*damaged"):
        open_tensors(checkpoint)


class _Attack:
    def __reduce__(self):
        return (print, ("code of the file was run",))


def test_an_index_cannot_run_code(checkpoint, capsys):
    (checkpoint / ".metadata").write_bytes(pickle.dumps(_Attack()))
    with pytest.raises(CheckpointError, match=r"builtins\.print, which no checkpoint needs"):
        open_tensors(checkpoint)
    assert "code" not in capsys.readouterr().out


def test_absent_names(checkpoint):
    reader = open_tensors(checkpoint)
    with pytest.raises(CheckpointError, match=r"has no tensor decoder\.layers\.nothing"):
        reader.tensor(TensorSpec("norm", "nothing", ()), 0)
    # Optimizer states are there, and are not tensors of the model.
    (state,) = (
        name for name in load_tensors(checkpoint) if name.endswith("exp_avg.output_layer.weight")
    )
    with pytest.raises(CheckpointError, match=f"has no tensor {re.escape(state)}"):
        reader.tensor(TensorSpec("output", state, (), in_layer=False), None)
    fc2 = find_tensor(DOWN).spec
    with pytest.raises(CheckpointError, match=r"mlp.linear_fc2.weight has 3 layers, none of num"):
        reader.tensor(fc2, 3)


def test_a_layer_is_a_slice_of_the_stack(trained):
    reader = open_tensors(trained("tp2_tied_fp32").directory)
    stacked = load_tensors(reader.folder)["decoder.layers.mlp.linear_fc1.weight"]
    assert stacked.dtype is torch.float32
    spec = find_tensor("model.layers.0.mlp.up_proj.weight").spec
    for layer in range(LAYERS):
        assert torch.equal(reader.tensor(spec, layer), stacked[layer])


def test_a_tensor_has_one_scale(damaged, trained):
    """A row of its own scale makes it not ternary; another scale needs the checkpoint."""
    folder, checkpoint = damaged("tp2_tensor"), trained("tp2_tensor").directory
    verify(folder, checkpoint)

    def double(tensors):
        tensors[DOWN] *= 2

    edit_tensors(folder, double)
    verify(folder)
    refuse(rf"1 scales differ: {re.escape(DOWN)} \(1\)", folder, checkpoint)

    def double_a_row(tensors):
        tensors[DOWN][7] *= 2

    edit_tensors(folder, double_a_row)
    refuse(
        rf"{re.escape(DOWN)} is not on the ternary grid: the one group of 7680 weights holds ",
        folder,
    )


def test_another_grid_of_the_same_values_needs_the_checkpoint(damaged, trained):
    """One magnitude and 0 fit into two grids; the values alone do not tell which one it was."""
    folder = damaged(CASE)
    path = folder / "bitcpm_quantizer.json"
    stamp = json.loads(path.read_text())["quantizer"]
    edit_json(path, quantizer={**stamp, "grid": "five"})
    verify(folder)
    refuse("grid of the quantiser is five, there ternary", folder, trained(CASE).directory)
    edit_json(path, quantizer={**stamp, "grid": "int_sym4"})
    refuse("q_proj.weight is not on the int_sym4 grid: row 0, group 0 of 48 inputs holds ", folder)


def test_a_name_that_no_system_has_is_one_line():
    for name in ("x" * 5000, "a\0b"):
        for read in (open_source, inspect):
            with pytest.raises(CheckpointError, match=r"^model=.*\. Name a folder") as caught:
                read(name)
            assert "\n" not in str(caught.value)
