"""HF names -> Megatron's files -> HF names, bitwise, at many layouts."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers.megatron_models import VOCAB, assert_same, make_source

from megatron_bitcpm.arch.folding import Folding
from megatron_bitcpm.arch.layout import Layout
from megatron_bitcpm.config import QuantConfig
from megatron_bitcpm.conversion.megatron.legacy_writer import write_legacy
from megatron_bitcpm.conversion.megatron.open import open_megatron
from megatron_bitcpm.conversion.megatron.torch_dist_writer import write_torch_dist
from megatron_bitcpm.quantizer import Quantizer


@pytest.mark.parametrize(
    ("case", "layout", "changes"),
    [
        ("untied", (1, 1, 1), {}),
        ("untied", (2, 2, 2), {}),
        ("tied", (4, 4, 1), {}),
        ("minicpm", (2, 1, 1), {}),
        ("minicpm", (1, 2, 2), {"share_embeddings_and_output_weights": False}),
        ("tied", (3, 2, 1), {"num_query_groups": 3}),
    ],
)
def test_torch_dist_and_legacy(tmp_path, case, layout, changes):
    """Norms are float32, everything else bfloat16."""
    source = make_source(tmp_path, case, **changes)
    report = write_torch_dist(source, tmp_path / "a", Layout(*layout))
    tp, pp, _ = layout
    assert sum(name.endswith(".distcp") for name in report["files"]) == tp * pp
    first = open_megatron(tmp_path / "a")
    assert_same(first, source)
    write_legacy(first, tmp_path / "b", Layout(*layout))
    second = open_megatron(tmp_path / "b" / "release")
    assert_same(second, source)
    write_torch_dist(second, tmp_path / "c", Layout(1, tp if tp != 3 else 1))
    assert_same(open_megatron(tmp_path / "c"), source)


@pytest.mark.parametrize(
    ("write", "read", "rows"),
    [(write_torch_dist, open_megatron, 64), (write_legacy, open_megatron, 64)],
)
def test_padding_rows_are_copies_of_the_last(tmp_path, write, read, rows):
    source = make_source(tmp_path)
    write(source, tmp_path / "o", Layout(4))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        padded = read(tmp_path / "o").padded_tensor(name)
        assert padded.shape[0] == rows
        assert torch.equal(padded[:VOCAB], source.tensors[name])
        assert all(torch.equal(row, source.tensors[name][-1]) for row in padded[VOCAB:])


def test_padding_of_a_checkpoint_is_kept(tmp_path):
    source = make_source(tmp_path)
    write_torch_dist(source, tmp_path / "a")
    found = open_megatron(tmp_path / "a")
    table = found.padded_tensor("model.embed_tokens.weight").clone()
    table[VOCAB:] = 7

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Trained(type(source)):
        def padded_tensor(self, name):
            return table if name == "model.embed_tokens.weight" else self.tensor(name)

    write_legacy(Trained(**vars(source)), tmp_path / "b", Layout(2))
    kept = open_megatron(tmp_path / "b").padded_tensor("model.embed_tokens.weight")
    assert torch.equal(kept, table)


@pytest.mark.parametrize(
    ("write", "read"), [(write_torch_dist, open_megatron), (write_legacy, open_megatron)]
)
def test_what_stands_beside_the_tensors(tmp_path, write, read):
    side = tmp_path / "hf"
    side.mkdir()
    (side / "tokenizer_config.json").write_bytes(b'{"chat_template": "\xc3\xa4"}')
    (side / "config.json").write_bytes(b'{"hidden_size":  32}\n')
    (side / "model.safetensors").write_bytes(b"no side file")
    stamp = Quantizer(QuantConfig(group_size=16, grid="five"), 4, "fp32")
    folding = Folding(scale_emb=12.0, residual=0.7, output=0.25, scale_depth=1.4, dim_model_base=8)
    source = dataclasses.replace(
        make_source(tmp_path), form="pseudo", quantizer=stamp, folding=folding, side_files=side
    )
    write(source, tmp_path / "o", Layout(2, 2))
    found = read(tmp_path / "o")
    assert (found.form, found.quantizer, found.folding) == ("pseudo", stamp, folding)
    assert found.facts == source.facts
    assert found.side_files is not None
    assert {path.name: path.read_bytes() for path in found.side_files.iterdir()} == {
        name: (side / name).read_bytes() for name in ("config.json", "tokenizer_config.json")
    }


def test_names_for_transformer_engine(tmp_path):
    source = make_source(tmp_path)
    write_legacy(source, tmp_path / "o", transformer_impl="transformer_engine")
    shard = torch.load(tmp_path / "o/release/mp_rank_00/model_optim_rng.pt", weights_only=False)
    assert "decoder.layers.3.mlp.linear_fc1.layer_norm_weight" in shard["model"]
    assert not any("input_layernorm" in name for name in shard["model"])
    assert_same(open_megatron(tmp_path / "o"), source)


@pytest.mark.parametrize("tp", [1, 4])
def test_local_scales_keep_the_groups_of_their_training(tmp_path, tp):
    """Two ranks trained: their groups are halves of a row, however many ranks files are cut for."""
    stamp = Quantizer(QuantConfig(group_size=-1, scale_sync="local"), tp_size=2)
    source = dataclasses.replace(make_source(tmp_path), form="latent", quantizer=stamp)
    write_torch_dist(source, tmp_path / "a", Layout(tp))
    write_legacy(open_megatron(tmp_path / "a"), tmp_path / "b", Layout(4 // tp))
    found = open_megatron(tmp_path / "b")
    model, groups = source.model, found.quantized_tensors()
    assert groups["model.layers.0.mlp.down_proj.weight"] == model.ffn_hidden_size // 2
    assert groups["model.layers.0.mlp.up_proj.weight"] == model.hidden_size
    for name in groups:
        assert torch.equal(found.forward_tensor(name), source.forward_tensor(name)), name
