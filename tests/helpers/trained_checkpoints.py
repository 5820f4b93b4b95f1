"""Tiny runs of the real trainer, with the matrices that entered each rank's GEMMs."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from helpers.ranks import run_ranks

SEQ, LAYERS = 80, 3
HEADS, GROUPS, HEAD_DIM, FFN = 4, 2, 32, 160
QKV, PROJ = "self_attention.linear_qkv", "self_attention.linear_proj"
FC1, FC2 = "mlp.linear_fc1", "mlp.linear_fc2"
BASE = {
    "model": {
        "num_layers": LAYERS,
        "hidden_size": 48,
        "ffn_hidden_size": 160,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 32,  # not 48 / 4
        "max_position_embeddings": SEQ,
        "rotary_base": 5000,
        "layernorm_epsilon": 1e-5,
        "make_vocab_size_divisible_by": 64,  # 300 ids become 320 rows
    },
    "quant": {},
    "parallel": {"tensor_model_parallel_size": 1},
    "data": {"seq_length": SEQ},
    "optimizer": {"lr": 2e-2, "lr_warmup_iters": 1},
    "training": {
        "train_iters": 4,
        "micro_batch_size": 2,
        "global_batch_size": 4,
        "eval_iters": 1,
    },
    "checkpoint": {},
}
CASES = {
    "tp1_untied": {"quant": {"requantize": "every_step"}},
    "tp2_tied_fp32": {
        "model": {"share_embeddings_and_output_weights": True},
        "quant": {"eps": 0.03},  # above the mean of many rows, below that of others
        "parallel": {"tensor_model_parallel_size": 2},
        "training": {"precision": "fp32"},
    },
    "tp2_bf16": {
        "parallel": {"tensor_model_parallel_size": 2},
        "quant": {"requantize": "every_step"},
    },
    "tp2_local": {
        "parallel": {"tensor_model_parallel_size": 2},
        "quant": {"scale_sync": "local"},
    },
    "tp2_groups_filters": {
        "parallel": {"tensor_model_parallel_size": 2},
        "quant": {
            "group_size": 16,
            "full_precision_first_layers": 1,
            "exclude": ["decoder.layers.2.mlp.*", "*.1.self_attention.linear_proj"],
        },
    },
    "tp2_tensor": {
        "parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
        "quant": {
            "group_size": "tensor",
            "activation": "int8_per_token",
            "requantize": "every_step",
        },
    },
    "full_precision": {"quant": {"enabled": False}},
}


@dataclass(frozen=True)
class Trained:
    """A finished run.

    Attributes:
        directory: the run's folder.
        tp_size: tensor-parallel ranks.
        forward: by rank: site name -> the local matrix that entered the GEMM.
        losses: validation loss of the checkpoint.
    """

    directory: Path
    tokenizer: Path
    tp_size: int
    forward: list[dict[str, torch.Tensor]]


def train_case(name: str, data: Path, directory: Path) -> Trained:
    """Train one of `CASES` in processes of its own."""
    tree = copy.deepcopy(BASE)
    for section, values in CASES[name].items():
        tree[section].update(values)
    tree["data"] |= {"prefix": str(data / "d"), "tokenizer": str(data / "tok")}
    tree["checkpoint"]["directory"] = str(directory)
    tp_size = tree["parallel"]["tensor_model_parallel_size"]
    results = run_ranks(tp_size, _train, yaml.safe_dump(tree), tp_size, timeout_s=280)
    forward = [{site: torch.from_numpy(w) for site, w in result.items()} for result in results]
    return Trained(directory, data / "tok", tp_size, forward)


def _train(rank: int, text: str, tp_size: int) -> dict:
    from megatron_bitcpm.config import parse_config
    from megatron_bitcpm.training.runtime import start_runtime
    from megatron_bitcpm.training.trainer import Trainer

    config = parse_config(text, world_size=tp_size)
    captured = {}
    with start_runtime(config.parallel, config.training.seed) as runtime:
        trainer = Trainer(config, runtime)
        trainer.run(resume=False)
        ternary = trainer.state.ternary
        if ternary is None:
            return {}
        if "requantize" in yaml.safe_load(text)["quant"]:
            assert ternary.requantizer.mode == "every_step"
        weight_for_forward = ternary.requantizer.weight_for_forward

        def spy(site, weight):
            wq = weight_for_forward(site, weight)
            captured[site.name] = wq.detach().clone()
            return wq

        ternary.requantizer.weight_for_forward = spy
        trainer.evaluate()
    # Exact: bfloat16 fits in float32.
    return {site: w.float().numpy() for site, w in captured.items()}


def open_tensors(checkpoint):
    """Open the tensors of a checkpoint, or of a run's newest one, under Megatron's names."""
    from megatron_bitcpm.checkpoint.store import find_checkpoint
    from megatron_bitcpm.conversion.megatron.torch_dist_reader import TorchDistTensors

    return TorchDistTensors(find_checkpoint(checkpoint))


def read_tensor(checkpoint, name: str) -> torch.Tensor:
    """Read a tensor under Megatron's name, the layers numbered."""
    from megatron_bitcpm.arch.tensors import find_tensor

    place = find_tensor(name, "megatron")
    return open_tensors(checkpoint).tensor(place.spec, place.layer)


def gather_layer(ranks: list[dict], layer: int) -> dict[str, torch.Tensor]:
    """The seven projections of a layer from the ranks' matrices, one row at a time."""
    tp = len(ranks)

    def local(kind):
        name = f"decoder.layers.{layer}.{kind}"
        return [rank[name] for rank in ranks] if name in ranks[0] else None

    out = {}
    if qkv := local(QKV):
        rows = {"q": [], "k": [], "v": []}
        for group in range(GROUPS):
            matrix, local_group = qkv[group // (GROUPS // tp)], group % (GROUPS // tp)
            for slot in range(HEADS // GROUPS + 2):
                kind = "q" if slot < HEADS // GROUPS else "kv"[slot - HEADS // GROUPS]
                for channel in range(HEAD_DIM):
                    row = (local_group * (HEADS // GROUPS + 2) + slot) * HEAD_DIM + channel
                    rows[kind].append(matrix[row])
        out |= {f"self_attn.{kind}_proj": torch.stack(r) for kind, r in rows.items()}
    if fc1 := local(FC1):
        half = FFN // tp
        out["mlp.gate_proj"] = torch.stack([fc1[i // half][i % half] for i in range(FFN)])
        out["mlp.up_proj"] = torch.stack([fc1[i // half][half + i % half] for i in range(FFN)])
    for kind, name in ((PROJ, "self_attn.o_proj"), (FC2, "mlp.down_proj")):
        if parts := local(kind):
            out[name] = torch.cat(parts, dim=1)
    return out
