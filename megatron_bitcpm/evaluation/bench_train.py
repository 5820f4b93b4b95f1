"""What ternary training costs: the operators' share of a step, and steps A/B.

One process, one rank, synthetic tokens, the layer shapes of the 0.5B model. The vocabulary is kept
small on purpose: a real one adds work that no quantiser touches and would flatter the ratios.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch

from megatron_bitcpm.config import ParallelConfig, RunConfig
from megatron_bitcpm.errors import ConfigError
from megatron_bitcpm.training.runtime import start_runtime

MICRO_BATCHES, SEQ_LENGTH, VOCAB_SIZE = 8, 512, 1024
_MODES = ("full_precision", "every_step", "every_forward")
# Two-sided 95 % quantiles of Student's t by degrees of freedom.
_STUDENT_T = {
    9: 2.262,
    10: 2.228,
    11: 2.201,
    12: 2.179,
    13: 2.160,
    14: 2.145,
    15: 2.131,
    19: 2.093,
    24: 2.064,
    29: 2.045,
}


def bench_config(mode: str) -> RunConfig:
    """Return the benchmark's run: 0.5B layer shapes, two layers, bf16."""
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
            "quant": {
                "enabled": mode != "full_precision",
                "requantize": mode if mode != "full_precision" else "auto",
            },
            "data": {"prefix": "synthetic", "tokenizer": "synthetic", "seq_length": SEQ_LENGTH},
            "optimizer": {"lr": 1e-4},
            "training": {
                "train_iters": 1000,
                "micro_batch_size": 1,
                "global_batch_size": MICRO_BATCHES,
            },
            "checkpoint": {"directory": "none"},
        }
    )


def bench_train(pairs: int = 12) -> dict[str, Any]:
    """Run the benchmark.

    Args:
        pairs: interleaved pairs of steps for each of the two modes, at least 10.

    Returns:
        Operator shares (fraction of a step's wall time spent inside ``bitcpm::*`` operators) and
        time ratios ternary / full precision with their 95 % intervals.
    """
    if pairs < 10:
        raise ConfigError(f"--pairs={pairs}: is too few for an interval. Use 10 or more.")
    with start_runtime(ParallelConfig(), seed=1) as runtime:
        from megatron_bitcpm.training.setup import build_train_state

        states = {m: build_train_state(bench_config(m), runtime, VOCAB_SIZE) for m in _MODES}
        for state in states.values():
            for _ in range(2):
                train_step(state, runtime.device)
        ours_s = {m: _profile_operators(states[m], runtime.device) for m in _MODES[1:]}
        ratios: dict[str, list[float]] = {m: [] for m in _MODES[1:]}
        seconds: dict[str, list[float]] = {m: [] for m in _MODES}
        for index in range(pairs):
            for mode in _MODES[1:]:
                # Alternate the order within a pair, so that a drift of the machine cancels.
                order = ("full_precision", mode)
                times = {
                    m: _timed(states[m], runtime.device)
                    for m in (order if index % 2 == 0 else order[::-1])
                }
                ratios[mode].append(times[mode] / times["full_precision"])
                for m, value in times.items():
                    seconds[m].append(value)
        step_s = {m: statistics.median(values) for m, values in seconds.items()}
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
            "operator_share": {m: ours_s[m] / step_s[m] for m in _MODES[1:]},
            "time_ratio_to_full_precision": {m: _interval(r) for m, r in ratios.items()},
            "pairs": pairs,
        }


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


def train_step(state: Any, device: torch.device) -> None:
    """Do one step of the benchmark on synthetic tokens."""
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


def _timed(state: Any, device: torch.device) -> float:
    start = time.perf_counter()
    train_step(state, device)
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()
    return time.perf_counter() - start


def _profile_operators(state: Any, device: torch.device, steps: int = 3) -> float:
    """Return the seconds of a step spent inside our operators, children included, by the profiler.

    Divided by the time of steps without the profiler, which would hide its own cost in the share.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(steps):
            train_step(state, device)
    ours_us = sum(
        event.cpu_time_total for event in profile.key_averages() if event.key.startswith("bitcpm::")
    )
    return ours_us / 1e6 / steps


def _interval(ratios: list[float]) -> dict[str, float]:
    """Geometric mean of ratios with its 95 % interval (Student's t on logarithms)."""
    logs = [math.log(ratio) for ratio in ratios]
    mean, freedom = statistics.fmean(logs), len(logs) - 1
    # Between tabulated degrees of freedom the next smaller one is the cautious choice.
    quantile = _STUDENT_T[max(d for d in _STUDENT_T if d <= freedom)]
    half = quantile * statistics.stdev(logs) / math.sqrt(len(logs))
    return {
        "ratio": math.exp(mean),
        "low_95": math.exp(mean - half),
        "high_95": math.exp(mean + half),
    }
