"""Files made to harm the reader: nothing in them runs, crashes, hangs or takes all memory."""

from __future__ import annotations

import dataclasses
import json
import pickle
import struct
import zipfile

import pytest
import torch
from helpers.megatron_models import assert_same, make_source
from helpers.stock_checkpoints import edit, write_stock
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

from megatron_bitcpm.arch.folding import Folding
from megatron_bitcpm.checkpoint.safe_load import (
    load_common,
    read_metadata,
    restricted_unpickling,
)
from megatron_bitcpm.checkpoint.torch_file import TorchFile, map_file
from megatron_bitcpm.conversion.hf.tensor_files import open_tensor_file
from megatron_bitcpm.conversion.megatron.open import open_megatron
from megatron_bitcpm.conversion.megatron.torch_dist_writer import write_torch_dist
from megatron_bitcpm.errors import CheckpointError

FOLDING = list(Folding.model_fields)
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
DEEP = 20_000
OLD_START = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
STORAGE = b"(U\x07storagectorch\nFloatStorage\nU\x010U\x03cpuK\x04tQ"
PICKLES = {
    # An entry of the memo with a large number: Python's own unpickler zeroes 32 GB.
    "memo": b"\x80\x02}r" + struct.pack("<I", 2**31) + b".",
    "bytearray": b"\x80\x05}\x96" + struct.pack("<Q", 2**36) + b".",
    "bytes": b"\x80\x04}\x8e" + struct.pack("<Q", 2**60) + b".",
    "long": b"\x80\x02}\x8b" + struct.pack("<i", 2**31 - 1) + b".",
    # The hash of a deep tuple overflows the stack; of one that doubles 60 times, never ends.
    "deep key": b"\x80\x02})" + b"\x85" * DEEP + b"Ns.",
    "deep keys": b"\x80\x02}()" + b"\x85" * DEEP + b"Nu.",
    "deep dict": b"\x80\x02()" + b"\x85" * DEEP + b"Nd.",
    "doubled key": b"\x80\x02}K\x01" + b"2\x86" * 60 + b"Ns.",
    "doubled member": b"\x80\x02cbuiltins\nset\n]K\x01" + b"2\x86" * 60 + b"a\x85R.",
    "doubled members": b"\x80\x04\x8f(K\x01" + b"2\x86" * 60 + b"\x90.",
    "frozen members": b"\x80\x04(K\x01" + b"2\x86" * 60 + b"\x91.",
    "pairs": b"\x80\x02ccollections\nOrderedDict\n](K\x01" + b"2\x86" * 60 + b"K\x01\x86e\x85R.",
    # The hash of an integer is its remainder by 2^61 - 1.
    "integers": pickle.dumps({n * (2**61 - 1): None for n in range(20_000)}, 2),
    "extension": b"\x80\x02\x82\x01.",
    "inst": b"(S'touch x'\nios\nsystem\n.",
    "obj": b"(cos\nsystem\nS'touch x'\no.",
    "newobj_ex": b"\x80\x04\x8c\x02os\x8c\x06system\x93)}\x92.",
    "attribute": b"\x80\x04\x8c\x05torch\x8c\x12_utils.os.system.x\x93.",
    "persistent": b"Pother\n.",
    # State given to what the file only names, or to a finished tensor.
    "function": b"\x80\x02" + REBUILD + b"}U\x08__name__U\x01xsb.",
    "class": b"\x80\x02cargparse\nNamespace\nN}U\x01aK\x05s\x86b.",
    "tensor": b"\x80\x02" + REBUILD + b"(" + STORAGE + b"K\x00K\x04\x85K\x01\x85\x89}tR}U\x05dtype"
    b"U\x01xsb.",
    "negative": b"\x80\x02" + REBUILD + b"(" + STORAGE + b"J\xff\xff\xff\xffK\x04\x85K\x01\x85tR.",
    "text": b"\x80\x02" + REBUILD + b"(" + STORAGE + b"K\x00U\x014\x85K\x01\x85tR.",
}


def write_archive(path, data, **more):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/data/0", bytes(16))
        for name, content in more.items():
            archive.writestr(f"archive/{name}", content)


