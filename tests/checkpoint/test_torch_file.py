"""Files in the format of torch.save: torch reads ours, we read torch's."""

from __future__ import annotations

import dataclasses
import io
import zipfile
from collections import OrderedDict

import pytest
import torch

from megatron_bitcpm.checkpoint.torch_file import TorchFile, map_file
from megatron_bitcpm.conversion.torch_file_writer import LateTensor, write_torch_file


def late(tensor):
    return LateTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor)


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("weights_only", [True, False])
def test_torch_reads_it(tmp_path, mmap, weights_only):
    a, b = torch.randn(5, 7).bfloat16(), torch.randn(300, 11)
    path = tmp_path / "x.pt"
    with path.open("wb") as file:
        write_torch_file(file, {"m": OrderedDict(a=late(a), b=late(b)), "iteration": 3})
    found = torch.load(path, mmap=mmap, weights_only=weights_only)
    assert torch.equal(found["m"]["a"], a) and torch.equal(found["m"]["b"], b)
    assert found["iteration"] == 3
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None


def test_several_in_one_file():
    file = io.BytesIO()
    tensors = [torch.randn(3, 2), torch.randn(4)]
    ends = []
    for tensor in tensors:
        write_torch_file(file, late(tensor))
        ends.append(file.tell())
    data = file.getvalue()
    for start, end, tensor in zip([0, ends[0]], ends, tensors, strict=True):
        assert torch.equal(torch.load(io.BytesIO(data[start:end])), tensor)


def test_reads_what_torch_writes(tmp_path):
    base = torch.randn(40, 30)
    objects = {
        "transposed": base.t(),
        "slice": base[3:5, 2:],
        "parameter": torch.nn.Parameter(base[:2].clone()),
        "half": base.half(),
        "ids": torch.arange(9),
    }
    torch.save(objects, tmp_path / "x.pt")
    file = TorchFile(map_file(tmp_path / "x.pt"))
    assert file.content.keys() == objects.keys()
    for name, wanted in objects.items():
        assert torch.equal(file.tensor(file.content[name]), wanted), name


def test_files_without_checksums(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(4)}, tmp_path / "x.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    file = TorchFile(map_file(tmp_path / "x.pt"))
    assert torch.equal(file.tensor(file.content["a"]), torch.ones(4))


def test_a_tensor_larger_than_its_record(tmp_path):
    with (tmp_path / "x.pt").open("wb") as file:
        write_torch_file(file, late(torch.ones(4)))
    file = TorchFile(map_file(tmp_path / "x.pt"))
    for fields in ({"shape": (5,)}, {"offset": 1}, {"offset": -1}, {"stride": (2,)}):
        with pytest.raises(zipfile.BadZipFile):
            file.tensor(dataclasses.replace(file.content, **fields))
