"""How fast models are converted, beside a plain copy of the same bytes, and in how much memory.

A model with random weights is made once. Every conversion runs in a process of its own, whose
anonymous memory is sampled; before and after each one runs

    dd if=<its weights> of=<a new file> bs=16M conv=fsync

which a conversion is divided by, so that a drift of the disk cancels. Reading the written model
again for the verification is timed apart. The input is in the page cache (``warm``) or is dropped
from it before each conversion and each dd (``cold``); what both write is flushed to disk.

What does not live here: the conversions, see `conversion.convert`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_bitcpm.arch.model import ModelConfig
from megatron_bitcpm.config import QuantConfig
from megatron_bitcpm.errors import BitcpmError

SHAPES = {
    # BitCPM-CANN report, table of models: 1.62 billion parameters, 3.2 GB.
    "1B": (
        ModelConfig(
            num_layers=28,
            hidden_size=2048,
            ffn_hidden_size=6144,
            num_attention_heads=16,
            num_query_groups=2,
            kv_channels=128,
            max_position_embeddings=4096,
        ),
        73448,
    ),
    "small": (
        ModelConfig(
            num_layers=4,
            hidden_size=1024,
            ffn_hidden_size=4096,
            num_attention_heads=16,
            num_query_groups=2,
            max_position_embeddings=4096,
        ),
        32768,
    ),
    "tiny": (
        ModelConfig(
            num_layers=2,
            hidden_size=64,
            ffn_hidden_size=128,
            num_attention_heads=4,
            num_query_groups=2,
            max_position_embeddings=128,
        ),
        512,
    ),
}
"""Name -> architecture and vocabulary size."""
ROOM = 10**9
"""Bytes of memory that are granted besides the tensors of a conversion."""
MIN_RATIO = {"plain": 0.5, "quantizing": 0.25}
"""Speed relative to dd that a conversion shall have."""
_SAMPLE_S = 0.01
_CHILD = """
import json, sys, time
from megatron_bitcpm.conversion.convert import convert
begin = time.perf_counter()
report = convert(sys.argv[1], sys.argv[2], **json.loads(sys.argv[3]))
seconds = {"total_seconds": time.perf_counter() - begin}
print(json.dumps(seconds | {"verify_seconds": report["verify_seconds"]}))
"""
"""The program of a conversion's process."""


@dataclass(frozen=True)
class _Case:
    """A conversion.

    Attributes:
        name: key of the result.
        input: which of the models that exist by then.
        settings: of `convert`.
        kind: of `MIN_RATIO`.
    """

    name: str
    input: str
    settings: dict[str, Any]
    kind: str = "plain"


CASES = (
    _Case("hf_to_hf", "hf", {}),
    _Case("hf_to_hf_quantizing", "hf_latent", {}, "quantizing"),
    _Case("hf_to_bin", "hf", {"weights": "bin"}),
    _Case("hf_to_bin_quantizing", "hf_latent", {"weights": "bin"}, "quantizing"),
    _Case("hf_to_torch_dist", "hf", {"format": "torch_dist", "pipeline_parallel_size": 2}),
    _Case("hf_to_legacy", "hf", {"format": "legacy", "pipeline_parallel_size": 2}),
    _Case("torch_dist_to_hf", "torch_dist", {}),
)


