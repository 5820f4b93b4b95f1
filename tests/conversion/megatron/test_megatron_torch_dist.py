"""torch_dist checkpoints of stock Megatron, damaged ones, and outputs: complete or absent."""

from __future__ import annotations

import errno
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.megatron_models import assert_same, make_source
from helpers.ranks import run_ranks
from helpers.stock_checkpoints import Payload, build_stock_chunks, stock_args

from megatron_bitcpm.arch.layout import Layout
from megatron_bitcpm.conversion import tensor_stream
from megatron_bitcpm.conversion.convert import convert
from megatron_bitcpm.conversion.megatron.legacy_writer import write_legacy
from megatron_bitcpm.conversion.megatron.open import open_megatron
from megatron_bitcpm.conversion.megatron.torch_dist_writer import write_torch_dist
from megatron_bitcpm.errors import CheckpointError

pytestmark = pytest.mark.both_versions


def save_stock(rank, folder, case, stacked):
    """Save with Megatron's own writer, arguments in common.pt."""
    from helpers.tiny_models import model_parallel
    from megatron.core import parallel_state

    from megatron_bitcpm.checkpoint.writer import plan_save

    source = make_source(Path(folder), case)
    with model_parallel(2, 1):
        (chunk,) = build_stock_chunks(source.model, (2, 1, None), 64)
        name = f"{folder}/legacy/release/mp_rank_{rank:02d}/model_optim_rng.pt"
        chunk.load_state_dict(torch.load(name, weights_only=False)["model"])
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        metadata = {"dp_cp_group": group, "non_homogeneous_layers": not stacked}
        state = {
            "model": chunk.sharded_state_dict(metadata=metadata),
            "args": stock_args(source.model, 2, 1),
            "checkpoint_version": 3.0,
            "iteration": 7,
        }
        planned = plan_save(Path(folder) / "run" / "iter_0000007", state)
        planned.write()
        planned.commit()


@pytest.mark.parametrize(("case", "stacked"), [("untied", True), ("tied", False)])
def test_stock_checkpoints_load(tmp_path, case, stacked):
    source = make_source(tmp_path, case)
    write_legacy(source, tmp_path / "legacy", Layout(2, 1))
    (tmp_path / "run/iter_0000007").mkdir(parents=True)
    (tmp_path / "run/latest_checkpointed_iteration.txt").write_text("7")
    run_ranks(2, save_stock, str(tmp_path), case, stacked)
    index = (tmp_path / "run/iter_0000007/.metadata").read_bytes()
    assert (b"decoder.layers.3.mlp" in index) is not stacked
    found = open_megatron(tmp_path / "run")
    assert_same(found, source)
    assert found.facts["iteration"] == 7


@pytest.fixture
def written(tmp_path):
    """A converted checkpoint in two files, `release`."""
    write_torch_dist(make_source(tmp_path), tmp_path / "out", Layout(1, 2))
    return tmp_path / "out" / "release"


def read_all(folder):
    source = open_megatron(folder)
    for name in source.shapes():
        source.tensor(name)


def flip(path):
    data = bytearray(path.read_bytes())
    norm = make_source(path.parent).tensors["model.norm.weight"]
    place = data.find(bytes(norm.view(torch.uint8).numpy().data))
    assert place > 0
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (flip, r"decoder\.final_layernorm\.weight in __1_0\.distcp .* checksum"),
        (lambda p: p.write_bytes(p.read_bytes()[:5000]), r"weight in __1_0\.distcp .* is cut off"),
        (lambda p: p.unlink(), r"tensor decoder\.layers\.\S+ in __1_0\.distcp .*No such file"),
        (lambda p: p.write_bytes(b""), r"tensor \S+ in __1_0\.distcp cannot be read: .*empty"),
    ],
)
def test_damaged_files(written, spoil, message):
    spoil(written / "__1_0.distcp")
    with pytest.raises(CheckpointError, match=message) as caught:
        read_all(written)
    assert "\n" not in str(caught.value)


def test_malicious_files(written, tmp_path):
    (written / "bitcpm_model.json").unlink()
    for name, save in (
        ("common.pt", lambda obj, path: torch.save(obj, path)),
        (".metadata", lambda obj, path: path.write_bytes(pickle.dumps(obj))),
    ):
        before = (written / name).read_bytes()
        save({"args": Payload(tmp_path / "touched")}, written / name)
        with pytest.raises(CheckpointError, match=r"posix\.system, which no checkpoint") as caught:
            open_megatron(written)
        assert name in str(caught.value) and "\n" not in str(caught.value)
        (written / name).write_bytes(before)
    assert not (tmp_path / "touched").exists()
    # Without its own description it is a checkpoint of stock Megatron.
    assert_same(open_megatron(written), make_source(tmp_path))


