"""Checkpoints as stock `pretrain_gpt.py` of the installed Megatron and MindSpeed write them."""

from __future__ import annotations

import argparse
import io
import pickle
import random
import signal
import zipfile
from collections import OrderedDict
from pathlib import PosixPath

import numpy as np
import pytest
import torch
from megatron_models import VOCAB, assert_same, cut_layer, make_source

from megatron_bitcpm.conversion.megatron.open import open_megatron
from megatron_bitcpm.errors import CheckpointError

pytestmark = pytest.mark.both_versions
ROWS = 64


def stock_args(model, tp, pp, **changes):
    """The arguments that matter, and objects of all kinds that a real run's arguments hold."""
    from megatron.core.enums import ModelType
    from megatron.core.transformer.enums import AttnBackend

    values = {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size,
        "kv_channels": model.kv_channels,
        "num_attention_heads": model.num_attention_heads,
        "group_query_attention": True,
        "num_query_groups": model.num_query_groups,
        "seq_length": 32,
        "max_position_embeddings": model.max_position_embeddings,
        "position_embedding_type": "rope",
        "rotary_base": model.rotary_base,
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "normalization": "RMSNorm",
        "norm_epsilon": model.layernorm_epsilon,
        "swiglu": True,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "num_experts": None,
        "window_size": None,
        "vocab_size": VOCAB,
        "untie_embeddings_and_output_weights": not model.share_embeddings_and_output_weights,
        "make_vocab_size_divisible_by": 8,
        "padded_vocab_size": ROWS,
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "virtual_pipeline_model_parallel_size": None,
        "consumed_train_samples": 40,
        "params_dtype": torch.bfloat16,
        "model_type": ModelType.encoder_or_decoder,
        "attention_backend": AttnBackend.auto,
        "exit_signal": signal.SIGTERM,
        "save": PosixPath("run"),
        "activation": torch.nn.functional.silu,
        "data_path": ["a", "b"],
        "betas": (0.9, 0.95),
    }
    values.update(changes)
    return argparse.Namespace(**values)


def stock_shard(source, tp, pp, tp_rank, pp_rank, layers, **changes):
    """What `generate_state_dict` and `save_checkpoint` put into one legacy shard."""
    from megatron.core.rerun_state_machine import RerunDiagnostic, RerunMode, RerunState

    model = OrderedDict()
    if pp_rank == 0:
        model["embedding.word_embeddings.weight"] = vocabulary(
            source, "model.embed_tokens.weight", tp, tp_rank
        )
    for local, layer in enumerate(layers):
        for name, tensor in cut_layer(source, layer, tp, tp_rank).items():
            model[f"decoder.layers.{local}.{name}"] = tensor.clone()
            if "linear" in name:
                extra = name.replace("weight", "_extra_state")
                model[f"decoder.layers.{local}.{extra}"] = io.BytesIO(b"state")
    if pp_rank == pp - 1:
        model["decoder.final_layernorm.weight"] = source.tensors["model.norm.weight"]
        tied = source.model.share_embeddings_and_output_weights
        if not tied or pp > 1:
            hf_name = "model.embed_tokens.weight" if tied else "lm_head.weight"
            model["output_layer.weight"] = vocabulary(source, hf_name, tp, tp_rank)
    step = {"step": 5, "exp_avg": torch.ones(3), "exp_avg_sq": torch.ones(3)}
    return {
        "args": stock_args(source.model, tp, pp, **changes),
        "checkpoint_version": 3.0,
        "iteration": 7,
        "model": model,
        "optimizer": {"optimizer": {"state": {0: step}, "param_groups": [{"lr": 0.1}]}},
        "opt_param_scheduler": {"max_lr": 0.1, "num_steps": 40},
        "rng_state": [
            {
                "random_rng_state": random.getstate(),
                "np_rng_state": np.random.get_state(),
                "torch_rng_state": torch.get_rng_state(),
                "cuda_rng_state": torch.get_rng_state(),
                "rng_tracker_states": {"model-parallel-rng": torch.get_rng_state()},
            }
        ],
        "rerun_state_machine": {
            "mode": RerunMode.DISABLED,
            "state": RerunState.NOT_RUNNING_YET,
            "diagnostic": RerunDiagnostic.CORRECT_RESULT,
            "max": np.float32(3.0),
        },
        "num_floating_point_operations_so_far": np.float64(1e9),
    }


def vocabulary(source, name, tp, tp_rank):
    table = source.tensors[name]
    padded = torch.cat([table, torch.zeros(ROWS - VOCAB, table.shape[1], dtype=table.dtype)])
    return padded.tensor_split(tp)[tp_rank].clone()


def write_stock(source, folder, tp=2, pp=2, stages=((0, 1, 2), (3,)), save=torch.save, **changes):
    """A run's folder with an uneven pipeline split."""
    for pp_rank in range(pp):
        for tp_rank in range(tp):
            name = f"mp_rank_{tp_rank:02d}" + (f"_{pp_rank:03d}" if pp > 1 else "")
            path = folder / "iter_0000007" / name
            path.mkdir(parents=True)
            shard = stock_shard(source, tp, pp, tp_rank, pp_rank, stages[pp_rank], **changes)
            save(shard, path / "model_optim_rng.pt")
    (folder / "latest_checkpointed_iteration.txt").write_text("7")
    return folder


def edit(folder, name, change):
    """Load a shard, change it, and write it again."""
    path = folder / "iter_0000007" / name / "model_optim_rng.pt"
    shard = torch.load(path, weights_only=False)
    change(shard)
    torch.save(shard, path)


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


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        import os

        return os.system, (f"touch {self.path}",)


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
