"""The training loop.

`train` builds everything from the configuration, resumes if asked, and runs optimizer steps:
Megatron's own forward-backward schedule, optimizer and learning-rate scheduler. Validation, logging
and checkpoints happen at their intervals and at the end. What stands on Megatron is imported inside
functions: it reads parts of torch at import, so the platform must be prepared before.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_bitcpm.checkpoint.hf_config import read_tokenizer_ids
from megatron_bitcpm.config import RunConfig
from megatron_bitcpm.data.tokenizer import load_tokenizer
from megatron_bitcpm.errors import ConfigError, TrainingError, format_problem
from megatron_bitcpm.training.metrics import MetricsWriter, plot_losses
from megatron_bitcpm.training.resume import check_resumable, check_same_data
from megatron_bitcpm.training.runtime import Runtime, on_main_rank, start_runtime

logger = logging.getLogger(__name__)


def train(config: RunConfig, resume: bool = False) -> None:
    """Run a configuration to its end on this rank; every rank calls it.

    Args:
        config: a checked configuration.
        resume: continue from the newest checkpoint in ``checkpoint.directory``.

    Raises:
        BitcpmError: an input that cannot be used, or a run that had to stop.
    """
    _check_directory(Path(config.checkpoint.directory), resume)
    with start_runtime(config.parallel, config.training.seed) as runtime:
        Trainer(config, runtime).run(resume)


def _check_directory(directory: Path, resume: bool) -> None:
    """Refuse to mix two runs in one folder; decided alike on all ranks, before any writes."""
    from megatron_bitcpm.checkpoint.store import TRACKER, find_checkpoint

    if resume:
        find_checkpoint(directory)
    elif (directory / TRACKER).exists():
        raise ConfigError(
            format_problem(
                "checkpoint.directory",
                directory,
                "holds checkpoints of an earlier run",
                "Use --resume to continue it, or another folder",
            )
        )


@dataclass
class _Progress:
    """What resume must know beside model and optimizer."""

    iteration: int = 0
    consumed_samples: int = 0
    skipped_steps: int = 0


class Trainer:
    """One run on this rank."""

    def __init__(self, config: RunConfig, runtime: Runtime) -> None:
        from megatron_bitcpm.data.dataset import build_train_valid_datasets
        from megatron_bitcpm.data.indexed import check_indexed_files
        from megatron_bitcpm.parallel.weight_stats import CodeSampler
        from megatron_bitcpm.training.setup import build_train_state
        from megatron_bitcpm.training.step import build_forward_step

        self.config = config
        self.runtime = runtime
        training, data = config.training, config.data
        self.directory = Path(config.checkpoint.directory)
        self.tokenizer = load_tokenizer(data.tokenizer)
        # A tokenizer that cannot be exported is refused before the training, not after it.
        read_tokenizer_ids(data.tokenizer, self.tokenizer.vocab_size)
        self.train_data, self.valid_data = build_train_valid_datasets(
            data.prefix,
            data.seq_length,
            train_samples=training.train_iters * training.global_batch_size,
            valid_samples=training.eval_iters * training.global_batch_size,
            seed=training.seed,
            tokenizer=self.tokenizer,
            cache_dir=data.cache,
        )
        self._data_facts = {
            "tokenizer_sha256": self.tokenizer.sha256,
            "train_data": check_indexed_files(f"{data.prefix}_train").fingerprint,
            "valid_data": check_indexed_files(f"{data.prefix}_valid").fingerprint,
        }
        self.state = build_train_state(config, runtime, self.tokenizer.vocab_size)
        self.sampler = CodeSampler(self.state.ternary) if self.state.ternary else None
        self.progress = _Progress()
        self._forward_step = build_forward_step(runtime.device)
        self._skipped_in_a_row = 0

    # -- the run ---------------------------------------------------------------------------------

    def run(self, resume: bool) -> None:
        """Train from the start or the newest checkpoint to ``training.train_iters``."""
        if resume:
            self.load_checkpoint()
        training, checkpoint = self.config.training, self.config.checkpoint
        first_iter = self.progress.iteration
        if first_iter >= training.train_iters:
            logger.info(
                "already at step %d of %d; raise training.train_iters to go on",
                first_iter,
                training.train_iters,
            )
        on_main_rank(self._check_writable, "checkpoint.directory", self.directory)
        if not self.runtime.is_main:
            self._loop(None)
            return
        title = "ternary" if self.state.ternary else "full precision"
        with MetricsWriter(self.directory, first_iter, training.train_iters, title) as writer:
            writer.say(self.describe())
            self._loop(writer)
        plot_losses({title: self.directory}, self.directory / "loss.png")
        logger.info("done; checkpoints in %s", checkpoint.directory)

    def _check_writable(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        probe = self.directory / ".tmp-writable"
        probe.write_text("x", encoding="utf-8")
        probe.unlink()

    def _loop(self, writer: MetricsWriter | None) -> None:
        training = self.config.training
        batches = self._batches(self.train_data, self.progress.consumed_samples)
        meter = _Meter()
        while self.progress.iteration < training.train_iters:
            loss, grad_norm = self.step(batches)
            iteration = self.progress.iteration
            meter.add(loss)
            valid_loss: float | None = None
            is_last = iteration == training.train_iters
            if writer:
                writer.advance(iteration)
            if iteration % training.log_interval == 0 or is_last:
                self._log(writer, meter, grad_norm)
                meter = _Meter()
            if iteration % training.eval_interval == 0 or is_last:
                valid_loss = self.evaluate()
                if writer:
                    writer.record(iteration, valid_loss=valid_loss)
                    writer.say(f"step {iteration:6d}  validation loss {valid_loss:.4f}")
                meter.restart_clock()
            interval = self.config.checkpoint.save_interval
            if is_last or (interval and iteration % interval == 0):
                self.save_checkpoint(valid_loss)
                meter.restart_clock()

    def describe(self) -> str:
        """Return the layout and the size of the model; what is ternary was logged by then."""
        place, model = self.runtime, self.state.model
        parameters = sum(p.numel() for p in model.parameters())
        lines = [
            f"{place.platform.name}: {place.world_size} rank(s), tp {place.tp_size}, "
            f"dp {place.dp_size}; {self.config.model.architecture}, "
            f"{parameters:,} parameters on this rank",
        ]
        if not self.state.ternary:
            lines.append("full precision (quant.enabled is false)")
        return "\n".join(lines)

    # -- steps -----------------------------------------------------------------------------------

    def step(self, batches: Iterator[dict[str, torch.Tensor]]) -> tuple[float, float | None]:
        """Do one optimizer step; return (mean loss in nats per token, gradient norm).

        The norm is None when the step was skipped for non-finite gradients.
        """
        training, state = self.config.training, self.state
        state.chunk.zero_grad_buffer()
        state.optimizer.zero_grad()
        loss = self._run_schedule(batches, training.global_batch_size, forward_only=False)
        updated, grad_norm = False, None
        if self._gradients_are_usable():
            updated, grad_norm, _ = state.optimizer.step()
        if updated:
            state.scheduler.step(1)
            self._skipped_in_a_row = 0
        else:
            self._count_skip()
        self.progress.iteration += 1
        self.progress.consumed_samples += training.global_batch_size
        return loss, float(grad_norm) if updated else None

    def _gradients_are_usable(self) -> bool:
        """Whether the step may be tried; in fp32 Megatron's optimizer itself does not look."""
        from megatron.core import parallel_state

        if self.config.training.precision != "fp32":
            return True
        buffers = self.state.chunk.buffers
        bad = torch.stack([(~b.grad_data.isfinite()).any() for b in buffers]).any().int()
        torch.distributed.all_reduce(bad, group=parallel_state.get_model_parallel_group())
        return int(bad) == 0

    def _count_skip(self) -> None:
        self.progress.skipped_steps += 1
        self._skipped_in_a_row += 1
        limit = self.config.guard.max_skipped_steps
        if self._skipped_in_a_row >= limit:
            raise TrainingError.of(
                "guard.max_skipped_steps", limit,
                f"{limit} steps in a row had non-finite gradients, the last at step "
                f"{self.progress.iteration + 1}",
                "Lower optimizer.lr or resume from an earlier checkpoint",
            )  # fmt: skip

    def _run_schedule(
        self, batches: Iterator[dict[str, torch.Tensor]], samples: int, forward_only: bool
    ) -> float:
        from megatron_bitcpm.training.step import run_schedule

        training = self.config.training
        return run_schedule(
            self.state.chunk,
            self._forward_step,
            batches,
            num_microbatches=samples // (training.micro_batch_size * self.runtime.dp_size),
            micro_batch_size=training.micro_batch_size,
            seq_length=self.config.data.seq_length,
            forward_only=forward_only,
        )

    @torch.no_grad()
    def evaluate(self) -> float:
        """Return the validation loss in nats per token, always over the same windows."""
        training = self.config.training
        self.state.chunk.eval()
        batches = self._batches(self.valid_data, 0)
        losses = [
            self._run_schedule(batches, training.global_batch_size, forward_only=True)
            for _ in range(training.eval_iters)
        ]
        self.state.chunk.train()
        return math.fsum(losses) / len(losses)

    def _batches(self, dataset: Any, consumed_samples: int) -> Iterator[dict[str, torch.Tensor]]:
        from megatron_bitcpm.data.dataset import MicroBatchIterator

        training = self.config.training
        return MicroBatchIterator(
            dataset,
            consumed_samples,
            training.micro_batch_size,
            training.global_batch_size,
            self.runtime.dp_rank,
            self.runtime.dp_size,
        )

    def _log(self, writer: MetricsWriter | None, meter: _Meter, grad_norm: float | None) -> None:
        zeros, flips = self.sampler.measure() if self.sampler else (None, None)
        if writer is None:
            return
        training = self.config.training
        tokens = meter.steps * training.global_batch_size * self.config.data.seq_length
        learning_rate = max(g["lr"] for g in self.state.optimizer.param_groups)
        writer.record(
            self.progress.iteration,
            loss=meter.mean_loss,
            learning_rate=learning_rate,
            grad_norm=grad_norm,
            tokens_per_s=tokens / meter.seconds,
            zero_fraction=zeros,
            flip_fraction=flips,
            skipped_steps=self.progress.skipped_steps,
        )
        steps_left = training.train_iters - self.progress.iteration
        parts = [
            f"step {self.progress.iteration:6d}/{training.train_iters}",
            f"loss {meter.mean_loss:.4f}",
            f"lr {learning_rate:.2e}",
            "skipped" if grad_norm is None else f"grad {grad_norm:.3f}",
            f"{tokens / meter.seconds:,.0f} tok/s",
            f"eta {_clock(steps_left * meter.seconds / meter.steps)}",
        ]
        if zeros is not None:
            parts.append(f"zeros {zeros:.1%}")
        if flips is not None:
            parts.append(f"flips {flips:.2%}")
        writer.say("  ".join(parts))

    # -- checkpoints -----------------------------------------------------------------------------

    def save_checkpoint(self, valid_loss: float | None = None) -> None:
        """Write a checkpoint of latent weights; collective, complete or absent."""
        from megatron_bitcpm.checkpoint.state import save_state
        from megatron_bitcpm.checkpoint.store import begin_checkpoint, publish_checkpoint

        state, iteration = self.state, self.progress.iteration
        folder = on_main_rank(
            lambda: begin_checkpoint(self.directory, iteration),
            "checkpoint.directory",
            self.directory,
        )
        with state.ternary.latents() if state.ternary else nullcontext():
            save_state(folder, state.model, state.optimizer, state.scheduler, vars(self.progress))
        torch.distributed.barrier()
        facts = {
            **vars(self.progress),
            **self._data_facts,
            "world_size": self.runtime.world_size,
            "vocab_size": self.tokenizer.vocab_size,
            "padded_vocab_size": state.padded_vocab_size,
            "valid_loss": valid_loss,
            "quantizer": state.ternary.stamp() if state.ternary else None,
        }
        on_main_rank(
            lambda: publish_checkpoint(folder, self.directory, iteration, self.config, facts),
            "checkpoint.directory",
            self.directory,
        )

    def load_checkpoint(self) -> None:
        """Restore the newest checkpoint of the run's folder; collective."""
        from megatron_bitcpm.checkpoint.state import load_state
        from megatron_bitcpm.checkpoint.store import find_checkpoint, read_config, read_state

        folder = find_checkpoint(self.directory)
        check_resumable(self.config, read_config(folder), folder)
        check_same_data(self.config, self._data_facts, read_state(folder), folder)
        self._check_sample_order(read_config(folder))
        state = self.state
        progress = load_state(folder, state.model, state.optimizer, state.scheduler)
        self.progress = _Progress(**progress)
        logger.info("resumed from %s", folder)

    def _check_sample_order(self, saved: RunConfig) -> None:
        """Beyond one epoch the order of samples depends on the length of the run."""
        samples, saved_samples = (
            c.training.train_iters * c.training.global_batch_size for c in (self.config, saved)
        )
        tokens = int(self.train_data.dataset.sequence_lengths.sum())
        samples_per_epoch = (tokens - 1) // self.config.data.seq_length
        if samples != saved_samples and max(samples, saved_samples) > samples_per_epoch:
            raise ConfigError(
                format_problem(
                    "training.train_iters",
                    self.config.training.train_iters,
                    f"the run was begun with {saved.training.train_iters} steps and reads its data "
                    "more than once, in an order that depends on them",
                    f"Use {saved.training.train_iters}, or start a new run",
                )
            )


class _Meter:
    """Mean loss and time since the last log line."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self._seconds = 0.0
        self._start = time.perf_counter()

    def add(self, loss: float) -> None:
        self.losses.append(loss)
        now = time.perf_counter()
        self._seconds += now - self._start
        self._start = now

    def restart_clock(self) -> None:
        self._start = time.perf_counter()

    @property
    def steps(self) -> int:
        return len(self.losses)

    @property
    def seconds(self) -> float:
        return self._seconds

    @property
    def mean_loss(self) -> float:
        return math.fsum(self.losses) / len(self.losses)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
