"""The training loop.

Steps are Megatron's own forward-backward schedule, optimizer and learning-rate scheduler. What
stands on Megatron is imported inside functions: it reads parts of torch at import, so the platform
must be prepared before.
"""

from __future__ import annotations

import logging
import math
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_bitcpm.checkpoint.store import write_error
from megatron_bitcpm.config import RunConfig
from megatron_bitcpm.data.dataset import (
    MicroBatchIterator,
    build_train_dataset,
    build_valid_datasets,
)
from megatron_bitcpm.data.sets import data_fingerprints
from megatron_bitcpm.data.tokenizer import load_tokenizer
from megatron_bitcpm.data.tokenizer_ids import read_tokenizer_ids
from megatron_bitcpm.errors import BitcpmError, TrainingError
from megatron_bitcpm.parallel.agree import on_all_ranks
from megatron_bitcpm.training.checkpointing import Checkpointer, check_run_folder
from megatron_bitcpm.training.exit import ExitRequest
from megatron_bitcpm.training.guard import LossGuard, Verdict
from megatron_bitcpm.training.metrics import MetricsWriter, plot_losses
from megatron_bitcpm.training.report import StepReport
from megatron_bitcpm.training.resume import Progress
from megatron_bitcpm.training.runtime import Runtime, start_runtime

if TYPE_CHECKING:
    from megatron_bitcpm.training.objectives.base import Batches, Objective

logger = logging.getLogger(__name__)


def train(config: RunConfig, resume: bool = False) -> None:
    """Run a configuration, or resume it, to its end; every rank calls it."""
    with start_runtime(config.parallel, config.training.seed) as runtime:
        check_run_folder(config, resume)
        Trainer(config, runtime).run(resume)