def bench_convert(
    shape: str = "1B", rounds: int = 1, cold: bool = False, folder: str | Path | None = None
) -> dict[str, Any]:
    """Run the benchmark.

    Args:
        shape: one of `SHAPES`.
        rounds: how often each conversion runs.
        cold: drop the input from the page cache before each conversion and each dd.
        folder: where a temporary folder is made, of about four times the model's size; default the
            system's.
    Returns:
        shape, bytes and largest_tensor_bytes of the model, threads, input (warm or cold), rounds;
        dd_mb_per_s: all of them in order; cases: for each conversion ``runs`` (seconds, mb_per_s,
        dd_before_mb_per_s, dd_after_mb_per_s, ratio to their mean, verify_seconds,
        verify_mb_per_s, peak_anonymous_bytes), the medians ratio, mb_per_s and verify_mb_per_s,
        min_ratio, the largest peak_anonymous_bytes, limit_bytes and shard_bytes (the largest
        output file of a Megatron target). MB are 10^6 bytes of weights.

    Raises:
        BitcpmError: an argument out of range, or a conversion that failed.
    """
    if shape not in SHAPES:
        raise BitcpmError(f"shape={shape}: is unknown. Use {', '.join(SHAPES)}.")
    if rounds < 1:
        raise BitcpmError(f"rounds={rounds}: measures nothing. Use 1 or more.")
    with tempfile.TemporaryDirectory(prefix="bitcpm-bench-", dir=folder) as root:
        return _Bench(Path(root), *SHAPES[shape], cold).run(shape, rounds)


class _Bench:
    """The models of a benchmark in a temporary folder."""

    def __init__(self, root: Path, model: ModelConfig, vocab_size: int, cold: bool) -> None:
        self.root, self.cold = root, cold
        self.largest, self.bytes = make_model(root / "hf", root / "hf_latent", model, vocab_size)
        self.dd: list[float] = []

    def run(self, shape: str, rounds: int) -> dict[str, Any]:
        runs: dict[str, list[dict[str, Any]]] = {case.name: [] for case in CASES}
        before = self._copy()
        for _ in range(rounds):
            for case in CASES:
                found = self._convert(case)
                after = self._copy()
                found |= {"dd_before_mb_per_s": before, "dd_after_mb_per_s": after}
                found["ratio"] = round(found["mb_per_s"] / ((before + after) / 2), 3)
                runs[case.name].append(found)
                before = after
            shutil.rmtree(self.root / "torch_dist")
        return {
            "shape": shape,
            "bytes": self.bytes,
            "largest_tensor_bytes": self.largest,
            "threads": torch.get_num_threads(),
            "input": "cold" if self.cold else "warm",
            "rounds": rounds,
            "dd_mb_per_s": self.dd,
            "cases": {case.name: self._summarize(case, runs[case.name]) for case in CASES},
        }

    def _summarize(self, case: _Case, runs: list[dict[str, Any]]) -> dict[str, Any]:
        shard = max(run.pop("largest_file_bytes") for run in runs)
        megatron = "format" in case.settings
        return {
            "runs": runs,
            **{
                key: statistics.median(run[key] for run in runs)
                for key in ("ratio", "mb_per_s", "verify_mb_per_s")
            },
            "min_ratio": MIN_RATIO[case.kind],
            "peak_anonymous_bytes": max(run["peak_anonymous_bytes"] for run in runs),
            "limit_bytes": (shard if megatron else 2 * self.largest) + ROOM,
            "shard_bytes": shard if megatron else None,
        }

    def _convert(self, case: _Case) -> dict[str, Any]:
        source, output = self.root / case.input, self.root / f"out_{case.name}"
        self._drop(source)
        report, peak = run_sampled(str(source), str(output), case.settings)
        files = [path.stat().st_size for path in output.rglob("*") if path.is_file()]
        if case.name == "hf_to_torch_dist":  # the input of another case
            output.rename(self.root / "torch_dist")
        else:
            shutil.rmtree(output)
        verify_s = report["verify_seconds"]
        write_s = report["total_seconds"] - verify_s
        return {
            "seconds": round(write_s, 3),
            "mb_per_s": round(self.bytes / 1e6 / write_s, 1),
            "verify_seconds": round(verify_s, 3),
            "verify_mb_per_s": round(self.bytes / 1e6 / verify_s, 1),
            "peak_anonymous_bytes": peak,
            "largest_file_bytes": max(files),
        }

    def _copy(self) -> float:
        """Copy the weights with dd, flushed to disk; return MB/s."""
        source, target = self.root / "hf" / "model.safetensors", self.root / "copy"
        self._drop(source.parent)
        begin = time.perf_counter()
        done = subprocess.run(
            ["dd", f"if={source}", f"of={target}", "bs=16M", "conv=fsync"],
            capture_output=True,
            text=True,
        )
        seconds = time.perf_counter() - begin
        if done.returncode:
            reason = " ".join(done.stderr.split())[-200:]
            raise BitcpmError(f"dd={target}: failed: {reason}. Free space, or name a folder.")
        target.unlink()
        self.dd.append(round(self.bytes / 1e6 / seconds, 1))
        return self.dd[-1]

    def _drop(self, folder: Path) -> None:
        """Drop the files of a folder from the page cache, if asked to; they are on disk already."""
        if not self.cold:
            return
        for path in folder.rglob("*"):
            if path.is_file():
                descriptor = os.open(path, os.O_RDONLY)
                try:
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                finally:
                    os.close(descriptor)


