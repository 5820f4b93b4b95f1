"""How fast models are converted, beside a plain copy of the same bytes, and in how much memory.

A model with random weights is made once. Every conversion runs in a process of its own, whose
anonymous memory is sampled. Its speed is divided by that of a dd of the same weights before and
after it, so that a drift of the disk cancels. Reading the written model again for the verification
is timed apart. The input is in the page cache (``warm``) or is dropped from it before each
conversion and each dd (``cold``); what both write is flushed to disk.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_bitcpm.arch.model import ModelConfig
from megatron_bitcpm.bench.random_model import SHAPES, make_model
from megatron_bitcpm.bench.timing import medians
from megatron_bitcpm.errors import BitcpmError, one_line

ROOM = 10**9
"""Bytes of memory that are granted besides the tensors of a conversion."""
_SAMPLE_S = 0.01
# The program of a conversion's process. The total includes the verification.
_CHILD = """
import json, sys, time
from megatron_bitcpm.conversion.convert import convert
begin = time.perf_counter()
report = convert(sys.argv[1], sys.argv[2], **json.loads(sys.argv[3]))
seconds = {"total_seconds": time.perf_counter() - begin}
print(json.dumps(seconds | {"verify_seconds": report["verify_seconds"]}))
"""


@dataclass(frozen=True)
class Case:
    """A conversion of one of the models, or of what another conversion wrote."""

    name: str
    input: str
    settings: dict[str, Any]
    min_ratio: float = 0.5  # of its speed to that of dd


CASES = (
    Case("hf_to_hf", "hf", {}),
    Case("hf_to_hf_quantizing", "hf_latent", {}, 0.25),
    Case("hf_to_bin", "hf", {"weights": "bin"}),
    Case("hf_to_bin_quantizing", "hf_latent", {"weights": "bin"}, 0.25),
    Case("hf_to_torch_dist", "hf", {"format": "torch_dist", "pipeline_parallel_size": 2}),
    Case("hf_to_legacy", "hf", {"format": "legacy", "pipeline_parallel_size": 2}),
    Case("torch_dist_to_hf", "hf_to_torch_dist", {}),
)


def bench_convert(
    shape: str = "1B", rounds: int = 1, cold: bool = False, folder: str | Path | None = None
) -> dict[str, Any]:
    """Time all conversions of a model of `SHAPES`, and measure their memory.

    In the JSON each run has its ratio to the mean of the dd before and after; shard_bytes is the
    largest output file of a Megatron target. MB are 10^6 bytes of weights.
    """
    if shape not in SHAPES:
        raise BitcpmError(f"shape={shape}: is unknown. Use {', '.join(SHAPES)}.")
    if rounds < 1:
        raise BitcpmError(f"rounds={rounds}: measures nothing. Use 1 or more.")
    with tempfile.TemporaryDirectory(prefix="bitcpm-bench-", dir=folder) as root:
        bench = _Bench(Path(root), *SHAPES[shape], cold)
        bench.copy()
        found = [[bench.convert(case) for case in CASES] for _ in range(rounds)]
        return {
            "shape": shape,
            "bytes": bench.bytes,
            "largest_tensor_bytes": bench.largest,
            "threads": torch.get_num_threads(),
            "input": "cold" if cold else "warm",
            "rounds": rounds,
            "dd_mb_per_s": bench.dd,
            "cases": {
                case.name: bench.summarize(case, runs)
                for case, *runs in zip(CASES, *found, strict=True)
            },
        }


class _Bench:
    """The models of a benchmark in a temporary folder."""

    def __init__(self, root: Path, model: ModelConfig, vocab_size: int, cold: bool) -> None:
        self.root, self.cold = root, cold
        self.largest, self.bytes = make_model(root / "hf", root / "hf_latent", model, vocab_size)
        self.dd: list[float] = []

    def convert(self, case: Case) -> dict[str, Any]:
        """Convert once, then copy; return what both took."""
        source, output = self.root / case.input, self.root / case.name
        self._drop(source)
        shutil.rmtree(output, ignore_errors=True)  # of the last round
        report, peak = run_sampled(str(source), str(output), case.settings)
        files = [path.stat().st_size for path in output.rglob("*") if path.is_file()]
        if case.name not in {other.input for other in CASES}:
            shutil.rmtree(output)
        verify_s = report["verify_seconds"]
        write_s = report["total_seconds"] - verify_s
        before, after = self.dd[-1], self.copy()
        mb_per_s = round(self.bytes / 1e6 / write_s, 1)
        return {
            "seconds": round(write_s, 3),
            "mb_per_s": mb_per_s,
            "verify_seconds": round(verify_s, 3),
            "verify_mb_per_s": round(self.bytes / 1e6 / verify_s, 1),
            "peak_anonymous_bytes": peak,
            "largest_file_bytes": max(files),
            "dd_before_mb_per_s": before,
            "dd_after_mb_per_s": after,
            "ratio": round(mb_per_s / ((before + after) / 2), 3),
        }

    def copy(self) -> float:
        """Copy the weights with dd, flushed to disk; return MB/s."""
        source, target = self.root / "hf" / "model.safetensors", self.root / "copy"
        self._drop(source.parent)
        command = ["dd", f"if={source}", f"of={target}", "bs=16M", "conv=fsync"]
        begin = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True)
        elapsed_s = time.perf_counter() - begin
        if done.returncode:
            raise BitcpmError(
                f"dd={target}: failed: {one_line(done.stderr)}. Free space, or name a folder."
            )
        self.dd.append(round(self.bytes / 1e6 / elapsed_s, 1))
        target.unlink()
        return self.dd[-1]

    def summarize(self, case: Case, runs: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the runs of a case with their medians and limits."""
        shard = max(run.pop("largest_file_bytes") for run in runs)
        megatron = "format" in case.settings
        keys = ("ratio", "mb_per_s", "verify_mb_per_s")
        return {
            "runs": runs,
            **medians({key: [run[key] for run in runs] for key in keys}),
            "min_ratio": case.min_ratio,
            "peak_anonymous_bytes": max(run["peak_anonymous_bytes"] for run in runs),
            "limit_bytes": (shard if megatron else 2 * self.largest) + ROOM,
            "shard_bytes": shard if megatron else None,
        }

    def _drop(self, folder: Path) -> None:
        """Drop the files of a folder from the page cache, if asked to; they are on disk already."""
        for path in folder.rglob("*") if self.cold else ():
            if path.is_file():
                with path.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run_sampled(source: str, output: str, settings: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """Convert in a new process; return what it printed, and its most anonymous memory in bytes."""
    process = subprocess.Popen(
        [sys.executable, "-c", _CHILD, source, output, json.dumps(settings)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    peak = 0
    while process.poll() is None:
        peak = max(peak, _read_anonymous_bytes(process.pid))
        time.sleep(_SAMPLE_S)
    printed, errors = process.communicate()
    if process.returncode:
        reason = (errors.strip().splitlines() or ["the process died"])[-1]
        raise BitcpmError(f"output={output}: {reason.rstrip('.')}. See the message.")
    report: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return report, peak


def _read_anonymous_bytes(pid: int) -> int:
    """Anonymous resident memory of a process, 0 when it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except OSError:
        return 0
    match = re.search(r"^RssAnon:\s+(\d+) kB", status, re.MULTILINE)
    return int(match[1]) * 1024 if match else 0
