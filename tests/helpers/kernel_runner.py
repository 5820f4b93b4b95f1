"""Client of the kernel runners: test executables that run one operator per line of standard input.

A command is ``OP key=value ...``, the answer one line, ``ok [key=value ...]`` or ``error TEXT``.
Arrays travel in raw little-endian files: the client writes the inputs, the runner the outputs.
The runner is one process for many commands. It never gets to hang a test: an answer that does not
come in time kills it.
"""

from __future__ import annotations

import contextlib
import os
import select
import struct
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

DTYPE_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
# Sanitizers stop at the first finding: the process dies and the test shows its report.
SANITIZER_ENV = {
    "ASAN_OPTIONS": "halt_on_error=1:abort_on_error=1",
    "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
}


class KernelRunnerError(Exception):
    """The runner refused a command (`died` is False), or crashed, hung or broke the protocol."""

    def __init__(self, message: str, died: bool = False) -> None:
        super().__init__(message)
        self.died = died


class KernelRunner:
    """One runner process and the directory of its files; a context manager.

    Args:
        command: executable and its arguments.
        timeout_s: seconds an answer may take.
    """

    def __init__(self, command: Sequence[str], timeout_s: float = 120.0) -> None:
        self.command = list(command)
        self.timeout_s = timeout_s
        self._folder = tempfile.TemporaryDirectory(prefix="bitcpm-runner-")
        self.folder = Path(self._folder.name)
        self._process: subprocess.Popen[bytes] | None = None
        self._received = b""

    def __enter__(self) -> KernelRunner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process and remove its files; raises when it does not exit with 0."""
        try:
            self._end()
        finally:
            self._folder.cleanup()

    def call(
        self,
        op: str,
        inputs: Mapping[str, torch.Tensor],
        outputs: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        **keys: object,
    ) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """Run one operator.

        Args:
            op: name of the operator.
            inputs: arrays by key, written to files.
            outputs: dtype and shape of the arrays that come back, by key.
            keys: the remaining keys of the command, values as they are printed.
        Returns:
            The output arrays by key, and the keys of the answer.
        Raises:
            KernelRunnerError: the runner answered with an error, died, was silent for longer than
                `timeout_s`, or wrote files of another size.
        """
        words = [op, *(f"{key}={value}" for key, value in keys.items())]
        for key, array in inputs.items():
            path = self.folder / f"{key}.in"
            path.write_bytes(array.contiguous().view(torch.uint8).numpy().tobytes())
            words.append(f"{key}={path}")
        for key in outputs:
            path = self.folder / f"{key}.out"
            path.unlink(missing_ok=True)  # an old result must not pass for a new one
            words.append(f"{key}={path}")
        answer = self._ask(" ".join(words))
        status, _, rest = answer.partition(" ")
        if status == "error":
            raise KernelRunnerError(rest)
        if status != "ok":
            raise self._die(f"answered {answer!r} to {op}")
        arrays = {key: self._read(key, *described) for key, described in outputs.items()}
        return arrays, dict(word.split("=", 1) for word in rest.split())

    def _read(self, key: str, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        path = self.folder / f"{key}.out"
        data = bytearray(path.read_bytes() if path.exists() else b"")
        wanted = int(np.prod(shape)) * dtype.itemsize
        if len(data) != wanted or not path.exists():
            raise KernelRunnerError(f"{key} has {len(data)} bytes, not {wanted}")
        return torch.frombuffer(data, dtype=dtype).reshape(shape) if data else torch.empty(shape)

    def _ask(self, line: str) -> str:
        if self._process is None:
            self._start()
        assert self._process and self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._die("ended before the command") from None
        end = time.monotonic() + self.timeout_s
        while b"\n" not in self._received:
            ready, _, _ = select.select([self._process.stdout], [], [], end - time.monotonic())
            if not ready:
                raise self._die(f"no answer within {self.timeout_s:g} s to {line.split()[0]}")
            data = os.read(self._process.stdout.fileno(), 1 << 16)
            if not data:
                raise self._die(f"ended during {line.split()[0]}")
            self._received += data
        answer, _, self._received = self._received.partition(b"\n")
        return answer.decode()

    def _start(self) -> None:
        self._errors = (self.folder / "stderr.txt").open("wb")
        self._received = b""
        self._process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, **SANITIZER_ENV},
        )

    def _die(self, what: str) -> KernelRunnerError:
        """Kill the process and return the error that shows what it said last."""
        assert self._process
        # A crashing sanitizer still writes its report.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5.0 if what.startswith("ended") else 0.0)
        self._process.kill()
        status = self._process.wait()
        self._forget()
        said = (self.folder / "stderr.txt").read_text(errors="replace")[-4000:]
        return KernelRunnerError(f"{self.command[0]} {what} (status {status})\n{said}", died=True)

    def _end(self) -> None:
        if self._process is None:
            return
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            status = self._process.wait(self.timeout_s)
        except subprocess.TimeoutExpired:
            raise self._die("no answer to the end of its input") from None
        if status:
            raise self._die("failed at the end of its input")
        self._forget()

    def _forget(self) -> None:
        assert self._process and self._process.stdin and self._process.stdout
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()
        self._errors.close()
        self._process = None


def float_bits(value: float) -> str:
    """Eight hex digits: the bits of `value` as float32, the form in which eps travels."""
    return struct.pack(">f", value).hex()


class RunnerOperators:
    """The operators of one runner with the arguments of `megatron_bitcpm.ops`; CPU tensors.

    Args:
        runner: the process.
        keys: sent with every command, for example isa="neon" or blocks=3.
    """

    def __init__(self, runner: KernelRunner, **keys: object) -> None:
        self.runner = runner
        self.keys = keys
        self.stats: dict[str, str] = {}

    def fake_quantize(
        self,
        w: torch.Tensor,
        group_size: int = -1,
        eps: float = 1e-5,
        grid: str = "ternary",
        inplace: int = 0,
    ) -> torch.Tensor:
        """wq of w, [O, I]."""
        keys = self._shape(w, group_size) | {"grid": grid, "eps": float_bits(eps)}
        out = {"wq": (w.dtype, tuple(w.shape))}
        return self._call("fake_quantize", {"w": w}, out, inplace=inplace, **keys)["wq"]

    def quantize(
        self, w: torch.Tensor, group_size: int = -1, eps: float = 1e-5, grid: str = "ternary"
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes int8 [O, I] and scales float32 [O, G] of w."""
        keys = self._shape(w, group_size) | {"grid": grid, "eps": float_bits(eps)}
        scales_shape = (w.shape[0], w.shape[1] // int(keys["group_len"]))
        out = {"codes": (torch.int8, tuple(w.shape)), "scales": (torch.float32, scales_shape)}
        got = self._call("quantize", {"w": w}, out, **keys)
        return got["codes"], got["scales"]

    def abs_sums(self, w: torch.Tensor, group_size: int = -1) -> torch.Tensor:
        """Sums float32 [O, G] of w."""
        keys = self._shape(w, group_size)
        shape = (w.shape[0], w.shape[1] // int(keys["group_len"]))
        return self._call("abs_sums", {"w": w}, {"sums": (torch.float32, shape)}, **keys)["sums"]

    def fake_quantize_with_scales(
        self, w: torch.Tensor, scales: torch.Tensor, grid: str = "ternary", inplace: int = 0
    ) -> torch.Tensor:
        """wq of w under scales, [O, I]."""
        keys = self._shape(w, w.shape[1] // scales.shape[1]) | {"grid": grid}
        inputs, out = {"w": w, "scales": scales}, {"wq": (w.dtype, tuple(w.shape))}
        return self._call("fake_quantize_with_scales", inputs, out, inplace=inplace, **keys)["wq"]

    def pack2(self, codes: torch.Tensor) -> torch.Tensor:
        """Packed bytes of codes, uint8."""
        rows, cols = codes.shape
        out = {"packed": (torch.uint8, (rows, -(-cols // 128) * 32))}
        packed = self._call("pack2", {"codes": codes}, out, rows=rows, cols=cols)["packed"]
        self._refuse_bad_row("codes")
        return packed

    def unpack2(self, packed: torch.Tensor, in_features: int) -> torch.Tensor:
        """Codes of packed bytes, int8."""
        rows = packed.shape[0]
        out = {"codes": (torch.int8, (rows, in_features))}
        codes = self._call("unpack2", {"packed": packed}, out, rows=rows, cols=in_features)["codes"]
        self._refuse_bad_row("packed")
        return codes

    def int8_per_token(self, x: torch.Tensor) -> torch.Tensor:
        """x on the int8 grid of each token; x is [tokens, I]."""
        keys = {"dtype": DTYPE_NAMES[x.dtype], "rows": x.shape[0], "cols": x.shape[1]}
        return self._call("int8_per_token", {"x": x}, {"xq": (x.dtype, tuple(x.shape))}, **keys)[
            "xq"
        ]

    def _refuse_bad_row(self, name: str) -> None:
        # The kernels say which row they cannot use; the operators make a message of it.
        row = int(self.stats.get("bad_row", "-1"))
        if row >= 0:
            raise KernelRunnerError(f"{name}[{row}] is bad")

    def _shape(self, w: torch.Tensor, group_size: int) -> dict[str, object]:
        rows, cols = w.shape
        group_len = cols if group_size == -1 else group_size
        dtype = DTYPE_NAMES[w.dtype]
        return {"dtype": dtype, "rows": rows, "cols": cols, "group_len": group_len}

    def _call(
        self,
        op: str,
        inputs: Mapping[str, torch.Tensor],
        outputs: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        **keys: object,
    ) -> dict[str, torch.Tensor]:
        arrays, self.stats = self.runner.call(op, inputs, outputs, **keys, **self.keys)
        return arrays
