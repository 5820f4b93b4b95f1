"""The client of the kernel runners against small runners of every behaviour."""

import sys

import pytest
import torch
from helpers.kernel_runner import KernelRunner, KernelRunnerError, RunnerOperators, float_bits

ECHO = """
import sys
for line in sys.stdin:
    op, *words = line.split()
    keys = dict(word.split("=", 1) for word in words)
    if op == "refuse":
        print("error group_len 3 is not supported", flush=True)
    elif op == "crash":
        print("boom", file=sys.stderr); sys.exit(7)
    elif op == "hang":
        import time; time.sleep(60)
    elif op == "garbage":
        print("what", flush=True)
    elif op == "silent":
        print("ok", flush=True)
    else:
        data = open(keys.pop("w"), "rb").read()
        open(keys.pop("wq"), "wb").write(data[::-1] if op == "reverse" else data)
        print("ok", *(f"{k}={v}" for k, v in keys.items() if k != "inplace"), flush=True)
"""
OUT = {"wq": (torch.float32, (2,))}


@pytest.fixture
def runner():
    with KernelRunner([sys.executable, "-c", ECHO], timeout_s=20) as runner:
        yield runner


def test_arrays_and_keys_go_there_and_back(runner):
    w = torch.tensor([1.0, 2.0])
    arrays, keys = runner.call("copy", {"w": w}, OUT, grid="five", eps=float_bits(1e-5))
    assert torch.equal(arrays["wq"], w)
    assert keys == {"grid": "five", "eps": "3727c5ac"}
    process = runner._process
    assert torch.equal(runner.call("copy", {"w": -w}, OUT)[0]["wq"], -w)
    assert runner._process is process


def test_keys_of_the_operators():
    with KernelRunner([sys.executable, "-c", ECHO]) as runner:
        operators = RunnerOperators(runner, isa="neon")
        w = torch.ones(2, 6, dtype=torch.bfloat16)
        assert torch.equal(operators.fake_quantize(w, 3, grid="asym4"), w)
    assert operators.stats == {
        "dtype": "bf16",
        "rows": "2",
        "cols": "6",
        "group_len": "3",
        "grid": "asym4",
        "eps": "3727c5ac",
        "isa": "neon",
    }


def test_a_refusal_is_an_exception_and_the_runner_lives_on(runner):
    with pytest.raises(KernelRunnerError, match=r"^group_len 3 is not supported$") as caught:
        runner.call("refuse", {}, OUT)
    assert not caught.value.died
    assert runner.call("copy", {"w": torch.ones(2)}, OUT)[0]["wq"].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("op", "message"),
    [("crash", r"ended during crash \(status 7\)\nboom"), ("garbage", "answered 'what'")],
)
def test_a_crash_shows_what_the_runner_said(runner, op, message):
    with pytest.raises(KernelRunnerError, match=message) as caught:
        runner.call(op, {}, OUT)
    assert caught.value.died


def test_a_runner_that_hangs_fails_in_time():
    with KernelRunner([sys.executable, "-c", ECHO], timeout_s=0.5) as runner:
        with pytest.raises(KernelRunnerError, match=r"no answer within 0.5 s to hang"):
            runner.call("hang", {}, OUT)
        assert runner._process is None


def test_an_old_output_does_not_pass_for_a_new_one(runner):
    runner.call("copy", {"w": torch.ones(2)}, OUT)
    with pytest.raises(KernelRunnerError, match="wq has 0 bytes, not 8"):
        runner.call("silent", {}, OUT)


def test_a_failure_at_the_end_shows():
    late = "import sys; sys.stdin.read(); print('leak', file=sys.stderr); sys.exit(1)"
    runner = KernelRunner([sys.executable, "-c", late])
    runner._start()
    with pytest.raises(KernelRunnerError, match=r"failed at the end .*\(status 1\)\nleak"):
        runner.close()
