import pytest

from megatron_bitcpm import ops
from megatron_bitcpm.ops import _cpu


def list_backends() -> list[str]:
    """The reference and every instruction set of this machine."""
    return ["reference", *(_cpu.native.supported_isas() if _cpu.native else [])]


@pytest.fixture(params=list_backends())
def backend(request):
    """Run the test on one backend, then restore the default."""
    if request.param == "reference":
        ops.use_backend("reference")
    else:
        ops.use_backend("native")
        _cpu.select_isa(request.param)
    yield request.param
    ops.use_backend("auto")
    if _cpu.native:
        _cpu.select_isa("auto")
