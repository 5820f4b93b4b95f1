"""Folders of every form: what is in them, and that they are complete or absent."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from helpers.numpy_ternary import fake_quantize
from helpers.tiny_folders import LAYERS, MUP, listing, load_all, make_folder, make_state, same_bits

from megatron_bitcpm.conversion import tensor_stream
from megatron_bitcpm.conversion.convert import convert
from megatron_bitcpm.conversion.hf import writer as hf_writer
from megatron_bitcpm.conversion.hf.writer import write_folder
from megatron_bitcpm.conversion.open import open_source
from megatron_bitcpm.errors import CheckpointError
from megatron_bitcpm.publish import clean_up_after_killed

ROW = {"quant_type": "ternary", "group_size": -1}
G16 = {"quant_type": "five", "group_size": 16}


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "in")


def write(folder: Path, form="plain", **settings) -> dict:
    return convert(folder, folder.parent / "out", form=form, **settings)


# -- content ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["safetensors", "bin"])
@pytest.mark.parametrize("limit", [10_000_000, 30_000])
def test_plain_is_the_identity(weights, limit, folder):
    report = write(folder, weights=weights, max_shard_size=limit)
    output, state = folder.parent / "out", make_state()
    found = load_all(output)
    assert found.keys() == state.keys()
    assert all(same_bits(found[name], tensor) for name, tensor in state.items())
    suffix = "safetensors" if weights == "safetensors" else "bin"
    assert len(report["files"]) == (
        1 if limit > 1_000_000 else len(list(output.glob(f"*.{suffix}")))
    )
    assert report["bytes"] == sum(t.numel() * 2 for t in state.values())
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "special_tokens_map.json",
        "generation_config.json",
    ):
        assert (output / name).read_bytes() == (folder / name).read_bytes()
    config = json.loads((output / "config.json").read_text())
    original = json.loads((folder / "config.json").read_text())
    assert {key: config[key] for key in original} == original
    if limit < 1_000_000:
        assert len(report["files"]) > 3
        stem = "model.safetensors" if weights == "safetensors" else "pytorch_model.bin"
        index = json.loads((output / f"{stem}.index.json").read_text())
        assert index["metadata"]["total_size"] == report["bytes"]
        assert index["weight_map"].keys() == state.keys()
        sizes = [path.stat().st_size for path in output.glob(f"*.{suffix}")]
        # Headers come on top of the tensors.
        assert max(sizes) < limit + 12_000


def test_bin_is_a_whole_archive(folder):
    write(folder, weights="bin")
    path = folder.parent / "out" / "pytorch_model.bin"
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    mapped = torch.load(path, weights_only=True, mmap=True)
    assert all(same_bits(mapped[name], tensor) for name, tensor in make_state().items())


@pytest.mark.parametrize("quantizer", [ROW, G16], ids=["ternary", "five"])
def test_pseudo_holds_the_quantised_values(quantizer, folder):
    report = write(folder, "pseudo", **quantizer, force=True)
    found, grid = load_all(folder.parent / "out"), quantizer["quant_type"]
    for name, tensor in make_state().items():
        wanted = tensor
        if "_proj" in name:
            wanted = fake_quantize(tensor, quantizer["group_size"], 1e-5, grid)
        assert same_bits(found[name], wanted), name
    record = json.loads((folder.parent / "out" / "bitcpm_quantizer.json").read_text())
    assert record["format"] == "pseudo-quantized"
    assert len(record["ternary_tensors"]) == 7 * LAYERS
    assert record["quantizer"]["grid"] == grid
    assert "relative quantisation error 0." in report["warnings"][0]
    card = (folder.parent / "out" / "README.md").read_text()
    levels = "-s, 0, s" if grid == "ternary" else "-2 s, -s, 0, s, 2 s"
    assert f"is one of {levels}, where s" in card
    assert "plain Llama" in card


def test_latent_keeps_the_latents_and_says_its_quantiser(folder):
    write(folder, "latent", **ROW, force=True)
    output = folder.parent / "out"
    found = load_all(output)
    assert all(same_bits(found[name], tensor) for name, tensor in make_state().items())
    config = json.loads((output / "config.json").read_text())
    assert config["bitcpm_quantizer"]["quantizer"]["group_size"] == -1
    assert "trust_remote_code=True" in (output / "README.md").read_text()
    assert not (output / "bitcpm_quantizer.json").exists()
    # The stamp vouches for it from now on.
    report = convert(output, folder.parent / "pseudo")
    assert report["warnings"] == []
    name = "model.layers.1.mlp.down_proj.weight"
    assert same_bits(load_all(folder.parent / "pseudo")[name], fake_quantize(make_state()[name]))


@pytest.mark.parametrize("tied", [True, False])
def test_minicpm_in_both_architectures(tied, tmp_path):
    state = make_state(tied)
    folder = make_folder(tmp_path / "in", state, minicpm=True)
    write(folder)
    carried = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: carried[key] for key in MUP} == MUP
    assert all(same_bits(t, state[n]) for n, t in load_all(tmp_path / "out").items())
    card = (tmp_path / "out" / "README.md").read_text()
    assert "trust-remote-code" in card
    # The tokenizer too asks first where config.json names code.
    assert 'AutoTokenizer.from_pretrained("FOLDER", trust_remote_code=True)' in card
    report = convert(folder, tmp_path / "llama", architecture="llama")
    config = json.loads((tmp_path / "llama" / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert not config["tie_word_embeddings"]
    assert not config.keys() & MUP.keys()
    assert config["bitcpm_folding"]["scale_emb"] == 12
    assert 0 < report["folding"]["largest_relative_rounding"] <= 2**-8
    found = load_all(tmp_path / "llama")
    output = found["lm_head.weight"].float()
    source = state["model.embed_tokens.weight" if tied else "lm_head.weight"].float()
    assert torch.equal(output, source / 2)  # 32 / 64, exact
    assert "cannot be undone" in (tmp_path / "llama" / "README.md").read_text()


# -- refused ---------------------------------------------------------------------------------------


def test_untrained_latents_need_force(folder):
    with pytest.raises(CheckpointError, match=r"quantisation error 0\.2\d+ .*--force") as caught:
        write(folder, "pseudo", **ROW)
    assert "\n" not in str(caught.value)
    assert [path.name for path in folder.parent.iterdir()] == ["in"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("form", ["plain", "pseudo", "latent"])
def test_a_nan_is_named(value, form, tmp_path):
    state, name = make_state(), "model.layers.1.mlp.up_proj.weight"
    state[name][5, 3] = value
    folder = make_folder(tmp_path / "in", state)
    quantizer = {} if form == "plain" else {**ROW, "force": True}
    with pytest.raises(CheckpointError, match=f"{name} holds a NaN or an infinity, first in row 5"):
        write(folder, form, **quantizer)
    if quantizer:  # not taken for weights that show no training
        with pytest.raises(CheckpointError, match=f"{name} holds a NaN or an infinity"):
            write(folder, form, **ROW)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("mask", [0o077, 0o022, 0o002])
def test_permissions_follow_the_umask(mask, folder):
    old = os.umask(mask)
    try:
        write(folder)
    finally:
        os.umask(old)
    output = folder.parent / "out"
    assert output.stat().st_mode & 0o777 == 0o777 & ~mask
    assert {p.stat().st_mode & 0o777 for p in output.iterdir()} == {0o666 & ~mask}


def test_a_tokenizer_with_code_of_its_own(folder):
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"auto_map": {"AutoTokenizer": ["t.T", None]}}))
    assert "needs code of its own" in write(folder)["warnings"][0]


def test_places_that_would_hurt(folder):
    before = listing(folder)
    for output in (folder, folder.parent, folder / "inside"):
        with pytest.raises(CheckpointError, match=r"output=.*input"):
            convert(folder, output, overwrite=True)
    link = folder.parent / "link"
    link.symlink_to(folder)
    with pytest.raises(CheckpointError, match=r"output=.*input"):
        convert(folder, link, overwrite=True)
    (folder.parent / "file").write_text("x")
    with pytest.raises(CheckpointError, match=r"cannot be written: (Not a directory|File exists)"):
        convert(folder, folder.parent / "file" / "out")
    assert listing(folder) == before


def test_an_unwritable_parent(folder):
    # Closed to root too.
    with pytest.raises(CheckpointError, match=r"output=/proc/closed/out: cannot be written: "):
        convert(folder, "/proc/closed/out")


def test_an_absent_tokenizer(folder):
    with pytest.raises(CheckpointError, match="tokenizer=absent: no such folder"):
        write_folder(open_source(folder), folder.parent / "out", "plain", tokenizer=Path("absent"))
    assert [path.name for path in folder.parent.iterdir()] == ["in"]


# -- complete or absent ----------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["safetensors", "bin"])
@pytest.mark.parametrize("where", ["os.write", "os.fsync", "limit"])
def test_a_full_disk(where, weights, folder, monkeypatch):
    write(folder)
    output = folder.parent / "out"
    before, calls = listing(output), []

    def full(descriptor, *rest):
        calls.append(descriptor)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if where == "limit":  # the kernel's own refusal, in the middle of the file
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    else:
        monkeypatch.setattr(os, where.removeprefix("os."), full)
        monkeypatch.setattr(tensor_stream, "_FLUSH_BYTES", 10_000)
    try:
        with pytest.raises(CheckpointError, match=r"out: cannot be written: (No space|File too)"):
            write(folder, weights=weights, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        monkeypatch.undo()
    assert calls or where == "limit"
    assert listing(output) == before
    assert sorted(path.name for path in folder.parent.iterdir()) == ["in", "out"]


@pytest.mark.parametrize("step", ["verify_written", "write_model_card", "os.rename"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_nothing(step, error, folder, monkeypatch):
    write(folder)
    output = folder.parent / "out"
    before, calls, rename = listing(output), [], os.rename

    def fail(*args, **kwargs):
        calls.append(args)
        # Of the renames the one into place: the old folder is out of the way by then.
        if step == "os.rename" and (args[1] != output or len(calls) > 2):
            return rename(*args, **kwargs)
        raise error

    monkeypatch.setattr(os if "." in step else hf_writer, step.split(".")[-1], fail)
    with pytest.raises((CheckpointError, KeyboardInterrupt)):
        write(folder, overwrite=True)
    monkeypatch.undo()
    assert calls
    assert listing(output) == before
    assert sorted(path.name for path in folder.parent.iterdir()) == ["in", "out"]


def test_what_killed_processes_left_is_removed(folder):
    write(folder)
    parent, output = folder.parent, folder.parent / "out"
    # Killed while writing; while others write still, or to an output of a longer name.
    for name in (".tmp-out-abcdefgh", ".tmp-out-locked_0", ".tmp-out-two-abcdefgh"):
        (parent / name).mkdir()
        (parent / name / "config.json").write_text("{}")
    # Killed after the new folder had its name.
    (parent / ".old.tmp-out-zzzzzzzz").mkdir()
    with _locked(parent / ".tmp-out-locked_0"):
        write(folder, overwrite=True)
    names = sorted(path.name for path in parent.iterdir())
    assert names == [".tmp-out-locked_0", ".tmp-out-two-abcdefgh", "in", "out"]
    assert load_all(output).keys() == make_state().keys()


class _locked:
    """Another process's lock: of another open file."""

    def __init__(self, path):
        self.descriptor = os.open(path, os.O_RDONLY)

    def __enter__(self):
        fcntl.flock(self.descriptor, fcntl.LOCK_EX)

    def __exit__(self, *unused):
        os.close(self.descriptor)