def make_model(plain: Path, latent: Path, model: ModelConfig, vocab_size: int) -> tuple[int, int]:
    """Write a Hugging Face folder with random weights, and one that says they are latents.

    Args:
        plain: folder to write, bfloat16, one safetensors file.
        latent: folder to write; its weights are a link to the first one's.
        model: the architecture.
        vocab_size: rows of the embedding.
    Returns:
        Bytes of the largest tensor, and of all.
    """
    from megatron_bitcpm.arch.hf_config import hf_config
    from megatron_bitcpm.arch.model import shapes_of
    from megatron_bitcpm.conversion.hf.modeling.writer import write_modeling_files
    from megatron_bitcpm.conversion.hf.safetensors_writer import write_safetensors
    from megatron_bitcpm.quantizer import Quantizer

    shapes = shapes_of(model, vocab_size)
    plain.mkdir(parents=True)
    latent.mkdir(parents=True)
    layout = {name: (shape, torch.bfloat16) for name, shape in shapes.items()}
    write_safetensors(plain / "model.safetensors", layout, _random_tensors(shapes))
    os.link(plain / "model.safetensors", latent / "model.safetensors")
    config = hf_config(model, "bfloat16", vocab_size)
    additions = write_modeling_files(latent, model, "latent", Quantizer(QuantConfig()))
    words = {"<s>": 0, "</s>": 1, "a": 2}
    tokenizer = {"model": {"type": "WordLevel", "vocab": words, "unk_token": "a"}}
    for folder, content in ((plain, config), (latent, config | additions)):
        (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    sizes = [2 * torch.Size(shape).numel() for shape in shapes.values()]
    return max(sizes), sum(sizes)


def _random_tensors(
    shapes: dict[str, tuple[int, ...]],
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield normal weights: cuts of one random block, so that gigabytes take seconds."""
    block = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)) * 0.02
    block = block.to(torch.bfloat16)
    for name, shape in shapes.items():
        size = torch.Size(shape).numel()
        start = zlib.crc32(name.encode()) % block.numel()
        tensor = block.roll(start).repeat(-(-size // block.numel()))[:size].view(shape)
        yield name, tensor if len(shape) > 1 else tensor + 1


def run_sampled(source: str, output: str, settings: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """Convert in a new process; return its times and its largest anonymous memory.

    Args:
        source, output, settings: arguments of `convert`.
    Returns:
        total_seconds from the call to its return, and verify_seconds, a part of them; the memory in
        bytes, sampled every 10 ms.

    Raises:
        BitcpmError: the conversion failed.
    """
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


def _read_anonymous_bytes(pid: int | None) -> int:
    """Return the anonymous resident memory of a process, 0 when it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except OSError:
        return 0
    match = re.search(r"^RssAnon:\s+(\d+) kB", status, re.MULTILINE)
    return int(match[1]) * 1024 if match else 0
