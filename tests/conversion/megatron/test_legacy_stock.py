"""Checkpoints as stock `pretrain_gpt.py` of the installed Megatron and MindSpeed write them."""

from __future__ import annotations

import argparse
import pickle
import zipfile

import pytest
import torch
from helpers.megatron_models import assert_same, cut_layer, make_source
from helpers.stock_checkpoints import Payload, edit, write_stock

from megatron_bitcpm.conversion.megatron.open import open_megatron
from megatron_bitcpm.errors import CheckpointError

pytestmark = pytest.mark.both_versions


@pytest.mark.parametrize(
    ("case", "layout"),
    [
        ("untied", {}),
        ("tied", {}),
        ("tied", {"tp": 4, "pp": 1, "stages": [(0, 1, 2, 3)]}),
        ("untied", {"tp": 1, "pp": 4, "stages": [(0,), (1,), (2,), (3,)]}),
    ],
)
def test_ordinary_shards_load(tmp_path, case, layout):
    source = make_source(tmp_path, case)
    found = open_megatron(write_stock(source, tmp_path / "run", **layout))
    assert_same(found, source)
    assert found.facts == {"iteration": 7, "seq_length": 32, "tokens": 40 * 32}


def test_more_parts_than_key_heads(tmp_path):
    """Megatron 0.16 cuts the rows through the query groups."""
    source = make_source(tmp_path, num_query_groups=2)
    layout = {"tp": 4, "pp": 1, "stages": [(0, 1, 2, 3)]}
    assert_same(open_megatron(write_stock(source, tmp_path / "run", **layout)), source)


def test_names_of_transformer_engine(tmp_path):
    source = make_source(tmp_path)
    folder = write_stock(source, tmp_path / "run", tp=1, pp=1, stages=[(0, 1, 2, 3)])

    def rename(shard):
        shard["model"] = {
            name.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_").replace(
                "pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"
            ): value
            for name, value in shard["model"].items()
        }

    edit(folder, "mp_rank_00", rename)
    assert_same(open_megatron(folder), source)


def test_minicpm_as_mindspeed_names_it(tmp_path):
    source = make_source(tmp_path, "minicpm")
    rope = source.model.rope_scaling
    folder = write_stock(
        source,
        tmp_path / "run",
        scale_emb=12.0,
        scale_depth=1.4,
        dim_model_base=8.0,
        rope_scaling_type="longrope",
        short_factor=list(rope.short_factor),
        long_factor=list(rope.long_factor),
        rope_scaling_original_max_position_embeddings=16,
        short_mscale=None,
        long_mscale=None,
        noop_layers=None,
        dynamic_factor=1.0,
    )
    assert_same(open_megatron(folder), source)


def test_unknown_vocabulary_asks_for_the_tokenizer(tmp_path):
    folder = write_stock(make_source(tmp_path), tmp_path / "run", vocab_size=None)
    with pytest.raises(CheckpointError, match=r"does not say .* 64 rows .*--tokenizer"):
        open_megatron(folder)


def test_malicious_shard(tmp_path):
    folder = write_stock(make_source(tmp_path), tmp_path / "run")
    touched = tmp_path / "touched"
    edit(folder, "mp_rank_01_001", lambda shard: shard.update(args2=Payload(touched)))
    # The file does what it says, where nothing stops it.
    path = folder / "iter_0000007/mp_rank_01_001/model_optim_rng.pt"
    torch.load(path, weights_only=False)
    assert touched.exists()
    touched.unlink()
    with pytest.raises(CheckpointError) as caught:
        open_megatron(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert "mp_rank_01_001/model_optim_rng.pt" in message
    assert "posix.system, which no checkpoint needs" in message
    assert not touched.exists()


@pytest.mark.parametrize("name", ["getattr", "eval"])
def test_builtins_are_refused(tmp_path, name):
    folder = write_stock(make_source(tmp_path), tmp_path / "run")
    edit(folder, "mp_rank_00_000", lambda shard: shard.update(x=__builtins__[name]))
    with pytest.raises(CheckpointError, match=rf"builtin(s|__)\.{name}, which no"):
        open_megatron(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalization": "LayerNorm"}, r"args\.normalization='LayerNorm', the model here has"),
        ({"swiglu": False}, r"args\.swiglu=False"),
        ({"position_embedding_type": "learned_absolute"}, r"args\.position_embedding_type="),
        ({"add_bias_linear": True}, r"args\.add_bias_linear=True"),
        ({"num_experts": 8}, r"args\.num_experts=8"),
        ({"use_rope_scaling": True}, r"args\.use_rope_scaling=True"),
        ({"rope_scaling_type": "yarn"}, r"args\.rope_scaling_type='yarn'"),
        ({"rotary_percent": 0.5}, r"args\.rotary_percent=0\.5"),
        ({"norm_epsilon": None}, r"args lack layernorm_epsilon"),
        ({"tensor_model_parallel_size": 4}, r"folders are those of tp 2, its arguments say tp 4"),
        ({"padded_vocab_size": 72}, r"64 rows, args\.padded_vocab_size is 72"),
        ({"ffn_hidden_size": 24}, r"linear_fc1\.weight is \[96, 32\], not \[48, 32\]"),
        ({"num_layers": 10**9}, r"args\.num_layers=1000000000, a whole number from 1 to 10000 is"),
        ({"num_layers": 4.0}, r"args\.num_layers=4\.0, a whole number from 1 to 10000 is needed"),
        (
            {"hidden_size": 2**24 + 1},
            r"args\.hidden_size=16777217, a whole number from 1 to 1677",
        ),
        ({"ffn_hidden_size": 0}, r"args\.ffn_hidden_size=0, a whole number"),
        ({"make_vocab_size_divisible_by": 10**9}, r"args\.make_vocab_size_divisible_by=1000000000"),
        ({"num_layers": 5}, r"6 missing tensors: .*layers\.4\.self_attention\.linear_qkv\.weight"),
    ],
)
def test_refused_arguments(tmp_path, changes, message):
    folder = write_stock(make_source(tmp_path), tmp_path / "run", **changes)
    with pytest.raises(CheckpointError, match=message):
        open_megatron(folder)


