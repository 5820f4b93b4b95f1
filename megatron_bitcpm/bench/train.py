"""What ternary training costs: the operators' share of a step, and steps A/B.

One rank, synthetic tokens, two layers of the 0.5B model's shapes. The vocabulary is kept small on
purpose: a real one adds work that no quantiser touches and would flatter the ratios.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from megatron_bitcpm.bench.timing import interleave, medians, ratios, time_s
from megatron_bitcpm.config import ParallelConfig, RunConfig
from megatron_bitcpm.errors import ConfigError
from megatron_bitcpm.training.runtime import Runtime, start_runtime

MICRO_BATCHES, SEQ_LENGTH, VOCAB_SIZE = 8, 512, 1024
_PLAIN = "full_precision"
_TERNARY = ("every_step", "every_forward")
# Two-sided 95 % quantiles of Student's t by degrees of freedom.
_FREEDOM = (9, 10, 11, 12, 13, 14, 15, 19, 24, 29)
_QUANTILES = (2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.093, 2.064, 2.045)


def bench_train(pairs: int = 12) -> dict[str, Any]:
    """Measure operator shares, and time ratios ternary / full precision with 95 % intervals."""
    if pairs < 10:
        raise ConfigError(f"--pairs={pairs}: is too few for an interval. Use 10 or more.")
    with start_runtime(ParallelConfig(), seed=1) as runtime:
        states = {mode: build_state(mode, runtime) for mode in (_PLAIN, *_TERNARY)}
        # Each ternary step has one of full precision beside it.
        seconds = interleave(
            {
                (mode, side): partial(time_step, states[side], runtime.device)
                for mode in _TERNARY
                for side in (_PLAIN, mode)
            },
            pairs,
            alternate=True,
        )
        ours_s = {mode: _profile_operators(states[mode], runtime.device) for mode in _TERNARY}
    plain_s = [second for mode in _TERNARY for second in seconds[mode, _PLAIN]]
    step_s = medians({_PLAIN: plain_s} | {mode: seconds[mode, mode] for mode in _TERNARY})
    return {
        "shapes": {
            **bench_config("every_step").model.model_dump(exclude_none=True),
            "vocab_size": VOCAB_SIZE,
            "micro_batches": MICRO_BATCHES,
            "tokens_per_micro_batch": SEQ_LENGTH,
        },
        "device": runtime.platform.name,
        "threads": torch.get_num_threads(),
        "step_s": step_s,
        # Of steps without the profiler, among which its own cost does not hide.
        "operator_share": {mode: ours_s[mode] / step_s[mode] for mode in _TERNARY},
        "time_ratio_to_full_precision": {
            mode: _interval(ratios(seconds[mode, mode], seconds[mode, _PLAIN])) for mode in _TERNARY
        },
        "pairs": pairs,
    }


def bench_config(mode: str, **checkpoint: Any) -> RunConfig:
    """Return the run of a mode: full_precision, every_step or every_forward; in bf16."""
    return RunConfig.model_validate(
        {
            "model": {
                "num_layers": 2,
                "hidden_size": 1024,
                "ffn_hidden_size": 4096,
                "num_attention_heads": 16,
                "num_query_groups": 2,
                "max_position_embeddings": SEQ_LENGTH,
                "share_embeddings_and_output_weights": True,
            },
            "quant": {"enabled": False} if mode == _PLAIN else {"requantize": mode},
            "data": {"prefix": "synthetic", "tokenizer": "synthetic", "seq_length": SEQ_LENGTH},
            "optimizer": {"lr": 1e-4},
            "training": {
                "train_iters": 1000,
                "micro_batch_size": 1,
                "global_batch_size": MICRO_BATCHES,
            },
            "checkpoint": {"directory": "none", **checkpoint},
        }
    )


def build_state(mode: str, runtime: Runtime) -> Any:
    """Build model and optimizer of `bench_config` inside `start_runtime`."""
    from megatron_bitcpm.training.setup import build_train_state

    return build_train_state(bench_config(mode), runtime, VOCAB_SIZE)


def train_step(state: Any, device: torch.device) -> None:
    """Do one step on synthetic tokens, to its end on the device."""
    from megatron_bitcpm.training.objectives.next_token import NextToken
    from megatron_bitcpm.training.step import run_schedule

    for chunk in state.chunks:
        chunk.zero_grad_buffer()
    state.optimizer.zero_grad()
    run_schedule(
        state.chunks,
        NextToken(device),
        _tokens(device),
        num_microbatches=MICRO_BATCHES,
        micro_batch_size=1,
        seq_length=SEQ_LENGTH,
        device=device,
    )
    state.optimizer.step()
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()


def time_step(state: Any, device: torch.device) -> float:
    """Return the seconds of `train_step`."""
    return time_s(lambda: train_step(state, device))


def _tokens(device: torch.device) -> Iterator[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(MICRO_BATCHES):
        tokens_BS = torch.randint(0, VOCAB_SIZE, (1, SEQ_LENGTH + 1), generator=generator)
        yield {
            "tokens": tokens_BS[:, :-1].to(device),
            "labels": tokens_BS[:, 1:].to(device),
            "loss_mask": torch.ones(1, SEQ_LENGTH, device=device),
            "position_ids": torch.arange(SEQ_LENGTH, device=device)[None],
        }


def _profile_operators(state: Any, device: torch.device, steps: int = 3) -> float:
    """Seconds of a step spent inside our operators, children included, by the profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(steps):
            train_step(state, device)
    ours_us = sum(
        event.cpu_time_total for event in profile.key_averages() if event.key.startswith("bitcpm::")
    )
    return ours_us / 1e6 / steps


def _interval(values: list[float]) -> dict[str, float]:
    """Geometric mean of ratios with its 95 % interval (Student's t on logarithms)."""
    logs = [math.log(value) for value in values]
    mean, freedom = statistics.fmean(logs), len(logs) - 1
    # Between tabulated degrees of freedom the next smaller one is the cautious choice.
    quantile = [q for d, q in zip(_FREEDOM, _QUANTILES, strict=True) if d <= freedom][-1]
    half = quantile * statistics.stdev(logs) / math.sqrt(len(logs))
    return {
        "ratio": math.exp(mean),
        "low_95": math.exp(mean - half),
        "high_95": math.exp(mean + half),
    }
