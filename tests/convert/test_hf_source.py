"""Hugging Face folders as sources: every layout of the files, and every way to be wrong."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import struct
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_folders import make_folder

from megatron_bitcpm.conversion.hf.source import open_hf, open_weights
from megatron_bitcpm.conversion.hf.tensor_files import open_tensor_file
from megatron_bitcpm.conversion.open import detect_kind, open_source
from megatron_bitcpm.errors import CheckpointError

CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 50,
    "max_position_embeddings": 64,
}
LAYER = {
    "self_attn.q_proj": (64, 32),
    "self_attn.k_proj": (32, 32),
    "self_attn.v_proj": (32, 32),
    "self_attn.o_proj": (32, 64),
    "mlp.gate_proj": (48, 32),
    "mlp.up_proj": (48, 32),
    "mlp.down_proj": (32, 48),
    "input_layernorm": (32,),
    "post_attention_layernorm": (32,),
}
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


def make_tensors(dtype=torch.bfloat16):
    """Return the tensors of CONFIG, written out by hand."""
    generator = torch.Generator().manual_seed(0)
    shapes = {EMBEDDING: (50, 32), "model.norm.weight": (32,), OUTPUT: (50, 32)}
    for layer in range(2):
        shapes |= {f"model.layers.{layer}.{n}.weight": shape for n, shape in LAYER.items()}
    return {n: torch.randn(shape, generator=generator).to(dtype) for n, shape in shapes.items()}


def write(folder, tensors, kind="safetensors", shards=1, config=CONFIG):
    """Write a folder in one of its four layouts; return it."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    stem, ending = {"safetensors": ("model", "safetensors"), "bin": ("pytorch_model", "bin")}[kind]
    names = list(tensors)
    weight_map = {}
    for number in range(shards):
        part = {n: tensors[n] for n in names[number::shards]}
        file = f"{stem}.{ending}"
        if shards > 1:
            file = f"{stem}-{number + 1:05d}-of-{shards:05d}.{ending}"
            weight_map |= dict.fromkeys(part, file)
        if kind == "bin":
            torch.save(part, folder / file)
        else:
            save_file(part, folder / file)
    if shards > 1:
        index = json.dumps({"metadata": {}, "weight_map": weight_map})
        (folder / f"{stem}.{ending}.index.json").write_text(index)
    return folder


def edit_index(folder, change):
    path = next(folder.glob("*.index.json"))
    content = json.loads(path.read_text())
    change(content["weight_map"])
    path.write_text(json.dumps(content))


