"""The trainer's side of checkpoints: where a run may start, what it saves, what it continues."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING

from megatron_bitcpm.checkpoint.init_from import check_init_from, find_origin
from megatron_bitcpm.checkpoint.retention import clean_leftovers, lock_run
from megatron_bitcpm.checkpoint.store import (
    find_checkpoint,
    has_checkpoints,
    read_config,
    read_state,
    write_error,
)
from megatron_bitcpm.config import RunConfig
from megatron_bitcpm.errors import BitcpmError, CheckpointError, ConfigError
from megatron_bitcpm.parallel.agree import from_main_rank, on_all_ranks
from megatron_bitcpm.training.resume import Progress, check_resumable, check_same_data
from megatron_bitcpm.training.runtime import Runtime

if TYPE_CHECKING:
    from megatron_bitcpm.checkpoint.saver import SaveReport
    from megatron_bitcpm.training.setup import TrainState

logger = logging.getLogger(__name__)


def check_run_folder(config: RunConfig, resume: bool) -> None:
    """Refuse to mix two runs in one folder, before anything is built or written; collective."""
    directory = Path(config.checkpoint.directory)

    def check() -> None:
        if resume:
            find_checkpoint(directory)
        elif has_checkpoints(directory):
            raise ConfigError(
                f"checkpoint.directory={directory}: holds checkpoints of an earlier run. Use "
                "--resume to continue it, or another folder."
            )
        elif config.checkpoint.init_from:
            origin = find_origin(config.checkpoint.init_from)
            check_init_from(config, origin.model, origin.folder)

    on_all_ranks(check, partial(_unreadable, directory), main_only=True)


def _unreadable(folder: str | Path, reason: str) -> BitcpmError:
    return CheckpointError(
        f"checkpoint={folder}: cannot be read: {reason}. Name a readable folder."
    )


class Checkpointer:
    """Saves and restores one run; all methods are collective over all ranks."""

    def __init__(
        self,
        config: RunConfig,
        runtime: Runtime,
        state: TrainState,
        data_facts: dict[str, str],
        vocab_size: int,
    ) -> None:
        from megatron_bitcpm.checkpoint.saver import CheckpointSaver

        self._config = config
        self._state = state
        self._data_facts = data_facts
        self._directory = Path(config.checkpoint.directory)
        self._facts = {
            "world_size": runtime.world_size,
            "vocab_size": vocab_size,
            "padded_vocab_size": state.padded_vocab_size,
            "quantizer": state.ternary.quantizer.stamp() if state.ternary else None,
        }
        self.saver = CheckpointSaver(config, runtime.device)
        self._lock: IO[str] | None = None

    def prepare_folder(self) -> None:
        """Make the run's folder, lock it, and clean up what a crash left in it."""

        def prepare() -> None:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._lock = lock_run(self._directory)
            clean_leftovers(self._directory)
            probe = self._directory / ".tmp-writable"
            probe.write_text("x", encoding="utf-8")
            probe.unlink()

        on_all_ranks(prepare, partial(write_error, self._directory), main_only=True)

    def save(self, progress: Progress, valid_loss: float | None) -> list[SaveReport]:
        """Write a checkpoint of latent weights, or begin to; return what was published."""
        facts = {**asdict(progress), **self._data_facts, **self._facts, "valid_loss": valid_loss}
        state = self._state
        with self._latents():
            return self.saver.save(
                state.chunks, state.optimizer, state.scheduler, asdict(progress), facts
            )

    def has_checkpoint(self) -> bool:
        """Whether the run has saved anything."""
        return from_main_rank(
            lambda: has_checkpoints(self._directory), partial(_unreadable, self._directory)
        )

    def load(self) -> Progress:
        """Restore the newest checkpoint of the run's folder."""
        from megatron_bitcpm.checkpoint.state import load_state

        folder = from_main_rank(self._find_resumable, partial(_unreadable, self._directory))
        state = self._state
        with self._latents():
            seed = self._config.training.seed
            progress = load_state(folder, state.chunks, state.optimizer, state.scheduler, seed=seed)
        logger.info("resumed from %s", folder)
        return Progress(**progress)

    def _find_resumable(self) -> Path:
        folder = find_checkpoint(self._directory)
        check_resumable(self._config, read_config(folder), folder)
        check_same_data(self._config, self._data_facts, read_state(folder), folder)
        return folder

    def initialize(self, source: str) -> None:
        """Take the latent weights of another run; all else stays fresh."""
        from megatron_bitcpm.checkpoint.state import load_weights

        folder = from_main_rank(lambda: self._find_origin(source), partial(_unreadable, source))
        with self._latents():
            load_weights(folder, self._state.chunks)
            self._state.optimizer.reload_model_params()
        logger.info("started from the weights of %s", folder)

    def _find_origin(self, source: str) -> Path:
        origin = find_origin(source)
        check_init_from(self._config, origin.model, origin.folder)
        if origin.tokenizer_sha256 not in (None, self._data_facts["tokenizer_sha256"]):
            raise ConfigError(
                f"data.tokenizer={self._config.data.tokenizer}: checkpoint.init_from "
                f"{origin.folder} was trained with another tokenizer. Use that tokenizer: the "
                "embeddings belong to its ids."
            )
        return origin.folder

    def _latents(self) -> AbstractContextManager[None]:
        return self._state.ternary.latents() if self._state.ternary else nullcontext()
