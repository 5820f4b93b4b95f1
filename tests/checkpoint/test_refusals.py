"""Checkpoints that must not be loaded are refused in one line on every rank."""

from __future__ import annotations

import pickle
import shutil
from fractions import Fraction

import pytest
import torch
from helpers.checkpoint_cases import (
    TERNARY,
    load_and_train,
    load_weights_of,
    loss_of,
    make_malicious,
    refused_load,
    train_and_save,
)
from helpers.model_factory import tiny_model
from helpers.ranks import run_ranks

from megatron_bitcpm.checkpoint.safe_load import restricted_unpickling

pytestmark = pytest.mark.both_versions

TP2 = {"tp": 2}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "iter_0000002"
    run_ranks(2, train_and_save, str(folder), TP2)
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "iter_0000002")


def refuse(folder, layout=TP2, world=2):
    """Load on the ranks of a layout; return the one line that all of them raise."""
    messages = run_ranks(world, refused_load, str(folder), layout)
    assert len(set(messages)) == 1, messages
    assert messages[0] != "loaded"
    assert "\n" not in messages[0]
    return messages[0]


@pytest.mark.parametrize("place", [".metadata", "common.pt", ".distcp"])
def test_a_malicious_pickle_runs_nothing(place, copy, tmp_path):
    victim = tmp_path / "victim"
    make_malicious(copy, place, victim)
    # The payload is alive: torch's own way of loading this file runs it.
    if place == ".metadata":
        pickle.loads((copy / place).read_bytes())
    elif place == "common.pt":
        torch.load(copy / place, weights_only=False)
    else:
        index = pickle.loads((copy / ".metadata").read_bytes())
        info = next(i for k, i in index.storage_data.items() if k.fqn.startswith("rng_state/"))
        with (copy / info.relative_path).open("rb") as file:
            file.seek(info.offset)
            part = copy.parent / "part"
            part.write_bytes(file.read(info.length))
        torch.load(part, weights_only=False)
    victim.rmdir()
    message = refuse(copy)
    assert "mkdir, which no checkpoint needs" in message
    assert place.strip(".") in message or place == ".distcp"
    assert not victim.exists()


def test_the_loader_is_unrestricted_again_afterwards(tmp_path):
    torch.save(Fraction(1, 3), tmp_path / "a.pt")
    with restricted_unpickling(), pytest.raises(pickle.UnpicklingError, match="Fraction"):
        torch.load(tmp_path / "a.pt", weights_only=False)
    assert torch.load(tmp_path / "a.pt", weights_only=False) == Fraction(1, 3)


def test_an_index_that_leads_out_of_the_folder(copy):
    index = pickle.loads((copy / ".metadata").read_bytes())
    for info in index.storage_data.values():
        info.relative_path = f"../{info.relative_path}"
    (copy / ".metadata").write_bytes(pickle.dumps(index))
    assert "another folder" in refuse(copy)


@pytest.mark.parametrize("name", [".metadata", "common.pt", "metadata.json", "__1_0.distcp"])
def test_an_absent_file(name, copy):
    (copy / name).unlink()
    assert name in refuse(copy)


def test_a_cut_file(copy):
    path = copy / "__1_0.distcp"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[: size - 1])
    assert f"__1_0.distcp has {size - 1} of {size} bytes" in refuse(copy)


def test_a_damaged_file(copy):
    path = copy / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    content[: len(content) // 2] = bytes(len(content) // 2)
    path.write_bytes(content)
    assert "cannot be loaded" in refuse(copy)


def test_another_model(saved):
    layout = {"tp": 2, "model": tiny_model(num_layers=4, ffn_hidden_size=128)}
    message = refuse(saved, layout)
    assert "linear_fc1.weight has shape [4, 512, 64], the model's has [4, 256, 64]" in message


STOCK_BF16 = {"dtype": torch.bfloat16}
SHARDED = {"distributed_optimizer": True}
SHARDED_BF16 = {**STOCK_BF16, **SHARDED}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("saved_with", "loaded_with"),
    [
        ({}, STOCK_BF16),
        ({}, SHARDED),
        (STOCK_BF16, {}),
        (STOCK_BF16, SHARDED_BF16),
        (SHARDED, {}),
        (SHARDED_BF16, STOCK_BF16),
    ],
)
def test_another_kind_of_optimizer(saved_with, loaded_with, tmp_path):
    folder = tmp_path / "iter_0000002"
    run_ranks(2, train_and_save, str(folder), saved_with)
    message = refuse(folder, loaded_with)
    assert "optimizer.state." in message
    assert "Use the precision and use_distributed_optimizer of its" in message


@pytest.mark.slow
def test_weights_of_another_layout_type_and_quantiser(saved, tmp_path):
    wanted = run_ranks(2, loss_of, str(saved), TP2)[0]
    (error, got), _ = run_ranks(2, load_weights_of, str(saved), {"pp": 2})
    assert error == ""
    assert got["loss"] == pytest.approx(wanted, rel=1e-6)
    # bf16 keeps 8 bits of each weight: exactly the rounded ones, whatever is ternary.
    exact = run_ranks(1, load_weights_of, str(saved), {})[0][1]["weights"]
    layout = {"dtype": torch.bfloat16, "quant": TERNARY, "distributed_optimizer": True}
    error, rounded = run_ranks(1, load_weights_of, str(saved), layout)[0]
    assert error == ""
    names = {name.replace("module.module.", "module.") for name in rounded["weights"]}
    assert names == set(exact)
    for name, values in rounded["weights"].items():
        full = torch.from_numpy(exact[name.replace("module.module.", "module.")])
        assert torch.equal(torch.from_numpy(values), full.bfloat16().float()), name
    # And back: a ternary bf16 checkpoint begins a full-precision fp32 run.
    folder = tmp_path / "iter_0000002"
    run_ranks(2, train_and_save, str(folder), {"tp": 2, **layout})
    error, _ = run_ranks(1, load_weights_of, str(folder), {})[0]
    assert error == ""


def test_weights_of_another_architecture(saved):
    layout = {"model": tiny_model(num_layers=2)}
    error, _ = run_ranks(1, load_weights_of, str(saved), layout)[0]
    assert "has shape [4, " in error
    assert "the model's has [2, " in error
    layout = {"model": tiny_model(num_layers=4, share_embeddings_and_output_weights=True)}
    assert run_ranks(1, load_weights_of, str(saved), layout)[0][0] == ""


def random_states(rank, folder, layout):
    import random
    from pathlib import Path

    from helpers.checkpoint_cases import Schedule, build, save_state

    from megatron_bitcpm.checkpoint.state import load_state

    with build(layout) as run:
        path = Path(folder)
        if not path.exists():
            torch.distributed.barrier()
            if rank == 0:
                path.mkdir()
            torch.distributed.barrier()
            random.seed(rank)
            save_state(path, run, Schedule())
        else:
            torch.distributed.barrier()
            torch.distributed.barrier()
            load_state(path, run.chunks, run.optimizer, Schedule(), seed=40)
        return random.random()


@pytest.mark.slow
def test_random_states_fit_the_same_layout_only(tmp_path):
    import random

    folder = str(tmp_path / "iter_0000002")
    saved = run_ranks(2, random_states, folder, TP2)
    assert run_ranks(2, random_states, folder, TP2) == saved
    assert saved == [random.Random(0).random(), random.Random(1).random()]
    fresh = random.Random(40 + 2).random()
    assert run_ranks(2, random_states, folder, {"pp": 2}) == [fresh, fresh]


def test_ordinary_checkpoints_load(saved):
    assert len(run_ranks(2, load_and_train, str(saved), TP2)[0]) == 2