def read_hostile(folder, kind):
    """Open a file; return what was raised."""
    try:
        if kind == "shard":
            TorchFile(map_file(folder / "common.pt"))
        elif kind == "bin":
            open_tensor_file(folder / "common.pt")
        elif kind == "old bin":
            start = b"".join(pickle.dumps(part, 2) for part in OLD_START)
            (folder / "old.bin").write_bytes(start + (folder / "pickle").read_bytes())
            open_tensor_file(folder / "old.bin")
        elif kind == "restricted":
            with restricted_unpickling():
                torch.load(folder / "common.pt", weights_only=False)
        elif kind == "common":
            load_common(folder)
        else:
            read_metadata(folder)
    except Exception as error:
        return error
    return None


@pytest.mark.parametrize("kind", ["shard", "bin", "old bin", "restricted", "common", "index"])
@pytest.mark.parametrize("case", PICKLES)
def test_hostile_pickles(tmp_path, monkeypatch, case, kind):
    monkeypatch.chdir(tmp_path)
    if kind == "index":
        (tmp_path / ".metadata").write_bytes(PICKLES[case])
    else:
        (tmp_path / "pickle").write_bytes(PICKLES[case])
        write_archive(tmp_path / "common.pt", PICKLES[case])
    error = read_hostile(tmp_path, kind)
    assert not (tmp_path / "x").exists()
    # A memo that is a dictionary does not care for numbers.
    assert error is not None or (case == "memo" and kind in ("shard", "common"))
    assert "\n" not in str(error)


def tensor_file(path, tensor):
    torch.save(tensor, path)
    file = TorchFile(map_file(path))
    return file, file.content


def test_tensors_larger_than_their_memory(tmp_path):
    """A stride of 0 would make any size out of one value."""
    file, stored = tensor_file(tmp_path / "x.pt", torch.ones(4))
    for fields in (
        {"shape": (2**40,), "stride": (0,)},
        {"shape": (2**62, 2**62), "stride": (0, 0)},
        {"shape": (2,), "stride": (2**62,)},
        {"offset": 2**63},
    ):
        with pytest.raises(zipfile.BadZipFile):
            file.tensor(dataclasses.replace(stored, **fields))
    assert file.tensor(dataclasses.replace(stored, shape=(0,))).shape == (0,)


def test_two_records_of_one_name(tmp_path):
    path = tmp_path / "x.pt"
    torch.save(torch.ones(4), path)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("x/data/0", bytes(16))
    with pytest.raises(zipfile.BadZipFile, match="two records of one name"):
        TorchFile(map_file(path))


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", ["DATA.PKL", "data/0", "Data/0"])
def test_a_record_that_torch_would_take_for_another(tmp_path, name):
    """Torch looks records up without regard to capitals."""
    write_archive(tmp_path / "common.pt", pickle.dumps({}, 2), **{name: PICKLES["deep key"]})
    for kind in ("shard", "bin", "restricted", "common"):
        assert "two records of one name" in str(read_hostile(tmp_path, kind)), kind


def test_a_record_that_is_elsewhere(tmp_path):
    """The directory at the end of the file names another place than the record's."""
    path = tmp_path / "x.pt"
    torch.save({"a": torch.ones(4), "b": torch.zeros(4)}, path)
    with zipfile.ZipFile(path) as archive:
        a, b = (archive.getinfo(f"x/data/{n}").header_offset for n in (0, 1))
    data = bytearray(path.read_bytes())
    entry = data.rindex(b"x/data/0") - 46
    assert struct.unpack_from("<L", data, entry + 42)[0] == a
    struct.pack_into("<L", data, entry + 16, 0)  # without a checksum
    for wrong in (b, a + 1, 2**31):
        struct.pack_into("<L", data, entry + 42, wrong)
        path.write_bytes(data)
        with pytest.raises((zipfile.BadZipFile, struct.error)):
            file = TorchFile(map_file(path))
            file.tensor(file.content["a"])


@pytest.fixture
def written(tmp_path):
    write_torch_dist(make_source(tmp_path), tmp_path / "out")
    return tmp_path / "out" / "release"


def change_index(folder, change):
    index = pickle.loads((folder / ".metadata").read_bytes())
    change(index)
    (folder / ".metadata").write_bytes(pickle.dumps(index))


NORM = "decoder.final_layernorm.weight"


def first_place(index):
    return next(iter(index.storage_data.values()))


