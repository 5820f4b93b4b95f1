"""A tiny Megatron model and a loop around it, for tests that look inside the training step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from megatron_bitcpm.config import ModelConfig, ParallelConfig, QuantConfig
from megatron_bitcpm.platforms import current_platform

current_platform().prepare()

from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.transformer.module import Float16Module  # noqa: E402

from megatron_bitcpm.models.llama import build_llama, build_transformer_config  # noqa: E402
from megatron_bitcpm.parallel.convert import TernaryModel, ternarize_  # noqa: E402
from megatron_bitcpm.training.runtime import start_runtime  # noqa: E402
from megatron_bitcpm.training.step import build_forward_step, run_schedule  # noqa: E402

VOCAB, SEQ = 128, 16


def tiny_model_config(**changes: Any) -> ModelConfig:
    """A 2-layer model, 256 inputs in the longest row."""
    values = {
        "num_layers": 2,
        "hidden_size": 64,
        "ffn_hidden_size": 256,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "max_position_embeddings": SEQ,
    }
    return ModelConfig(**{**values, **changes})


@dataclass
class TinyRun:
    """A built model with its optimizer."""

    chunk: DistributedDataParallel
    optimizer: Any
    ternary: TernaryModel | None
    dp_rank: int
    dp_size: int
    micro_batches: int

    def tokens(self, step: int) -> Iterator[dict[str, torch.Tensor]]:
        """The micro-batches of a step; the same global batch for every data-parallel size."""
        generator = torch.Generator().manual_seed(1000 + step)
        total = self.micro_batches * self.dp_size
        # A narrow vocabulary is learnable, so that gradients stay informative.
        all_BS = torch.randint(0, VOCAB // 4, (total, 2, SEQ + 1), generator=generator)
        for index in range(self.micro_batches):
            tokens_BS = all_BS[index * self.dp_size + self.dp_rank]
            yield {
                "tokens": tokens_BS[:, :-1],
                "labels": tokens_BS[:, 1:],
                "loss_mask": torch.ones(2, SEQ),
                "position_ids": torch.arange(SEQ).expand(2, SEQ),
            }

    def forward_backward(self, step: int, forward_only: bool = False) -> float:
        """Run the schedule on the batch of a step; return the mean loss."""
        if not forward_only:
            self.chunk.zero_grad_buffer()
            self.optimizer.zero_grad()
        return run_schedule(
            self.chunk,
            build_forward_step(torch.device("cpu")),
            self.tokens(step),
            num_microbatches=self.micro_batches,
            micro_batch_size=2,
            seq_length=SEQ,
            forward_only=forward_only,
        )

    def train_step(
        self, step: int, spoil: Callable[[DistributedDataParallel], None] | None = None
    ) -> tuple[str, str, bool]:
        """One step; return (loss, gradient norm) as hexadecimal floats, and whether it was taken.

        Args:
            step: picks the batch.
            spoil: called between backward and step, to inject bad gradients.
        """
        loss = self.forward_backward(step)
        if spoil:
            spoil(self.chunk)
        updated, norm, _ = self.optimizer.step()
        return float(loss).hex(), float(norm or 0.0).hex(), bool(updated)


@contextmanager
def tiny_run(
    quant: QuantConfig | None,
    tp: int = 1,
    model: ModelConfig | None = None,
    dtype: torch.dtype = torch.bfloat16,
    micro_batches: int = 2,
    recompute: str = "none",
    distributed_optimizer: bool = False,
    overlap: bool = False,
    bucket_size: int | None = None,
    seed: int = 7,
    lr: float = 5e-3,
    attach: bool = True,
) -> Iterator[TinyRun]:
    """Build a tiny model with optimizer on this rank; see the arguments' names."""
    model = model or tiny_model_config()
    with start_runtime(ParallelConfig(tensor_model_parallel_size=tp), seed) as runtime:
        transformer = build_transformer_config(model, dtype, tp, recompute)
        torch.manual_seed(seed)
        built = build_llama(transformer, model, VOCAB)
        ternary = ternarize_(built, quant) if quant else None
        bf16 = dtype == torch.bfloat16
        chunk = DistributedDataParallel(
            transformer,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                use_distributed_optimizer=distributed_optimizer,
                overlap_grad_reduce=overlap,
                overlap_param_gather=overlap,
                bucket_size=bucket_size,
            ),
            Float16Module(transformer, built) if bf16 else built,
        )
        optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=lr,
                weight_decay=0.1,
                clip_grad=1.0,
                bf16=bf16,
                params_dtype=dtype,
                loss_scale=1.0 if bf16 else None,
                use_distributed_optimizer=distributed_optimizer,
                overlap_param_gather=overlap,
            ),
            [chunk],
        )
        if ternary and attach:
            ternary.attach_optimizer(optimizer)
        transformer.finalize_model_grads_func = finalize_model_grads
        transformer.grad_scale_func = optimizer.scale_loss
        if overlap:
            transformer.no_sync_func = chunk.no_sync
            transformer.param_sync_func = None
        yield TinyRun(chunk, optimizer, ternary, runtime.dp_rank, runtime.dp_size, micro_batches)