def test_killed_between_the_two_renames(folder):
    write(folder)
    parent, output = folder.parent, folder.parent / "out"
    before = listing(output)
    (parent / ".tmp-out-abcdefgh").mkdir()
    output.rename(parent / ".old.tmp-out-abcdefgh")
    clean_up_after_killed(output)
    assert listing(output) == before
    assert sorted(path.name for path in parent.iterdir()) == ["in", "out"]


KILLED = """
import os, signal, sys
from megatron_bitcpm.conversion import tensor_stream
from megatron_bitcpm.conversion.convert import convert
write, calls = tensor_stream.FlushedFile.write, []
def killed(self, data):
    calls.append(1)
    if len(calls) == 12:
        os.kill(os.getpid(), signal.SIGKILL)
    return write(self, data)
tensor_stream.FlushedFile.write = killed
convert(sys.argv[1], sys.argv[2], overwrite=True)
"""


@pytest.mark.slow
def test_kill_9_in_the_middle(folder):
    write(folder)
    output = folder.parent / "out"
    before = listing(output)
    done = subprocess.run([sys.executable, "-c", KILLED, str(folder), str(output)], timeout=120)
    assert done.returncode == -9
    assert listing(output) == before
    left = [path.name for path in folder.parent.iterdir() if path.name.startswith(".tmp-out-")]
    assert len(left) == 1
    write(folder, overwrite=True)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["in", "out"]