@pytest.mark.parametrize(
    "change",
    [
        lambda i: setattr(first_place(i), "offset", "x"),
        lambda i: setattr(first_place(i), "length", -1),
        lambda i: i.storage_data.update({"x": first_place(i)}),
        lambda i: setattr(i.state_dict_metadata[NORM], "size", None),
        lambda i: setattr(i.state_dict_metadata[NORM], "size", (-32,)),
        lambda i: setattr(i.state_dict_metadata[NORM], "properties", None),
        lambda i: setattr(i.state_dict_metadata[NORM], "chunks", [None]),
        lambda i: setattr(
            i.state_dict_metadata[NORM], "chunks", [ChunkStorageMetadata((0, 0), (32, 1))]
        ),
    ],
)
def test_an_index_of_other_objects(written, change):
    change_index(written, change)
    with pytest.raises(CheckpointError, match=r"\.metadata: cannot be loaded"):
        open_megatron(written)


def test_parts_that_overlap(tmp_path):
    """As many values as the tensor has, but half of them twice and half of them never."""
    source = make_source(tmp_path)
    from megatron_bitcpm.arch.layout import Layout

    write_torch_dist(source, tmp_path / "out", Layout(2, 1))
    folder, name = tmp_path / "out" / "release", "embedding.word_embeddings.weight"

    def double(index):
        chunks = index.state_dict_metadata[name].chunks
        chunks[1] = chunks[0]

    change_index(folder, double)
    with pytest.raises(CheckpointError, match="some values are listed twice"):
        open_megatron(folder).tensor("model.embed_tokens.weight")


def test_two_folders_of_one_rank(tmp_path):
    folder = write_stock(make_source(tmp_path), tmp_path / "run") / "iter_0000007"
    (folder / "mp_rank_000_000").mkdir()
    with pytest.raises(CheckpointError, match=r"mp_rank_00_000.* same rank"):
        open_megatron(folder)


def test_arguments_that_differ_between_ranks(tmp_path):
    folder = write_stock(make_source(tmp_path), tmp_path / "run")
    edit(folder, "mp_rank_01_001", lambda shard: setattr(shard["args"], "rotary_base", 10000))
    with pytest.raises(CheckpointError, match=r"mp_rank_01_001/\S+: model and layout of the arg"):
        open_megatron(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(iteration="7" * 1000), "iteration is not a number"),
        (lambda s: s.update(checkpoint_version=[3]), "checkpoint_version is not a number"),
        (lambda s: setattr(s["args"], "num_layers", "4"), r"args\.num_layers='4', a whole number"),
        (lambda s: setattr(s["args"], "num_query_groups", 0), r"args\.num_query_groups=0, a whole"),
        (lambda s: setattr(s["args"], "swiglu", "x" * 10**6), r"args\.swiglu='x{5,30}\.\.\.x"),
    ],
)
def test_arguments_of_other_types(tmp_path, change, message):
    layout = {"tp": 1, "pp": 1, "stages": [(0, 1, 2, 3)]}
    folder = write_stock(make_source(tmp_path), tmp_path / "run", scale_emb=2.0, **layout)
    edit(folder, "mp_rank_00", change)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_megatron(folder)
    assert len(str(caught.value)) < 1000


def test_stages_of_other_types(tmp_path):
    """Each layer has its own type, and integers are no weights."""
    source = make_source(tmp_path)
    for name, tensor in source.tensors.items():
        if name.startswith("model.layers.3."):
            source.tensors[name] = tensor.float()
    folder = write_stock(source, tmp_path / "run")
    found = open_megatron(folder)
    assert_same(found, source)
    assert all(found.dtype(name) == tensor.dtype for name, tensor in source.tensors.items())

    def to_integers(shard):
        model = shard["model"]
        model["decoder.final_layernorm.weight"] = model["decoder.final_layernorm.weight"].long()

    edit(folder, "mp_rank_00_001", to_integers)
    with pytest.raises(CheckpointError, match=r"mp_rank_00_001\S+: decoder.final\S+ is int64"):
        open_megatron(folder)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("quantizer", {"tensor_model_parallel_size": float("inf"), "numerics": "fp32"}, "stamp"),
        ("folding", dict.fromkeys(FOLDING, "1"), "folding.scale_emb='1': must be a valid number"),
    ],
)
def test_a_description_of_other_types(written, key, value, message):
    path = written / "bitcpm_model.json"
    content = json.loads(path.read_text())
    content[key] = value
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=message):
        open_megatron(written)
