"""The CPU platform: stock megatron-core trains on gloo, unedited.

Megatron names CUDA in literals (``device='cuda'``), in type strings (``torch.cuda.FloatTensor``)
and through `torch.cuda` calls. What is replaced here is what *torch* answers, never a file of
Megatron; the technique is that of Ascend's ``transfer_to_npu``. On a machine with an accelerator
nothing of this is used. CUDA's and the CPU's random generators become one stream.
"""

from __future__ import annotations

import collections
import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._device import _device_constructors

from megatron_bitcpm.patching.patch import Patch, PatchSet

_FACTORIES = [
    "tensor",
    "as_tensor",
    "zeros",
    "empty",
    "ones",
    "full",
    "arange",
    "linspace",
    "eye",
    "rand",
    "randn",
    "randint",
    "randperm",
    "zeros_like",
    "empty_like",
    "ones_like",
    "full_like",
    "rand_like",
    "randn_like",
    "empty_strided",
]


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        device = device.type
    return isinstance(device, str) and device.split(":")[0] == "cuda"


def _on_cpu(original: Callable[..., Any]) -> Callable[..., Any]:
    """A tensor factory, or `Tensor.to`, for which CUDA is the CPU, and pinned memory ordinary."""

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        args = tuple("cpu" if _is_cuda(value) else value for value in args)
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)
        return original(*args, **kwargs)

    return wrapper


def _tensor_type(original: Callable[..., Any]) -> Callable[..., Any]:
    """`Tensor.type()` with the ``cuda.`` prefix that Megatron's optimizer compares with."""

    @functools.wraps(original)
    def wrapper(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        if isinstance(result, str) and result.startswith("torch.") and ".cuda." not in result:
            return "torch.cuda." + result.removeprefix("torch.")
        return result

    return wrapper


def _do_nothing(*args: Any, **kwargs: Any) -> None:
    pass


class _CpuEvent:
    """Stands for `torch.cuda.Event`: CPU work is done when it is issued."""

    __init__ = record = wait = synchronize = _do_nothing

    def query(self) -> bool:
        return True


class _CpuStream:
    """Stands for `torch.cuda.Stream`."""

    __init__ = wait_stream = wait_event = synchronize = _do_nothing

    def record_event(self, event: Any = None) -> Any:
        return event or _CpuEvent()


def _replace(value: Any) -> Callable[[Any], Any]:
    """Return a `Patch.make` that puts `value` there."""
    return lambda original: value


def _always(value: Any) -> Callable[[Any], Any]:
    """Return a `Patch.make` whose replacement ignores its arguments and returns `value`."""
    return _replace(lambda *args, **kwargs: value)


def _keep_sends(original: Callable[..., Any]) -> Callable[..., Any]:
    """`_p2p_ops` whose sends outlive the schedule that issued them.

    The interleaved schedule does not wait for its last send. Gloo cancels a send whose handle is
    gone before the receiver asked for it, and the receiver then waits until it times out.
    """
    # The schedule waits for every send but the last; one of each direction could be open.
    kept: collections.deque[Any] = collections.deque(maxlen=4)

    @functools.wraps(original)
    def wrapper(**kwargs: Any) -> dict[str, Any]:
        handles: dict[str, Any] = original(**kwargs)
        kept.extend(handle for name, handle in handles.items() if name.startswith("send"))
        return handles

    return wrapper


_RANDOM = "megatron.core.tensor_parallel.random"
_get_rng_state = _replace(lambda *args, **kwargs: torch.get_rng_state())
_set_rng_state = _replace(lambda state, *args, **kwargs: torch.set_rng_state(state))

_torch = functools.partial(
    Patch, package="torch", exit="Megatron takes its device from a setting, not from literals"
)
_core = functools.partial(
    Patch, package="megatron-core", exit="Megatron keeps its random states by device"
)

CATALOGUE = [
    *(
        _torch(f"torch:{name}", _on_cpu, "device='cuda' and pin_memory=True in literals")
        for name in _FACTORIES
    ),
    _torch("torch:Tensor.type", _tensor_type, "compared with 'torch.cuda.FloatTensor'"),
    _torch("torch:Tensor.to", _on_cpu, ".to('cuda')"),
    _torch("torch:Tensor.cuda", _replace(lambda self, *a, **k: self), ".cuda() of CPU tensors"),
    _torch("torch:nn.Module.cuda", _replace(lambda self, *a, **k: self), ".cuda() of modules"),
    _torch("torch:cuda.current_device", _always(torch.device("cpu")), "used as device="),
    _torch("torch:cuda.set_device", _always(None), "one device"),
    _torch("torch:cuda.synchronize", _always(None), "CPU work is done when issued"),
    _torch("torch:cuda.empty_cache", _always(None), "no caching allocator"),
    _torch("torch:cuda.memory_allocated", _always(0), "no caching allocator"),
    _torch("torch:cuda.max_memory_allocated", _always(0), "no caching allocator"),
    _torch("torch:cuda.get_rng_state", _get_rng_state, "one random stream"),
    _torch("torch:cuda.set_rng_state", _set_rng_state, "one random stream"),
    _torch(
        "torch:cuda.manual_seed",
        _replace(lambda seed: torch.manual_seed(seed)),
        "one random stream",
    ),
    _torch("torch:cuda.Stream", _replace(_CpuStream), "no queues"),
    _torch("torch:cuda.Event", _replace(_CpuEvent), "no queues"),
    _torch("torch:cuda.current_stream", _always(_CpuStream()), "no queues"),
    _torch("torch:cuda.default_stream", _always(_CpuStream()), "no queues"),
    _torch("torch:cuda.stream", _replace(lambda s: contextlib.nullcontext()), "no queues"),
    _torch(
        "torch._dynamo:config.disable",
        _replace(True),
        "jit_fuser is torch.compile",
        exit="0.12, which lacks `disable_jit_fuser`, is no longer supported",
    ),
    _core(f"{_RANDOM}:_get_cuda_rng_state", _get_rng_state, "one random stream"),
    _core(f"{_RANDOM}:_set_cuda_rng_state", _set_rng_state, "one random stream"),
    _core(
        "megatron.core.pipeline_parallel.p2p_communication:_p2p_ops",
        _keep_sends,
        "gloo cancels a send whose handle is gone",
        exit="the interleaved schedule waits for its last send",
    ),
]
"""Every replacement that lets Megatron run on a CPU."""


@functools.cache
def cpu_patches() -> PatchSet:
    """Return the process's one set of them (none is applied yet)."""
    # `with torch.device(...)` knows the factories by identity, from a list made at its first use;
    # made after our wrappers are in place it would miss the originals that they call.
    _device_constructors()
    return PatchSet("platform cpu", CATALOGUE)
