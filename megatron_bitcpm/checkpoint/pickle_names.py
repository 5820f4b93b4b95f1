"""What the pickles of a Megatron checkpoint may refer to, and inert records in place of it.

Checkpoints of `pretrain_gpt.py` hold more than tensors: the arguments of the run (an
`argparse.Namespace` with enums), random states of NumPy, the state of the rerun machine. For each
of these names, in Megatron 0.12 to 0.16 and in MindSpeed, whether installed or not, a pickle gets
an `Inert`. Any other name is refused.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import torch

from megatron_bitcpm.checkpoint.strict_pickle import StrictUnpickler, check_keys

_ENUMS = (
    "megatron.core.enums",
    "megatron.core.transformer.enums",
    "megatron.legacy.model.enums",
    "megatron.model.enums",  # before the legacy models moved
)
_ENUM_NAMES = {
    "AttnBackend",
    "AttnMaskType",
    "AttnType",
    "CudaGraphScope",
    "Fp4Recipe",
    "Fp8Recipe",
    "LayerType",
    "ModelType",
}
PATH_NAMES = {"Path", "PosixPath", "PurePosixPath"}
_NUMPY_NAMES = {"_reconstruct", "scalar"}
_DTYPES = ("Bool", "Int8", "Int16", "Int32", "Int64", "UInt8", "UInt16", "UInt32", "UInt64")

INERT_NAMES: dict[str, set[str]] = {
    "argparse": {"Namespace"},
    "types": {"SimpleNamespace"},
    "_codecs": {"encode"},
    "_io": {"BytesIO"},
    "io": {"BytesIO"},
    "signal": {"Signals"},
    "pathlib": PATH_NAMES,
    "pathlib._local": PATH_NAMES,
    "numpy": {"ndarray", "dtype"},
    "numpy.core.multiarray": _NUMPY_NAMES,
    "numpy._core.multiarray": _NUMPY_NAMES,
    "numpy.dtypes": {f"{name}DType" for name in (*_DTYPES, "Float16", "Float32", "Float64")},
    **dict.fromkeys(_ENUMS, _ENUM_NAMES),
    "megatron.core.datasets.utils": {"Split"},
    "megatron.core.optimizer.optimizer_config": {"OptimizerConfig"},
    "megatron.core.rerun_state_machine": {
        "Call",
        "Caller",
        "RerunDiagnostic",
        "RerunMode",
        "RerunState",
        "RerunValidationStatus",
    },
    "megatron.core.transformer.pipeline_parallel_layer_layout": {"PipelineParallelLayerLayout"},
    "megatron.training.checkpointing": {"CheckpointType"},
    "mindspeed.core.pipeline_parallel.pipeline_model_parallel_layout.layout": {
        "LayerType",
        "PipelineParallelLayerLayout",
    },
    "megatron.core.activations": {"quick_gelu", "squared_relu"},
    "torch": {"Size", "device"},
    "torch.nn.functional": {"gelu", "relu", "silu"},
    "torch._C._nn": {"gelu", "silu"},
}
"""Module -> names; functions among them are kept as names only."""


class Inert:
    """Stands for an object of a checkpoint; nothing of its class is there."""

    given: tuple[Any, ...] = ()  # what its class was called with: the value of an enum
    state: Any = None  # where that is not a dictionary of attributes

    def __new__(cls, *given: Any, **unused: Any) -> Inert:
        """Keep the arguments."""
        inert = super().__new__(cls)
        if given:
            inert.given = given
        return inert

    def __init__(self, *given: Any, **unused: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        """Keep attributes as attributes."""
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.state = state


def make_inert_class(module: str, name: str) -> type[Inert]:
    """Return a class of its own, so that a pickle that alters it alters nothing else."""
    return type(name, (Inert,), {"__module__": module})


def stand_ins() -> list[tuple[type[Inert], str]]:
    """Return what ``torch.serialization.safe_globals`` takes, for all names but NumPy's."""
    return [
        (make_inert_class(module, name), f"{module}.{name}")
        for module, names in INERT_NAMES.items()
        if not module.startswith(("numpy", "_codecs")) and module != "torch"
        for name in sorted(names)
    ]


def refused(module: str, name: str) -> pickle.UnpicklingError:
    """Build the error of a name that is not listed."""
    return pickle.UnpicklingError(f"refers to {module}.{name}, which no checkpoint needs")


class InertUnpickler(StrictUnpickler):
    """Reads a pickle whose every object becomes a builtin container or an `Inert`."""

    def find_class(self, module: str, name: str) -> Any:
        """Return an inert class for a listed name."""
        if module == "collections":
            return make_container(name)
        if module in ("builtins", "__builtin__") and name in ("set", "frozenset"):
            return _make_set if name == "set" else lambda items=(): frozenset(_make_set(items))
        if (module, name) == ("builtins", "slice"):
            return make_inert_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if name in INERT_NAMES.get(module, ()):
            return make_inert_class(module, name)
        raise refused(module, name)


class _Dict(dict[Any, Any]):
    """A dictionary that takes attributes, as an OrderedDict does (``_metadata`` of a model)."""


def make_container(name: str) -> Callable[..., dict[Any, Any]]:
    """Return what makes an empty dictionary in place of one of `collections`, or refuse it."""
    # Their pickles add the items one by one, which `StrictUnpickler` looks at.
    if name == "OrderedDict":
        return lambda: _Dict()
    if name == "defaultdict":
        return lambda unused=None: _Dict()
    raise refused("collections", name)


def _make_set(items: Any = ()) -> set[Any]:
    items = list(items)
    check_keys(items)
    return set(items)
