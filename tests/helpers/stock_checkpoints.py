"""Legacy shards as stock Megatron writes them, made by hand, and its own modules."""

from __future__ import annotations

import argparse
import io
import random
import signal
from collections import OrderedDict
from pathlib import PosixPath

import numpy as np
import torch

from helpers.megatron_models import VOCAB, cut_layer

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


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        import os

        return os.system, (f"touch {self.path}",)


def build_stock_chunks(model, layout, rows):
    """Build GPTModel of stock Megatron's local spec, this rank's chunks."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel

    from helpers.tiny_models import tiny_transformer_config
    from megatron_bitcpm.parallel.megatron_api import build_pipeline_chunks

    tp, pp, vpp = layout
    config = tiny_transformer_config(
        model,
        torch.bfloat16,
        kv_channels=model.head_dim,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
        overlap_p2p_comm=vpp is not None,
        batch_p2p_comm=vpp is None,
    )
    return build_pipeline_chunks(
        lambda **place: GPTModel(
            config,
            get_gpt_layer_local_spec(normalization="RMSNorm"),
            rows,
            32,
            position_embedding_type="rope",
            share_embeddings_and_output_weights=model.share_embeddings_and_output_weights,
            **place,
        )
    )
