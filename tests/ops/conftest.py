import pytest
from helpers import backends
from helpers.backends import BACKENDS, Backend, TorchOperators

TORCH_BACKENDS = [backend for backend in BACKENDS if not backend.make and backend.name != "npu"]


def to_params(rows: list[Backend]) -> list:
    return [pytest.param(row, id=row.name, marks=row.marks) for row in rows]


def pytest_collection_modifyitems(config, items):
    """Leave out what a backend declares not to have; see `uses` in test_contract.py."""
    left_out = [item for item in items if not can_run(item)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


def can_run(item) -> bool:
    params = item.callspec.params if hasattr(item, "callspec") else {}
    row = params.get("backend")
    if not isinstance(row, Backend):
        return True
    mark = item.get_closest_marker("uses")
    needs = dict(mark.kwargs) if mark else {"op": "fake_quantize", "grid": "ternary"}
    return row.can(needs["op"], params.get("grid", needs["grid"]))


@pytest.fixture(scope="session")
def built_runners():
    """Names of the runners that were brought up to date; all of them end with the session."""
    yield set()
    backends.close_runners()


def list_present() -> list[Backend]:
    """All rows, that of the Ascend device where there is one; else one test says that it is not."""
    return [row for row in BACKENDS if row.name != "npu" or not row.find_absence()]


@pytest.fixture(params=to_params(list_present()))
def backend(request, built_runners):
    """One row of `backends.BACKENDS`; its runner is built first."""
    row = request.param
    backends.require(row, row.find_absence())
    if row.make and row.make not in built_runners:
        row.build()
        built_runners.add(row.make)
    return row


@pytest.fixture
def run(backend):
    """The operators of `backend`."""
    with backend.run() as operators:
        yield operators


@pytest.fixture(params=to_params(TORCH_BACKENDS))
def torch_backend(request):
    """`megatron_bitcpm.ops` itself under the reference and under each instruction set."""
    backends.require(request.param, request.param.find_absence())
    with request.param.run() as operators:
        assert isinstance(operators, TorchOperators)
        yield request.param.name
