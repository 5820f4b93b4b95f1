"""What differs between a CPU, a GPU and an NPU: device, collectives, preparation of Megatron.

`current_platform` finds out; `Platform.prepare` is the one visible call that makes Megatron run
there. On an NPU it is Ascend's own ``transfer_to_npu``, on a CPU the reversible list of
`patching.cpu`, and everywhere the few corrections of `patching.core`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
from dataclasses import dataclass
from typing import Any

import torch

from megatron_bitcpm.config import env_platform
from megatron_bitcpm.errors import BackendError
from megatron_bitcpm.patching.core import megatron_patches
from megatron_bitcpm.patching.cpu import cpu_patches
from megatron_bitcpm.patching.patch import PatchSet

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Platform:
    """A kind of device, its torch.distributed backend, and how many of it this process sees.

    The name, ``cpu``, ``cuda`` or ``npu``, is also torch's device type.
    """

    name: str
    collectives: str
    device_count: int

    def device(self, local_rank: int = 0) -> torch.device:
        """Return this process's device and make it current; `local_rank` is torchrun's."""
        if self.name == "cpu":
            return torch.device("cpu")
        if local_rank >= self.device_count:
            raise BackendError(
                f"LOCAL_RANK={local_rank}: this machine shows {self.device_count} {self.name} "
                "device(s). Start at most one process per device (torchrun --nproc_per_node)."
            )
        device = torch.device(self.name, local_rank)
        torch.get_device_module(device).set_device(device)
        return device

    def prepare(self) -> None:
        """Make stock megatron-core run on this platform; may be called again."""
        if self.name == "npu":
            importlib.import_module("torch_npu.contrib.transfer_to_npu")
        for patches in self._patch_sets():
            if not patches.is_applied:
                patches.apply()
                logger.info("%s: %d symbols replaced", patches.name, len(patches.patches))

    def restore(self) -> None:
        """Undo `prepare`, except for `transfer_to_npu`, which cannot be undone."""
        for patches in reversed(self._patch_sets()):
            patches.revert()

    def _patch_sets(self) -> list[PatchSet]:
        # Those of torch first: Megatron is imported by its own and must see the prepared torch.
        return [*([cpu_patches()] if self.name == "cpu" else []), megatron_patches()]


@functools.cache
def current_platform() -> Platform:
    """Find this machine's platform, or the one that ``BITCPM_PLATFORM`` forces."""
    wanted = env_platform()
    if wanted not in ("", "cpu", "cuda", "npu"):
        raise BackendError(f"BITCPM_PLATFORM={wanted}: unknown platform. Use cpu, cuda or npu.")
    if wanted in ("", "npu") and importlib.util.find_spec("torch_npu"):
        importlib.import_module("torch_npu")
        npu: Any = torch.npu  # type: ignore[attr-defined]
        if npu.is_available():
            return Platform("npu", "hccl", npu.device_count())
    if wanted in ("", "cuda") and torch.cuda.is_available():
        return Platform("cuda", "nccl", torch.cuda.device_count())
    if wanted in ("", "cpu"):
        return Platform("cpu", "gloo", 1)
    raise BackendError(
        f"BITCPM_PLATFORM={wanted}: no such device here. Unset it to use what is present."
    )