def test_a_tensor_too_few(written):
    index = written / ".metadata"
    content = pickle.loads(index.read_bytes())
    del content.state_dict_metadata["decoder.layers.mlp.linear_fc2.weight"]
    index.write_bytes(pickle.dumps(content))
    with pytest.raises(CheckpointError, match=r"4 missing tensors: \S+\.0\.mlp\.linear_fc2\."):
        open_megatron(written)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ((5, 1), "tensor_parallel_size=5: does not divide num_attention_heads 12"),
        ((6, 1), "tensor_parallel_size=6: neither divides nor .* num_query_groups 4"),
        ((1, 3), "pipeline_parallel_size=3: 4 layers cannot be cut into 3"),
        ((1, 2, 4), "virtual_pipeline_parallel_size=4: 4 layers .* into 8 .* Use 2, or leave it"),
        ((1, 1, 2), "virtual_pipeline_parallel_size=2: has no effect .* Leave it out"),
    ],
)
def test_layouts_that_do_not_fit(tmp_path, layout, message):
    source = make_source(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        write_torch_dist(source, tmp_path / "o", Layout(*layout))
    if layout[0] > 1:
        message = "4 key/value heads cannot be shared out"
    with pytest.raises(CheckpointError, match=message):
        write_legacy(source, tmp_path / "o", Layout(*layout))
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("kind", ["tensor", "pipeline", "virtual_pipeline"])
def test_sizes_that_are_too_small(tmp_path, kind):
    name = f"{kind}_parallel_size"
    with pytest.raises(CheckpointError, match=rf"^{name}=0: must be greater than or equal to [12]"):
        convert(tmp_path, tmp_path / "o", format="legacy", **{name: 0})


def test_shared_key_heads(tmp_path):
    source = make_source(tmp_path, num_query_groups=2)
    with pytest.raises(CheckpointError, match=r"2 key/value heads .* megatron-core 0\.12\.1"):
        write_legacy(source, tmp_path / "o", Layout(4))
    write_torch_dist(source, tmp_path / "o", Layout(4))
    assert_same(open_megatron(tmp_path / "o"), source)


@pytest.mark.parametrize(
    ("write", "read"), [(write_torch_dist, open_megatron), (write_legacy, open_megatron)]
)
def test_an_existing_output(tmp_path, write, read):
    source, other = make_source(tmp_path), make_source(tmp_path, "tied")
    write(source, tmp_path / "o")
    with pytest.raises(CheckpointError, match=r"o: exists.* --overwrite"):
        write(other, tmp_path / "o")
    assert_same(open_megatron(tmp_path / "o"), source)

    def refuse(folder):
        raise CheckpointError(f"folder={folder}: differs. Report it.")

    with pytest.raises(CheckpointError, match="differs"):
        write(other, tmp_path / "o", overwrite=True, check=refuse)
    assert_same(open_megatron(tmp_path / "o"), source)
    write(other, tmp_path / "o", overwrite=True)
    assert_same(read(tmp_path / "o"), other)
    (tmp_path / "o" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="is not a converted model, so it is not replaced"):
        write(source, tmp_path / "o", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["o"]


@pytest.mark.parametrize("call", ["write", "fsync"])
@pytest.mark.parametrize("write", [write_torch_dist, write_legacy])
def test_full_disk(tmp_path, monkeypatch, write, call):
    source = make_source(tmp_path)
    write(source, tmp_path / "o")
    before = {path: path.read_bytes() for path in (tmp_path / "o").rglob("*") if path.is_file()}

    def fail(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tensor_stream.os, call, fail)
    with pytest.raises(CheckpointError, match=r"output=\S+o: cannot be written: No space left"):
        write(make_source(tmp_path, "tied"), tmp_path / "o", overwrite=True)
    monkeypatch.undo()
    after = {path: path.read_bytes() for path in (tmp_path / "o").rglob("*") if path.is_file()}
    assert after == before
    assert [path.name for path in tmp_path.iterdir()] == ["o"]


KILLED = """
import sys, time, pathlib, os
sys.path[:0] = {paths!r}
from helpers.megatron_models import make_source
from helpers.model_factory import MemorySource
from {module} import {write}
class Slow(MemorySource):
    def tensor(self, name):
        if "layers.2." in name:
            pathlib.Path({sign!r}).touch()
            time.sleep(60)
        return super().tensor(name)
here = pathlib.Path({folder!r})
source = make_source(here)
slow = Slow(**vars(source))
{write}(slow, here / "o", overwrite=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("write", [write_torch_dist, write_legacy])
def test_killed(tmp_path, write):
    source = make_source(tmp_path, "tied")
    write(source, tmp_path / "o")
    sign = tmp_path / "sign"
    program = KILLED.format(
        paths=[str(Path(__file__).parents[2])],
        module=write.__module__,
        write=write.__name__,
        sign=str(sign),
        folder=str(tmp_path),
    )
    process = subprocess.Popen([sys.executable, "-c", program])
    deadline = time.monotonic() + 60
    while not sign.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert_same(open_megatron(tmp_path / "o"), source)
    assert list(tmp_path.glob(".tmp-o-*"))
    # The next conversion takes the place of the killed one.
    new = make_source(tmp_path)
    write(new, tmp_path / "o", overwrite=True)
    assert_same(open_megatron(tmp_path / "o"), new)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["o", "sign"]
