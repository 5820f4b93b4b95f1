"""Hugging Face folders as sources: every layout of the files, and every way to be wrong."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from helpers.hand_made_folders import CONFIG, EMBEDDING, OUTPUT, make_tensors, refused, write
from helpers.tiny_folders import make_folder
from safetensors.torch import load_file, save_file

from megatron_bitcpm.conversion.hf.source import open_hf, open_weights
from megatron_bitcpm.conversion.hf.tensor_files import open_tensor_file
from megatron_bitcpm.conversion.open import detect_kind, open_source
from megatron_bitcpm.errors import CheckpointError


def edit_index(folder, change):
    path = next(folder.glob("*.index.json"))
    content = json.loads(path.read_text())
    change(content["weight_map"])
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("shards", [1, 3])
def test_every_tensor_of_the_four_layouts(kind, shards, tmp_path):
    tensors = make_tensors()
    source = open_source(write(tmp_path / "m", tensors, kind, shards))
    assert (source.kind, source.form, source.vocab_size) == ("hf", "plain", 50)
    assert source.shapes().keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert source.dtype(name) == torch.bfloat16
        assert torch.equal(source.tensor(name), tensor)
    assert open_source(tmp_path / "m" / "config.json").shapes() == source.shapes()


def test_a_folder_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(**{k: v for k, v in CONFIG.items() if k != "model_type"})
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    source = open_source(tmp_path)
    assert len({file.path for file in source.files.values()}) > 3
    state = model.state_dict()
    assert source.shapes().keys() == state.keys()
    assert all(torch.equal(source.tensor(n), state[n]) for n in state)


def test_old_bin_files_and_mixed_types(tmp_path):
    tensors = make_tensors()
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    folder = write(tmp_path / "m", tensors, "bin")
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    source = open_hf(folder)
    assert source.dtype("model.norm.weight") == torch.float32
    assert all(torch.equal(source.tensor(n), t) for n, t in tensors.items())


def test_parameters_and_aliases_in_a_bin(tmp_path):
    tensors = make_tensors()
    tensors[OUTPUT] = tensors[EMBEDDING]  # one storage, two names
    saved = {n: torch.nn.Parameter(t) for n, t in tensors.items()}
    saved[OUTPUT] = saved[EMBEDDING]
    folder = write(tmp_path / "m", saved, "bin", config={**CONFIG, "tie_word_embeddings": True})
    source = open_hf(folder)
    assert OUTPUT not in source.shapes()
    assert not source.tensor(EMBEDDING).requires_grad


def test_symbolic_links_and_computed_buffers(tmp_path):
    tensors = make_tensors()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    tensors["model.rotary_emb.inv_freq"] = torch.ones(8)
    real = write(tmp_path / "real", tensors, shards=2)
    (tmp_path / "link").mkdir()
    for path in real.iterdir():
        (tmp_path / "link" / path.name).symlink_to(path)
    assert open_source(tmp_path / "link").shapes().keys() == make_tensors().keys()


def test_safetensors_count_where_both_kinds_are(tmp_path):
    folder = write(tmp_path / "m", make_tensors())
    torch.save({"other": torch.ones(1)}, folder / "pytorch_model.bin")
    assert torch.equal(open_hf(folder).tensor(EMBEDDING), make_tensors()[EMBEDDING])


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_tensors_are_views_of_the_file(kind, tmp_path):
    big = {"w": torch.ones(16_000_000)}  # 64 MB
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.bin")
    save_file(big, path) if kind == "safetensors" else torch.save(big, path)
    del big

    def anonymous_mb():
        with open("/proc/self/smaps_rollup") as lines:
            return next(int(x.split()[1]) for x in lines if x.startswith("Anonymous:")) / 1024

    before = anonymous_mb()
    tensor = open_tensor_file(path).tensor("w")
    assert float(tensor.sum()) == 16_000_000
    assert anonymous_mb() - before < 8
    assert float(torch.ones(16_000_000).sum()) == 16_000_000  # the measurement sees a copy:
    kept = tensor.clone()
    assert anonymous_mb() - before > 56
    del kept


# -- the output layer ----------------------------------------------------------------------------


def test_tied_models(tmp_path):
    tied = {**CONFIG, "tie_word_embeddings": True}
    tensors = make_tensors()
    message = refused(write(tmp_path / "m", tensors, config=tied), "ties the embeddings, but lm_")
    assert "Set tie_word_embeddings to false" in message
    tensors[OUTPUT] = tensors[EMBEDDING].clone()
    assert OUTPUT not in open_source(write(tmp_path / "m", tensors, config=tied)).shapes()
    del tensors[OUTPUT]
    assert OUTPUT not in open_source(write(tmp_path / "m", tensors, config=tied)).shapes()
    message = refused(write(tmp_path / "m", tensors), "1 missing tensors: lm_head.weight")
    assert "Set tie_word_embeddings to true" in message


# -- names, shapes, types ------------------------------------------------------------------------


def test_missing_and_unknown_tensors(tmp_path):
    tensors = make_tensors()
    for name in list(tensors):
        if ".layers.1." in name:
            tensors[name.replace("layers.1", "layers.10")] = tensors.pop(name)
    message = refused(write(tmp_path / "m", tensors), "9 missing tensors: model.layers.1.self")
    assert "9 unknown tensors: model.layers.10.input_layernorm.weight" in message
    assert message.count("model.layers") == 10  # five of each
    assert "--fix-config" in message


def test_biases_are_unknown_tensors(tmp_path):
    tensors = {**make_tensors(), "model.layers.0.self_attn.q_proj.bias": torch.ones(64)}
    refused(write(tmp_path / "m", tensors), "1 unknown tensors: .*q_proj.bias")


def test_another_shape_than_config_json(tmp_path):
    message = refused(
        write(tmp_path / "m", make_tensors(), config={**CONFIG, "intermediate_size": 64}),
        r"contradicts config.json: 6 misshapen tensors: model.layers.0.mlp.gate_proj.weight is "
        r"\[48, 32\], not \[64, 32\]",
    )
    assert "--fix-config" in message


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.float64])
def test_other_types_are_refused(kind, dtype, tmp_path):
    tensors = make_tensors()
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(dtype)
    message = refused(write(tmp_path / "m", tensors, kind), f"tensor {name} has type ")
    assert ".bin" in message or ".safetensors" in message


# -- index and files -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_wrong_indexes(kind, tmp_path):
    clean = write(tmp_path / "clean", make_tensors(), kind, shards=2)
    first, second = sorted(p.name for p in clean.glob("*-of-*"))

    def copy():
        shutil.rmtree(tmp_path / "m", ignore_errors=True)
        return shutil.copytree(clean, tmp_path / "m")

    def damage(change, message):
        folder = copy()
        edit_index(folder, change)
        return refused(folder, message)

    damage(
        lambda m: m.update({EMBEDDING: second}),
        f"{EMBEDDING}: index says {second}, it is in {first}",
    )
    damage(lambda m: m.update(more=second), f"more: index says {second}, it is in none")
    damage(lambda m: m.pop(OUTPUT), f"{OUTPUT}: index says nothing, it is in")
    damage(lambda m: m.update(more="model-9.bin"), "model-9.bin is missing")
    damage(lambda m: m.clear(), "has no weight_map")
    for path in ("../" + first, "/etc/passwd", "sub/x.bin", "..", "", 3):
        damage(lambda m, path=path: m.update({EMBEDDING: path}), "no file of the folder")
    folder = copy()
    (folder / second).unlink()
    refused(folder, f"{second} is missing")
    folder = copy()
    shutil.copy(folder / first, folder / f"{first.split('-')[0]}-again.{first.split('.')[-1]}")
    refused(folder, "-again.* does not belong to it")
    folder = copy()
    next(folder.glob("*.index.json")).write_text("{")
    refused(folder, r"index\.json: Expecting")


def test_a_tensor_in_two_files(tmp_path):
    folder = write(tmp_path / "m", make_tensors(), shards=2)
    first, second = sorted(folder.glob("*-of-*"))
    both = {**load_file(second), EMBEDDING: load_file(first)[EMBEDDING]}
    save_file(both, second)
    refused(folder, f"tensor {EMBEDDING} is in {first.name} and in {second.name}")


def test_what_is_no_model(tmp_path):
    message = "holds neither a Hugging Face model nor a Megatron checkpoint"
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", message)
    refused(tmp_path / "absent", "no such file or folder")
    (tmp_path / "note.txt").write_text("x")
    refused(tmp_path / "note.txt", "is a file, not a model")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "config.json").write_text(json.dumps(CONFIG))
    refused(tmp_path / "c", "holds neither model.safetensors nor pytorch_model.bin")
    with pytest.raises(CheckpointError, match="no such folder"):
        open_weights(tmp_path / "absent")


def test_a_megatron_checkpoint_that_carries_a_config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "mp_rank_00").mkdir()
    assert detect_kind(tmp_path) == "legacy"
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    assert detect_kind(tmp_path) == "hf"


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter_is_not_left_out(name, tmp_path):
    folder = make_folder(tmp_path / "in")
    (folder / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=rf"holds an adapter \({name}\).*Merge it"):
        open_hf(folder)


def test_both_16_bit_types_in_one_model_are_refused(tmp_path):
    tensors = make_tensors()
    tensors[OUTPUT] = tensors[OUTPUT].view(torch.float16)
    refused(write(tmp_path / "m", tensors), "lm_head.weight: of type float16 among 20 of bfloat16")


def test_names_with_line_ends_and_escape_codes_are_one_line(tmp_path):
    tensors = make_tensors() | {"x\n\x1b[31m": torch.zeros(2)}
    message = refused(write(tmp_path / "m", tensors), r"1 unknown tensors: 'x\\n\\x1b\[31m'")
    assert message.isprintable()
