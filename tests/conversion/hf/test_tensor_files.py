"""Single files of tensors, and every way in which one can be damaged or hostile."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile

import pytest
import torch
from helpers.hand_made_folders import OUTPUT, make_tensors, refused, write
from safetensors.torch import save_file

from megatron_bitcpm.conversion.hf.source import open_hf
from megatron_bitcpm.conversion.hf.tensor_files import open_tensor_file
from megatron_bitcpm.conversion.open import open_source
from megatron_bitcpm.errors import CheckpointError


def entry(start, end, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def write_raw(path, header, data, length=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "invalid offset for tensor `b`"),  # overlap
        ({"a": entry(0, 8), "b": entry(0, 8)}, 8, "invalid offset for tensor"),
        ({"a": entry(0, 8), "b": entry(12, 20)}, 20, "invalid offset for tensor `b`"),  # gap
        ({"a": entry(0, 8), "b": entry(8, 1 << 40)}, 16, r"truncated: 16 bytes .*\(b\) ends at"),
        ({"a": entry(0, 8), "b": entry(8, 16)}, 12, r"truncated: 12 bytes of values, .*\(b\)"),
        ({"a": entry(0, 8)}, 12, "longer than its tensors: 12 bytes"),
        ({"a": entry(8, 0)}, 8, "is longer|invalid offset"),
        ({"a": entry(0, 8, (3,))}, 8, "is damaged"),
        ({"a": entry(0, 8, (1 << 62, 4))}, 8, "is damaged"),
        ({"a": entry(0, 8, (-2,))}, 8, "is damaged"),
        ({"a": entry(0, 8, (2,), "F33")}, 8, "is damaged"),
        (b'{"a":', 8, "is damaged"),
        (b"\xff" * 40, 8, "is damaged"),
    ],
)
def test_damaged_safetensors_headers(header, data, message, tmp_path):
    path = tmp_path / "model.safetensors"
    write_raw(path, header, bytes(data))
    with pytest.raises(CheckpointError, match=message) as caught:
        open_tensor_file(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_no_header_at_all(tmp_path):
    path = tmp_path / "model.safetensors"
    for content in (b"", b"\0" * 4, b"\xff" * 8, struct.pack("<Q", 10**15) + b"{}"):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="is damaged or no safetensors file"):
            open_tensor_file(path)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_truncation_anywhere_is_noticed(kind, tmp_path):
    folder = write(tmp_path / "m", make_tensors(), kind)
    path = next(p for p in folder.iterdir() if p.name != "config.json")
    content = path.read_bytes()
    for keep in (0, 1, 7, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:keep])
        message = refused(folder, "is damaged|is empty|truncated|cannot be")
        assert path.name in message


def test_flipped_bits_of_a_safetensors_header_never_pass_unnoticed(tmp_path):
    tensors = make_tensors()
    folder = write(tmp_path / "m", tensors)
    path = folder / "model.safetensors"
    content = path.read_bytes()
    end = 8 + struct.unpack("<Q", content[:8])[0]
    passed = 0
    for position in range(0, end, 7):
        flipped = bytearray(content)
        flipped[position] ^= 1 << (position % 7)
        path.write_bytes(flipped)
        try:
            source = open_source(folder)
        except CheckpointError as error:
            assert "\n" not in str(error)
            continue
        # What is left must be a change without meaning, as in the names of metadata.
        assert all(torch.equal(source.tensor(n), t) for n, t in tensors.items())
        passed += 1
    assert passed < 10


def test_flipped_bits_of_a_bin_name_the_tensor(tmp_path):
    folder = write(tmp_path / "m", make_tensors(), "bin")
    path = folder / "pytorch_model.bin"
    content = path.read_bytes()
    name = "model.layers.1.self_attn.o_proj.weight"
    at = content.index(make_tensors()[name].view(torch.int16).numpy().tobytes())
    flipped = bytearray(content)
    flipped[at + 100] ^= 4
    path.write_bytes(flipped)
    assert torch.load(path, weights_only=True)[name].shape == (32, 64)  # torch does not notice
    with pytest.raises(CheckpointError, match=f"tensor {name} is damaged: record data/.* checksum"):
        open_source(folder).tensor(name)
    for position in range(0, len(content), len(content) // 150):
        flipped = bytearray(content)
        flipped[position] ^= 16
        path.write_bytes(flipped)
        try:
            source = open_source(folder)
            found = {name: source.tensor(name) for name in source.shapes()}
        except CheckpointError as error:
            assert "\n" not in str(error)
            continue
        assert all(torch.equal(found[n], t) for n, t in make_tensors().items())


def test_a_bin_without_checksums_is_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        folder = write(tmp_path / "m", make_tensors(), "bin")
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(open_hf(folder).tensor(OUTPUT), make_tensors()[OUTPUT])


def test_a_compressed_bin_is_refused(tmp_path):
    folder = write(tmp_path / "m", make_tensors(), "bin")
    path = folder / "pytorch_model.bin"
    old = zipfile.ZipFile(io.BytesIO(path.read_bytes()))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for member in old.namelist():
            new.writestr(member, old.read(member))
    refused(folder, "record .* is compressed")


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_a_malicious_bin_is_not_run(form, tmp_path):
    folder = write(tmp_path / "m", make_tensors(), "bin")
    path, mark = folder / "pytorch_model.bin", tmp_path / "executed"
    content = {**make_tensors(), "evil": Evil(str(mark))}
    if form == "pickle":
        path.write_bytes(pickle.dumps(content["evil"]))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: ") as caught:
        open_source(folder)
    assert "\n" not in str(caught.value)
    assert "refers to io.open, which no checkpoint needs; nothing of it was run" in str(
        caught.value
    )
    assert not mark.exists()
    if form == "zip":  # it would have been
        torch.load(path, weights_only=False)
        assert mark.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(2)], "holds list, not named tensors"),
        ({}, "holds dict, not named tensors"),
        ({"a": {"b": torch.ones(2)}}, "'a' is dict, not a tensor"),
        ({3: torch.ones(2)}, "3 is a tensor, not a tensor with a name"),
        ({"a": torch.ones(2).to_sparse()}, r"refers to torch\._utils\._rebuild_sparse_tensor"),
        ({"a": torch.ones(2, device="meta")}, r"refers to torch\._utils\._rebuild_meta_tensor_no"),
    ],
)
def test_a_bin_of_something_else(content, message, tmp_path):
    torch.save(content, tmp_path / "x.bin")
    with pytest.raises(CheckpointError, match=message):
        open_tensor_file(tmp_path / "x.bin")


def test_single_files(tmp_path):
    tensors = make_tensors()
    torch.save(tensors, tmp_path / "x.pt")
    save_file(tensors, tmp_path / "x.safetensors")
    for path in (tmp_path / "x.pt", tmp_path / "x.safetensors"):
        file = open_tensor_file(path)
        assert set(file.names()) == set(tensors)
        assert all(file.shape(n) == tuple(t.shape) for n, t in tensors.items())
        assert all(file.dtype(n) == torch.bfloat16 for n in tensors)
        assert all(torch.equal(file.tensor(n), t) for n, t in tensors.items())
    save_file({"mask": torch.ones(3, dtype=torch.bool)}, tmp_path / "m.safetensors")
    file = open_tensor_file(tmp_path / "m.safetensors")
    assert file.raw_tensor("mask").all()
    with pytest.raises(CheckpointError, match="tensor mask has type BOOL"):
        file.tensor("mask")
    with pytest.raises(CheckpointError, match="no such file"):
        open_tensor_file(tmp_path / "absent.bin")
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="is not a file of tensors by its name"):
        open_tensor_file(tmp_path / "x.gguf")


def test_a_bare_pickle_runs_nothing_and_is_named(tmp_path):
    marker = tmp_path / "ran"

    class Attack:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    for protocol in (2, 4):
        (tmp_path / "a.bin").write_bytes(pickle.dumps({"w": Attack()}, protocol))
        with pytest.raises(CheckpointError, match=r"refers to io\.open, which no checkpoint needs"):
            open_tensor_file(tmp_path / "a.bin")
    assert not marker.exists()


@pytest.mark.parametrize("new_format", [True, False])
def test_what_torch_saves_is_read_as_torch_reads_it(new_format, tmp_path):
    tensors = {
        "transposed": torch.randn(3, 5).t(),
        "part": torch.randn(8)[2:5],
        "parameter": torch.nn.Parameter(torch.randn(2, 2)),
        "half": torch.randn(3).half(),
        "scalar": torch.tensor(2.5),
        "integers": torch.arange(7),
    }
    tensors["alias"] = tensors["half"]
    if new_format:
        tensors["float8"] = torch.randn(4).to(torch.float8_e4m3fn)
    torch.save(tensors, tmp_path / "x.bin", _use_new_zipfile_serialization=new_format)
    file = open_tensor_file(tmp_path / "x.bin")
    assert file.names() == list(tensors)
    for name, wanted in torch.load(tmp_path / "x.bin", weights_only=True).items():
        found = file.raw_tensor(name)
        assert (found.dtype, found.shape, found.stride()) == (
            wanted.dtype,
            wanted.shape,
            wanted.stride(),
        ), name
        assert torch.equal(found.float(), wanted.detach().float()), name
    assert file.raw_tensor("alias").data_ptr() == file.raw_tensor("half").data_ptr()


def test_an_old_bin_that_is_cut_off_names_its_file(tmp_path):
    path = tmp_path / "x.bin"
    torch.save(make_tensors(), path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    for keep in (5, 40, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:keep])
        with pytest.raises(CheckpointError, match=r"x\.bin: .*(damaged|cut off)|nothing of it"):
            file = open_tensor_file(path)
            for name in file.names():
                file.tensor(name)
