"""What a run says about itself: one line and one record for each log interval."""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from megatron_bitcpm.arch.counts import tflops_per_device, training_flops_per_token
from megatron_bitcpm.config import RunConfig
from megatron_bitcpm.training.memory import measure_peak_memory_gb
from megatron_bitcpm.training.metrics import MetricsWriter, format_duration
from megatron_bitcpm.training.resume import Progress
from megatron_bitcpm.training.runtime import Runtime

if TYPE_CHECKING:
    from megatron_bitcpm.checkpoint.saver import SaveReport
    from megatron_bitcpm.parallel.weight_stats import CodeSampler
    from megatron_bitcpm.training.setup import TrainState


class StepReport:
    """Collects the numbers of steps, on every rank, and writes them where there is a `writer`."""

    def __init__(
        self, config: RunConfig, runtime: Runtime, state: TrainState, writer: MetricsWriter | None
    ) -> None:
        self._config = config
        self._runtime = runtime
        self._state = state
        self._writer = writer
        self._sampler = self._new_sampler()
        self._flops_per_token = training_flops_per_token(
            config.model, state.padded_vocab_size, config.data.seq_length
        )
        self._stall_s = 0.0
        self._grad_norm: float | None = None
        self._clear()

    def _new_sampler(self) -> CodeSampler | None:
        from megatron_bitcpm.parallel.weight_stats import CodeSampler

        return CodeSampler(self._state.ternary) if self._state.ternary else None

    def _clear(self) -> None:
        self._losses: list[float] = []
        self._seconds = 0.0
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave out of the next step's time what was done since the last one."""
        self._start = time.perf_counter()

    def say(self, text: str) -> None:
        """Print a line (on the main rank)."""
        if self._writer:
            self._writer.say(text)

    def add(self, loss: float, grad_norm: float | None, progress: Progress) -> None:
        """Count a finished step: its loss in nats per token, and no norm if it was skipped."""
        self._losses.append(loss)
        self._grad_norm = grad_norm
        now = time.perf_counter()
        self._seconds += now - self._start
        self._start = now
        if self._writer:
            self._writer.advance(progress.iteration)

    def log(self, progress: Progress) -> None:
        """Write the numbers since the last call; collective over all ranks."""
        codes = self._sampler.measure() if self._sampler else None
        memory_gb = measure_peak_memory_gb(self._runtime.device)
        if self._writer:
            values = {**self._numbers(progress), "memory_gb": memory_gb}
            layers = None
            if codes is not None:
                values.update(asdict(codes.total))
                layers = {number: asdict(layer) for number, layer in codes.layers.items()}
            self._writer.record(progress.iteration, layers, **values)
            self._writer.say(self._line(progress, values))
        self._stall_s = 0.0
        self._clear()

    def _numbers(self, progress: Progress) -> dict[str, float | None]:
        training, optimizer = self._config.training, self._state.optimizer
        steps = len(self._losses)
        tokens = steps * training.global_batch_size * self._config.data.seq_length
        tokens_per_s = tokens / self._seconds
        world_size = self._runtime.world_size
        is_fp16 = training.precision == "fp16"
        return {
            "loss": math.fsum(self._losses) / steps,
            "learning_rate": max(g["lr"] for g in optimizer.param_groups),
            "grad_norm": self._grad_norm,
            "loss_scale": float(optimizer.get_loss_scale()) if is_fp16 else None,
            "tokens_per_s": tokens_per_s,
            "tflops_per_device": tflops_per_device(self._flops_per_token, tokens_per_s, world_size),
            "skipped_steps": progress.skipped_steps,
            "save_stall_s": self._stall_s or None,
        }

    def _line(self, progress: Progress, values: dict[str, Any]) -> str:
        """Return one line for the terminal, the most important numbers first."""
        train_iters = self._config.training.train_iters
        grad_norm, scale = values["grad_norm"], values["loss_scale"]
        seconds_left = (train_iters - progress.iteration) * self._seconds / len(self._losses)
        parts = [
            f"step {progress.iteration:6d}/{train_iters}",
            f"loss {values['loss']:.4f}",
            f"lr {values['learning_rate']:.2e}",
            "skipped" if grad_norm is None else f"grad {grad_norm:.3f}",
            "" if scale is None else f"scale {scale:g}",
            f"{values['tokens_per_s']:,.0f} tok/s",
            f"{values['tflops_per_device']:.3g} TFLOP/s",
            f"{values['memory_gb']:.2f} GB",
            f"eta {format_duration(seconds_left)}",
        ]
        if (zeros := values.get("zero_fraction")) is not None:
            parts.append(f"zeros {zeros:.1%}")
        if (flips := values.get("flip_fraction")) is not None:
            parts.append(f"flips {flips:.2%}")
        if progress.skipped_steps:
            parts.append(f"skips {progress.skipped_steps}")
        return "  ".join(filter(None, parts))

    def validated(self, iteration: int, losses: dict[str, float]) -> float:
        """Write validation losses, nats per token, and return their mean; of several, each too."""
        mean = math.fsum(losses.values()) / len(losses)
        if self._writer:
            named = losses if len(losses) > 1 else {}
            each: dict[str, Any] = {f"valid_loss/{name}": loss for name, loss in named.items()}
            self._writer.record(iteration, valid_loss=mean, **each)
            parts = "".join(f"  {name} {loss:.4f}" for name, loss in named.items())
            self._writer.say(f"step {iteration:6d}  validation loss {mean:.4f}{parts}")
        self.restart_clock()
        return mean

    def published(self, *saves: SaveReport | None) -> None:
        """Say that checkpoints are complete, and count how long they held the training."""
        for save in filter(None, saves):
            self._stall_s += save.stall_s
            self.restart_clock()
            if self._config.checkpoint.async_save:
                self.say(
                    f"step {save.iteration:6d}  saved; training waited {save.stall_s:.2f} s of "
                    f"{save.stall_s + save.write_s:.2f} s"
                )

    def rolled_back(
        self, bad_iteration: int, progress: Progress, reason: str, rollbacks: int
    ) -> None:
        """Say that the run returned to a checkpoint; `progress` is what it returned to."""
        if self._writer:
            self._writer.rewind(progress.iteration)
            self._writer.say(
                f"step {bad_iteration:6d}  {reason}; back to step {progress.iteration}, with later "
                f"data (rollback {rollbacks} of {self._config.guard.max_rollbacks})"
            )
        self._sampler = self._new_sampler()
        self._clear()