def refused(folder, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        open_source(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    return str(caught.value)


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
    message = refused(write(tmp_path / "m", tensors), "9 missing tensors: model.layers.1.input")
    assert "9 unknown tensors: model.layers.10.input_layernorm.weight" in message
    assert message.count("model.layers") == 10  # five of each
    assert "--fix-config" in message


def test_biases_are_unknown_tensors(tmp_path):
    tensors = {**make_tensors(), "model.layers.0.self_attn.q_proj.bias": torch.ones(64)}
    refused(write(tmp_path / "m", tensors), "1 unknown tensors: .*q_proj.bias")


def test_another_shape_than_config_json(tmp_path):
    message = refused(
        write(tmp_path / "m", make_tensors(), config={**CONFIG, "intermediate_size": 64}),
        r"6 tensors contradict config.json: model.layers.0.mlp.gate_proj.weight is \[48, 32\], "
        r"not \[64, 32\]",
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

    damage(lambda m: m.update({EMBEDDING: second}),
           f"{EMBEDDING}: index says {second}, it is in {first}")  # fmt: skip
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


# -- damaged files -------------------------------------------------------------------------------


def entry(start, end, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def write_raw(path, header, data, length=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "invalid offset for tensor `b`"),  # overlap
        ({"a": entry(0, 8), "b": entry(0, 8)}, 8, "invalid offset for tensor"),
        ({"a": entry(0, 8), "b": entry(12, 20)}, 20, "invalid offset for tensor `b`"),  # gap
        ({"a": entry(0, 8), "b": entry(8, 1 << 40)}, 16, r"truncated: 16 bytes .*\(b\) ends at"),
        ({"a": entry(0, 8), "b": entry(8, 16)}, 12, r"truncated: 12 bytes of values, .*\(b\)"),
        ({"a": entry(0, 8)}, 12, "longer than its tensors: 12 bytes"),
        ({"a": entry(8, 0)}, 8, "is longer|invalid offset"),
        ({"a": entry(0, 8, (3,))}, 8, "is damaged"),
        ({"a": entry(0, 8, (1 << 62, 4))}, 8, "is damaged"),
        ({"a": entry(0, 8, (-2,))}, 8, "is damaged"),
        ({"a": entry(0, 8, (2,), "F33")}, 8, "is damaged"),
        (b'{"a":', 8, "is damaged"),
        (b"\xff" * 40, 8, "is damaged"),
    ],
)
def test_damaged_safetensors_headers(header, data, message, tmp_path):
    path = tmp_path / "model.safetensors"
    write_raw(path, header, bytes(data))
    with pytest.raises(CheckpointError, match=message) as caught:
        open_tensor_file(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_no_header_at_all(tmp_path):
    path = tmp_path / "model.safetensors"
    for content in (b"", b"\0" * 4, b"\xff" * 8, struct.pack("<Q", 10**15) + b"{}"):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="is damaged or no safetensors file"):
            open_tensor_file(path)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_truncation_anywhere_is_noticed(kind, tmp_path):
    folder = write(tmp_path / "m", make_tensors(), kind)
    path = next(p for p in folder.iterdir() if p.name != "config.json")
    content = path.read_bytes()
    for keep in (0, 1, 7, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:keep])
        message = refused(folder, "is damaged|is empty|truncated|cannot be")
        assert path.name in message


def test_flipped_bits_of_a_safetensors_header_never_pass_unnoticed(tmp_path):
    tensors = make_tensors()
    folder = write(tmp_path / "m", tensors)
    path = folder / "model.safetensors"
    content = path.read_bytes()
    end = 8 + struct.unpack("<Q", content[:8])[0]
    passed = 0
    for position in range(0, end, 7):
        flipped = bytearray(content)
        flipped[position] ^= 1 << (position % 7)
        path.write_bytes(flipped)
        try:
            source = open_source(folder)
        except CheckpointError as error:
            assert "\n" not in str(error)
            continue
        # What is left must be a change without meaning, as in the names of metadata.
        assert all(torch.equal(source.tensor(n), t) for n, t in tensors.items())
        passed += 1
    assert passed < 10


def test_flipped_bits_of_a_bin_name_the_tensor(tmp_path):
    folder = write(tmp_path / "m", make_tensors(), "bin")
    path = folder / "pytorch_model.bin"
    content = path.read_bytes()
    name = "model.layers.1.self_attn.o_proj.weight"
    at = content.index(make_tensors()[name].view(torch.int16).numpy().tobytes())
    flipped = bytearray(content)
    flipped[at + 100] ^= 4
    path.write_bytes(flipped)
    assert torch.load(path, weights_only=True)[name].shape == (32, 64)  # torch does not notice
    refused(folder, f"tensor {name} is damaged: its checksum differs")
    for position in range(0, len(content), len(content) // 150):
        flipped = bytearray(content)
        flipped[position] ^= 16
        path.write_bytes(flipped)
        try:
            source = open_source(folder)
        except CheckpointError as error:
            assert "\n" not in str(error)
            continue
        assert all(torch.equal(source.tensor(n), t) for n, t in make_tensors().items())


def test_a_bin_without_checksums_is_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        folder = write(tmp_path / "m", make_tensors(), "bin")
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(open_hf(folder).tensor(OUTPUT), make_tensors()[OUTPUT])


def test_a_compressed_bin_is_refused(tmp_path):
    folder = write(tmp_path / "m", make_tensors(), "bin")
    path = folder / "pytorch_model.bin"
    old = zipfile.ZipFile(io.BytesIO(path.read_bytes()))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for member in old.namelist():
            new.writestr(member, old.read(member))
    refused(folder, "its member .* is compressed")


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_a_malicious_bin_is_not_run(form, tmp_path):
    folder = write(tmp_path / "m", make_tensors(), "bin")
    path, mark = folder / "pytorch_model.bin", tmp_path / "executed"
    content = {**make_tensors(), "evil": Evil(str(mark))}
    if form == "pickle":
        path.write_bytes(pickle.dumps(content["evil"]))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: ") as caught:
        open_source(folder)
    assert "\n" not in str(caught.value)
    if form != "pickle":
        assert "names io.open, which no tensor needs; nothing of it was run" in str(caught.value)
    assert not mark.exists()
    if form == "zip":  # it would have been
        torch.load(path, weights_only=False)
        assert mark.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(2)], "holds list, not named tensors"),
        ({}, "holds dict, not named tensors"),
        ({"a": {"b": torch.ones(2)}}, "'a' is dict, not a tensor"),
        ({3: torch.ones(2)}, "3 is Tensor, not a tensor"),
        ({"a": torch.ones(2).to_sparse()}, "tensor a is no ordinary tensor"),
        ({"a": torch.ones(2, device="meta")}, "tensor a is no ordinary tensor"),
    ],
)
def test_a_bin_of_something_else(content, message, tmp_path):
    torch.save(content, tmp_path / "x.bin")
    with pytest.raises(CheckpointError, match=message):
        open_tensor_file(tmp_path / "x.bin")


def test_single_files(tmp_path):
    tensors = make_tensors()
    torch.save(tensors, tmp_path / "x.pt")
    save_file(tensors, tmp_path / "x.safetensors")
    for path in (tmp_path / "x.pt", tmp_path / "x.safetensors"):
        file = open_tensor_file(path)
        assert set(file.names()) == set(tensors)
        assert all(file.shape(n) == tuple(t.shape) for n, t in tensors.items())
        assert all(file.dtype(n) == torch.bfloat16 for n in tensors)
        assert all(torch.equal(file.tensor(n), t) for n, t in tensors.items())
    save_file({"mask": torch.ones(3, dtype=torch.bool)}, tmp_path / "m.safetensors")
    file = open_tensor_file(tmp_path / "m.safetensors")
    assert file.raw_tensor("mask").all()
    with pytest.raises(CheckpointError, match="tensor mask has type BOOL"):
        file.tensor("mask")
    with pytest.raises(CheckpointError, match="no such file"):
        open_tensor_file(tmp_path / "absent.bin")
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="is no file of tensors by its name"):
        open_tensor_file(tmp_path / "x.gguf")


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


def test_a_bare_pickle_runs_nothing_and_is_named(tmp_path):
    marker = tmp_path / "ran"

    class Attack:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    for protocol, message in ((2, "names io.open, which no tensor needs"), (4, "torch.save did")):
        (tmp_path / "a.bin").write_bytes(pickle.dumps({"w": Attack()}, protocol))
        with pytest.raises(CheckpointError, match=message):
            open_tensor_file(tmp_path / "a.bin")
    assert not marker.exists()


def test_both_16_bit_types_in_one_model_are_refused(tmp_path):
    tensors = make_tensors()
    tensors[OUTPUT] = tensors[OUTPUT].view(torch.float16)
    refused(write(tmp_path / "m", tensors), "lm_head.weight: of type float16 among 20 of bfloat16")
