"""Start and end of a distributed run: platform, process group, parallel state, seeds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch

from megatron_bitcpm.config import ParallelConfig, env_local_rank, env_rank, env_world_size
from megatron_bitcpm.errors import BitcpmError
from megatron_bitcpm.platforms import Platform, current_platform

COLLECTIVE_TIMEOUT_S = 600


@dataclass(frozen=True)
class Runtime:
    """This process's place in the run."""

    platform: Platform
    device: torch.device
    rank: int
    world_size: int
    tp_size: int
    pp_rank: int
    pp_size: int
    cp_size: int
    dp_rank: int
    dp_size: int

    @property
    def is_main(self) -> bool:
        """Whether this rank prints and writes."""
        return self.rank == 0


@contextmanager
def start_runtime(parallel: ParallelConfig, seed: int) -> Iterator[Runtime]:
    """Initialise torch.distributed and Megatron's parallel state; tear both down at the end.

    A process started without torchrun is a world of one. What the layout leaves is data parallel.
    """
    platform = current_platform()
    platform.prepare()
    # Megatron only after the platform is prepared: it reads some of torch at import.
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    device = platform.device(env_local_rank())
    owns_group = not torch.distributed.is_initialized()
    if owns_group:
        _start_process_group(platform)
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor_model_parallel_size,
            pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
            context_parallel_size=parallel.context_parallel_size,
        )
        torch.manual_seed(seed)
        model_parallel_cuda_manual_seed(seed)
        yield Runtime(
            platform=platform,
            device=device,
            rank=torch.distributed.get_rank(),
            world_size=torch.distributed.get_world_size(),
            tp_size=parallel_state.get_tensor_model_parallel_world_size(),
            pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
            pp_size=parallel_state.get_pipeline_model_parallel_world_size(),
            cp_size=parallel_state.get_context_parallel_world_size(),
            dp_rank=parallel_state.get_data_parallel_rank(),
            dp_size=parallel_state.get_data_parallel_world_size(),
        )
    finally:
        parallel_state.destroy_model_parallel()
        if owns_group:
            torch.distributed.destroy_process_group()


def _start_process_group(platform: Platform) -> None:
    rank, world_size = env_rank(), env_world_size()
    alone = world_size == 1
    try:
        torch.distributed.init_process_group(
            platform.collectives,
            timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S),
            store=torch.distributed.HashStore() if alone else None,
            # -1: torch reads torchrun's environment.
            rank=rank if alone else -1,
            world_size=1 if alone else -1,
        )
    except (RuntimeError, ValueError) as error:
        first_line = str(error).splitlines()[0].rstrip(".")
        raise BitcpmError(
            f"WORLD_SIZE={world_size}: cannot start {platform.collectives}: {first_line}. Start "
            "the ranks with torchrun."
        ) from error