# -- memory ----------------------------------------------------------------------------------------

MEASURED = """
import sys, threading, time
from megatron_bitcpm.conversion.convert import convert
def anonymous():
    with open("/proc/self/smaps_rollup") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("Anonymous")) * 1024
base, peak, done = anonymous(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.005)
thread = threading.Thread(target=watch)
thread.start()
form, weights = sys.argv[3:]
quantizer = {"quant_type": "ternary", "group_size": -1, "force": True}
convert(*sys.argv[1:3], form=form, weights=weights, **({} if form == "plain" else quantizer))
done = True
thread.join()
print(peak - base)
"""


@pytest.fixture(scope="module")
def larger(tmp_path_factory):
    """370 MB of weights, the largest tensors 67 MB."""
    hidden, ffn, vocab, layers = 1024, 4096, 32768, 8
    sizes = {64: hidden, 96: ffn, 32: 256, 40: vocab}
    state = {}
    for name, tensor in make_state().items():
        shape = [sizes[n] for n in tensor.shape]
        if "layers.1." in name:
            continue
        for layer in range(layers if "layers.0." in name else 1):
            renamed = name.replace("layers.0.", f"layers.{layer}.")
            state[renamed] = (torch.randn(shape) * 0.02).bfloat16()
    folder = make_folder(tmp_path_factory.mktemp("larger") / "in", state)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "vocab_size": vocab,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 64,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "weights"), [("plain", "safetensors"), ("pseudo", "bin"), ("latent", "safetensors")]
)
def test_memory_is_a_few_tensors(form, weights, larger, tmp_path):
    arguments = [str(larger), str(tmp_path / "out"), form, weights]
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *arguments],
        capture_output=True,
        text=True,
        timeout=250,
        check=True,
    )
    largest = 32768 * 1024 * 2
    assert int(done.stdout) < 2 * largest + 100_000_000