class Trainer:
    """One run on this rank; without an objective it minimises the loss of the next token."""

    def __init__(
        self, config: RunConfig, runtime: Runtime, objective: Objective | None = None
    ) -> None:
        from megatron_bitcpm.training.objectives.next_token import NextToken
        from megatron_bitcpm.training.setup import build_train_state

        self.config = config
        self.runtime = runtime
        training, data = config.training, config.data
        self.directory = Path(config.checkpoint.directory)
        tokenizer = load_tokenizer(data.tokenizer)
        # A tokenizer that cannot be exported is refused before the training, not after it.
        read_tokenizer_ids(data.tokenizer, tokenizer.vocab_size)
        batch = training.global_batch_size
        self.train_data = build_train_dataset(
            data, training.train_iters * batch, training.seed, tokenizer
        )
        self.valid_data = build_valid_datasets(data, training.eval_iters * batch, tokenizer)
        self.state = build_train_state(config, runtime, tokenizer.vocab_size)
        self.progress = Progress()
        self.guard = LossGuard(config.guard)
        self.checkpointer = Checkpointer(
            config, runtime, self.state, data_fingerprints(data, tokenizer), tokenizer.vocab_size
        )
        self.objective = objective or NextToken(runtime.device)
        self._save_is_due = False

    def run(self, resume: bool) -> None:
        """Train from the start or the newest checkpoint to ``training.train_iters``."""
        training = self.config.training
        self.checkpointer.prepare_folder()
        if resume:
            self.progress = self.checkpointer.load()
            self.guard = LossGuard.from_state(self.config.guard, self.progress.guard)
        elif self.config.checkpoint.init_from:
            self.checkpointer.initialize(self.config.checkpoint.init_from)
        first_iter, last_iter = self.progress.iteration, training.train_iters
        if first_iter >= last_iter:
            fix = "raise training.train_iters to continue"
            logger.info("already at step %d of %d; %s", first_iter, last_iter, fix)
        title = "ternary" if self.state.ternary else "full precision"
        with ExitStack() as stack:
            writer = on_all_ranks(
                lambda: MetricsWriter(self.directory, first_iter, last_iter, title),
                partial(write_error, self.directory),
                main_only=True,
            )
            if writer:
                stack.enter_context(writer)
                writer.say(self.describe())
            exit_request = stack.enter_context(
                ExitRequest(training.exit_duration_in_mins, self.runtime.device)
            )
            self._loop(StepReport(self.config, self.runtime, self.state, writer), exit_request)
        if self.runtime.is_main:
            self._plot(title)
            done = self.progress.iteration >= last_iter
            logger.info("%s; checkpoints in %s", "done" if done else "stopped", self.directory)

    def _plot(self, title: str) -> None:
        try:
            plot_losses({title: self.directory}, self.directory / "loss.png")
        except BitcpmError as error:
            # The run is complete and saved without its picture.
            logger.warning("%s", error)

    def _loop(self, report: StepReport, exit_request: ExitRequest) -> None:
        training = self.config.training
        batches = self._batches(self.train_data, self.progress.consumed_samples)
        reason = None
        report.restart_clock()
        while self.progress.iteration < training.train_iters and reason is None:
            loss, grad_norm = self.step(batches)
            verdict = self.guard.observe(self.progress.iteration, loss, grad_norm is not None)
            report.add(loss, grad_norm, self.progress)
            if verdict.act:
                report.log(self.progress)
                batches = self._roll_back(verdict, report)
                continue
            reason = exit_request.reason()
            self._after_step(report, reason is not None)
        report.published(self.checkpointer.saver.finish())
        if reason is not None:
            iteration = self.progress.iteration
            what = "stopped while losses were bad, not saved" if self._save_is_due else "saved"
            report.say(f"step {iteration:6d}  {reason}: {what}; --resume continues")

    def _after_step(self, report: StepReport, stopping: bool) -> None:
        """Log, validate and save as is due."""
        training, iteration = self.config.training, self.progress.iteration
        is_last = iteration == training.train_iters
        if iteration % training.log_interval == 0 or is_last or stopping:
            report.log(self.progress)
        valid_loss: float | None = None
        # A signal leaves little time: what it cuts short is the validation.
        if is_last or (iteration % training.eval_interval == 0 and not stopping):
            valid_loss = report.validated(iteration, self.evaluate())
        interval = self.config.checkpoint.save_interval
        if is_last or stopping or (interval is not None and iteration % interval == 0):
            self._save_is_due = True
        if self._save_is_due and (is_last or self._is_worth_returning_to()):
            self._save_is_due = False
            self.progress.guard = self.guard.state()
            report.published(*self.checkpointer.save(self.progress, valid_loss))
            report.restart_clock()
        report.published(self.checkpointer.saver.poll())

    def _is_worth_returning_to(self) -> bool:
        """Whether to save now: a rollback must not return to bad losses."""
        if self.config.guard.action == "stop" or not self.guard.in_trouble:
            return True
        return not self.checkpointer.has_checkpoint()

    def _roll_back(self, verdict: Verdict, report: StepReport) -> Batches:
        """Return to the newest checkpoint; return batches of later data."""
        bad_iteration, consumed = self.progress.iteration, self.progress.consumed_samples
        report.published(self.checkpointer.saver.finish())
        self.guard.begin_rollback(verdict)
        if not self.checkpointer.has_checkpoint():
            raise TrainingError(
                f"guard.action=rollback: {verdict.reason}; the run had no checkpoint to return to. "
                "Lower optimizer.lr, or save more often (checkpoint.save_interval)."
            )
        self.progress = self.checkpointer.load()
        self.guard.rewind(self.progress.guard)
        self._save_is_due = False
        # The same samples in the same order would lead to the same place.
        self.progress.consumed_samples = consumed
        report.rolled_back(bad_iteration, self.progress, verdict.reason, self.guard.rollbacks)
        return self._batches(self.train_data, consumed)

    def describe(self) -> str:
        """Return the layout and the size of the model."""
        place = self.runtime
        parameters = sum(p.numel() for model in self.state.models for p in model.parameters())
        text = (
            f"{place.platform.name}: {place.world_size} rank(s), tp {place.tp_size}, "
            f"pp {place.pp_size}, cp {place.cp_size}, dp {place.dp_size}; "
            f"{self.config.model.architecture}, {parameters:,} parameters on this rank"
        )
        return text if self.state.ternary else f"{text}\nfull precision (quant.enabled is false)"

    def step(self, batches: Batches) -> tuple[float, float | None]:
        """Do one step; return the mean loss in nats per token, and the gradient norm if taken."""
        training, state = self.config.training, self.state
        for chunk in state.chunks:
            chunk.zero_grad_buffer()
        state.optimizer.zero_grad()
        loss_sum, num_tokens = self._run_schedule(batches, forward_only=False)
        grad_norm = None
        if self._gradients_are_usable():
            updated, norm, _ = state.optimizer.step()
            grad_norm = float(norm) if updated else None
        if grad_norm is not None:
            state.scheduler.step(1)
        else:
            self.progress.skipped_steps += 1
        self.progress.iteration += 1
        self.progress.consumed_samples += training.global_batch_size
        loss = loss_sum / num_tokens if num_tokens else math.nan
        return loss, grad_norm

    def _gradients_are_usable(self) -> bool:
        """Whether the step may be tried; in fp32 Megatron's optimizer itself does not look."""
        if self.config.training.precision != "fp32":
            return True
        gradients = [b.grad_data for chunk in self.state.chunks for b in chunk.buffers]
        bad = torch.stack([(~g.isfinite()).any() for g in gradients]).any().int()
        torch.distributed.all_reduce(bad)
        return int(bad) == 0

    def _run_schedule(self, batches: Batches, forward_only: bool) -> tuple[float, float]:
        from megatron_bitcpm.training.step import run_schedule

        training = self.config.training
        samples = training.micro_batch_size * self.runtime.dp_size
        return run_schedule(
            self.state.chunks,
            self.objective,
            batches,
            num_microbatches=training.global_batch_size // samples,
            micro_batch_size=training.micro_batch_size,
            seq_length=self.config.data.seq_length,
            device=self.runtime.device,
            forward_only=forward_only,
        )

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Return each validation set's loss in nats per token, always over the same windows."""
        for chunk in self.state.chunks:
            chunk.eval()
        losses = {}
        for name, dataset in self.valid_data.items():
            batches = self._batches(dataset, 0)
            each = [
                self._run_schedule(batches, forward_only=True)
                for _ in range(self.config.training.eval_iters)
            ]
            tokens = math.fsum(count for _, count in each)
            losses[name] = math.fsum(total for total, _ in each) / tokens if tokens else math.nan
        for chunk in self.state.chunks:
            chunk.train()
        return losses

    def _batches(self, dataset: Any, consumed_samples: int) -> Batches:
        training = self.config.training
        return MicroBatchIterator(
            dataset,
            consumed_samples,
            training.micro_batch_size,
            training.global_batch_size,
            self.runtime.dp_rank,
            self.runtime.dp_size,
        )
