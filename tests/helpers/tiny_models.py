"""A tiny Megatron model and a loop around it, for tests that look inside the training step.

Stands on Megatron and on the ternary linears alone, not on the trainer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from helpers.model_factory import tiny_model
from megatron_bitcpm.arch.model import ModelConfig
from megatron_bitcpm.config import QuantConfig
from megatron_bitcpm.platforms import current_platform

current_platform().prepare()

from megatron.core import parallel_state  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.models.gpt.gpt_model import GPTModel  # noqa: E402
from megatron.core.optimizer import OptimizerConfig  # noqa: E402
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func  # noqa: E402
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.transformer.module import Float16Module  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

from megatron_bitcpm.parallel.convert import TernaryModel, ternarize_  # noqa: E402
from megatron_bitcpm.parallel.megatron_api import (  # noqa: E402
    build_pipeline_chunks,
    check_pipeline_config,
    get_optimizer,
)

VOCAB, SEQ = 128, 16


@contextmanager
def model_parallel(
    tp: int = 1, pp: int = 1, vpp: int | None = None, cp: int = 1, seed: int = 7
) -> Iterator[None]:
    """Megatron's parallel state on the ranks of this test, and its seeds."""
    current_platform().prepare()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
        context_parallel_size=cp,
    )
    try:
        torch.manual_seed(seed)
        model_parallel_cuda_manual_seed(seed)
        yield
    finally:
        parallel_state.destroy_model_parallel()


def tiny_transformer_config(
    model: ModelConfig, dtype: torch.dtype, recompute: str = "none", **changes: Any
) -> TransformerConfig:
    """Megatron's configuration of a Llama; `changes` are its own field names."""
    full = recompute == "full"
    values = {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.num_query_groups,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "use_cpu_initialization": True,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "calculate_per_token_loss": True,
        "recompute_granularity": "full" if full else None,
        "recompute_method": "uniform" if full else None,
        "recompute_num_layers": 1 if full else None,
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "persist_layer_norm": False,
    }
    return TransformerConfig(**{**values, **changes})


def fill_by_name_(chunk: torch.nn.Module, seed: int) -> None:
    """Give every matrix the values that its name and the seed decide, whatever its stage.

    Plain initialisation draws other numbers on other pipeline stages.
    """
    for name, param in chunk.named_parameters():
        for module_name, module in chunk.named_modules():
            if name.startswith(f"{module_name}.") and hasattr(module, "layer_number"):
                name = f"layer.{module.layer_number}.{name.removeprefix(module_name + '.')}"
                break
        if param.ndim == 2:
            generator = torch.Generator().manual_seed(seed + sum(map(ord, name)))
            param.data.copy_(torch.randn(param.shape, generator=generator) * 0.05)


def forward_step(iterator: Iterator[dict[str, torch.Tensor]], model: Any) -> tuple[Any, Any]:
    """The forward step that Megatron's schedules call; the loss is a sum with its token count."""
    batch = next(iterator)
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])

    def sum_loss(losses_BS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        total, tokens = losses_BS.float().sum(), torch.tensor(losses_BS.numel(), dtype=torch.int)
        return total, tokens, {"loss": torch.stack([total.detach(), tokens])}

    return output, sum_loss


@dataclass
class TinyRun:
    """A built model with its optimizer."""

    chunks: list[DistributedDataParallel]
    optimizer: Any
    ternary: TernaryModel | None
    micro_batches: int

    @property
    def chunk(self) -> DistributedDataParallel:
        """The first chunk, which is all of the model without virtual stages."""
        return self.chunks[0]

    def tokens(self, step: int) -> Iterator[dict[str, torch.Tensor]]:
        """The micro-batches of a step; the same global batch for every data-parallel size."""
        dp_rank = parallel_state.get_data_parallel_rank()
        dp_size = parallel_state.get_data_parallel_world_size()
        generator = torch.Generator().manual_seed(1000 + step)
        total = self.micro_batches * dp_size
        # A narrow vocabulary is learnable, so that gradients stay informative.
        all_BS = torch.randint(0, VOCAB // 4, (total, 2, SEQ + 1), generator=generator)
        for index in range(self.micro_batches):
            tokens_BS = all_BS[index * dp_size + dp_rank]
            yield {
                "tokens": tokens_BS[:, :-1],
                "labels": tokens_BS[:, 1:],
                "position_ids": torch.arange(SEQ).expand(2, SEQ),
            }

    def forward_backward(self, step: int, forward_only: bool = False) -> float:
        """Run the schedule on the batch of a step; return the mean loss, alike on all ranks."""
        if not forward_only:
            for chunk in self.chunks:
                chunk.zero_grad_buffer()
            self.optimizer.zero_grad()
        iterators = [self.tokens(step) for _ in self.chunks]
        outputs = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.chunks,
            num_microbatches=self.micro_batches,
            seq_length=SEQ,
            micro_batch_size=2,
            forward_only=forward_only,
        )
        # Only the last stage has losses, and ranks that share a model have the same.
        mine = torch.stack([output["loss"] for output in outputs]).double() if outputs else None
        everyone: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, mine)
        loss, tokens = torch.cat([part for part in everyone if part is not None]).sum(0).tolist()
        return loss / tokens

    def train_step(
        self, step: int, spoil: Callable[[DistributedDataParallel], None] | None = None
    ) -> tuple[str, str, bool]:
        """One step; return (loss, gradient norm) as hexadecimal floats, and whether it was taken.

        Args:
            step: picks the batch.
            spoil: called with the first chunk between backward and step, to inject bad gradients.
        """
        loss = self.forward_backward(step)
        if spoil:
            spoil(self.chunk)
        updated, norm, _ = self.optimizer.step()
        return float(loss).hex(), float(norm or 0.0).hex(), bool(updated)