def spoil_tied_copy(shard):
    shard["model"]["output_layer.weight"][3, 3] += 1


def spoil_norm(shard):
    shard["model"]["decoder.layers.0.input_layernorm.weight"] = torch.zeros(32)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("mp_rank_00_000", lambda s: s.update(checkpoint_version=2.0), "checkpoint_version 2.0"),
        ("mp_rank_01_000", lambda s: s.update(iteration=8), "iteration 8, on most ranks 7"),
        ("mp_rank_01_001", spoil_tied_copy, "output_layer.weight differs from the embedding"),
        ("mp_rank_01_000", spoil_norm, "layer_norm_weight differ in mp_rank_00_000"),
        (
            "mp_rank_01_001",
            lambda s: s["model"].popitem(),
            "rng.pt, absent in mp_",
        ),
        (
            "mp_rank_00_001",
            lambda s: s.update(model={"language_model": {}}),
            "before Megatron-Core",
        ),
    ],
)
def test_damaged_shards(tmp_path, name, change, message):
    folder = write_stock(make_source(tmp_path, "tied"), tmp_path / "run")
    edit(folder, name, change)
    with pytest.raises(CheckpointError) as caught:
        source = open_megatron(folder)
        for tensor in source.shapes():
            source.tensor(tensor)
    assert message in str(caught.value)
    assert name in str(caught.value)


def test_missing_and_odd_folders(tmp_path):
    folder = write_stock(make_source(tmp_path), tmp_path / "run") / "iter_0000007"
    (folder / "mp_rank_01_001").rename(folder / "mp_rank_01_001_000")
    with pytest.raises(CheckpointError, match="mp_rank_01_001_000: is a shard of experts"):
        open_megatron(folder)
    (folder / "mp_rank_01_001_000").rename(folder / "mp_rank_x")
    with pytest.raises(CheckpointError, match="mp_rank_x: is not the name"):
        open_megatron(folder)
    (folder / "mp_rank_x").rename(folder.parent / "elsewhere")
    with pytest.raises(CheckpointError, match=r"mp_rank_01_001/model_optim_rng\.pt is missing"):
        open_megatron(folder)


@pytest.mark.parametrize("kind", ["truncated", "flipped", "empty", "text"])
def test_damaged_files(tmp_path, kind):
    folder = write_stock(make_source(tmp_path), tmp_path / "run")
    path = folder / "iter_0000007/mp_rank_00_001/model_optim_rng.pt"
    data = bytearray(path.read_bytes())
    if kind == "flipped":
        tensor = cut_layer(make_source(tmp_path), 3, 2, 0)["mlp.linear_fc2.weight"]
        place = data.find(bytes(tensor.contiguous().view(torch.uint8).numpy().data))
        assert place > 0
        data[place + 10] ^= 4
    path.write_bytes(
        {"truncated": data[:-900], "flipped": data, "empty": b"", "text": b"x" * 99}[kind]
    )
    with pytest.raises(CheckpointError) as caught:
        source = open_megatron(folder)
        source.tensor("model.layers.3.mlp.down_proj.weight")
    message = str(caught.value)
    assert "\n" not in message and "mp_rank_00_001/model_optim_rng.pt" in message
    if kind == "flipped":
        # The loader of torch does not notice.
        assert torch.load(path, weights_only=False)["iteration"] == 7
        assert "decoder.layers.0.mlp.linear_fc2.weight" in message and "checksum" in message


def test_a_pickle_cannot_change_a_class(tmp_path):
    """BUILD on a class sets attributes of that class; no class of a name in a file is touched."""
    path = write_stock(make_source(tmp_path), tmp_path / "run") / "iter_0000007/mp_rank_00_000"
    # (None, {"a": 5}) as the state of the class itself
    evil = b"\x80\x02cargparse\nNamespace\nN}X\x01\x00\x00\x00aK\x05s\x86b."
    assert pickle.loads(evil).a == 5
    del argparse.Namespace.a
    with zipfile.ZipFile(path / "model_optim_rng.pt", "w") as archive:
        archive.writestr("archive/data.pkl", evil)
        archive.writestr("archive/version", "3\n")
    with pytest.raises(CheckpointError, match="mp_rank_00_000"):
        open_megatron(path.parent)
    assert not hasattr(argparse.Namespace, "a")