def let_schedule_overlap_(
    transformer: TransformerConfig, chunks: list[DistributedDataParallel]
) -> None:
    """Give Megatron's schedule the functions that start the communication of the chunks."""
    several = len(chunks) > 1
    no_sync = [chunk.no_sync for chunk in chunks]
    transformer.no_sync_func = no_sync if several else no_sync[0]
    if several:
        # The schedule starts each chunk's reduction and gather itself.
        transformer.grad_sync_func = [chunk.start_grad_sync for chunk in chunks]
        transformer.param_sync_func = [chunk.start_param_sync for chunk in chunks]


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
    pp: int = 1,
    vpp: int | None = None,
    expected: int | None = None,
    fill: bool = False,
    checked: bool = True,
    **changes: Any,
) -> Iterator[TinyRun]:
    """Build a tiny model with optimizer on this rank; see the arguments' names.

    Args:
        quant: None leaves the model in full precision.
        vpp: chunks on each pipeline stage.
        expected: see `ternarize_`.
        fill: begin with weights that do not depend on the pipeline stages.
        checked: refuse pipeline settings that train wrongly.
        changes: fields of TransformerConfig.
    """
    model = model or tiny_model()
    with model_parallel(tp, pp, vpp, seed=seed):
        pipeline = {
            "tensor_model_parallel_size": tp,
            "pipeline_model_parallel_size": pp,
            "virtual_pipeline_model_parallel_size": vpp,
            "overlap_p2p_comm": vpp is not None,
            "batch_p2p_comm": vpp is None,
        }
        transformer = tiny_transformer_config(model, dtype, recompute, **{**pipeline, **changes})
        if checked:
            check_pipeline_config(transformer)
        torch.manual_seed(seed)
        built = build_pipeline_chunks(
            functools.partial(
                GPTModel,
                transformer,
                get_gpt_layer_local_spec(normalization="RMSNorm"),
                vocab_size=VOCAB,
                max_sequence_length=SEQ,
                position_embedding_type="rope",
                share_embeddings_and_output_weights=model.share_embeddings_and_output_weights,
            )
        )
        if fill:
            for part in built:
                fill_by_name_(part, seed)
        ternary = ternarize_(built, quant, expected) if quant else None
        bf16 = dtype == torch.bfloat16
        ddp_config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=distributed_optimizer,
            overlap_grad_reduce=overlap,
            overlap_param_gather=overlap,
            align_param_gather=overlap and vpp is not None,
            bucket_size=bucket_size,
        )
        chunks = [
            DistributedDataParallel(
                transformer,
                ddp_config,
                Float16Module(transformer, part) if bf16 else part,
                disable_bucketing=index > 0,
            )
            for index, part in enumerate(built)
        ]
        optimizer = get_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=lr,
                weight_decay=0.1,
                clip_grad=1.0,
                bf16=bf16,
                params_dtype=dtype,
                loss_scale=1.0 if bf16 else None,
                use_distributed_optimizer=distributed_optimizer,
            ),
            chunks,
        )
        if ternary and attach:
            ternary.attach_optimizer(optimizer)
        transformer.finalize_model_grads_func = finalize_model_grads
        transformer.grad_scale_func = optimizer.scale_loss
        if overlap:
            let_schedule_overlap_(transformer, chunks)
        yield TinyRun(chunks, optimizer, ternary, micro_batches)
