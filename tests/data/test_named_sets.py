"""Validation sets by name, fingerprints, and errors that name the configuration key."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron_bitcpm.config import DataConfig
from megatron_bitcpm.data.dataset import build_train_dataset, build_valid_datasets
from megatron_bitcpm.data.sets import data_fingerprints
from megatron_bitcpm.errors import DataError

EOD = 2
pytestmark = pytest.mark.both_versions


@pytest.fixture
def sets(write_windows, data_config) -> DataConfig:
    """Training a and b, validation a_valid as `own` and c_valid as `web`."""
    for name, first, count in (("a", 100, 10), ("b", 200, 12), ("c", 300, 9)):
        write_windows(name, first, count)
        prefix = write_windows(name, first + 1000, count - 4, split="valid")
    folder = Path(prefix).parent
    return data_config(
        blend=[{"prefix": f"{folder}/a", "weight": 0.3}, {"prefix": f"{folder}/b", "weight": 0.9}],
        valid={"own": f"{folder}/a", "web": f"{folder}/c"},
    )


def changed(data: DataConfig, **fields) -> DataConfig:
    return DataConfig(**{**data.model_dump(), **fields})


def numbers(dataset, count):
    return [int(dataset[i]["tokens"][0]) for i in range(count)]


def test_validation_sets_by_name(sets, tokenizer):
    valid = build_valid_datasets(sets, 5, tokenizer)
    assert list(valid) == ["own", "web"]
    assert [len(dataset) for dataset in valid.values()] == [6, 5]
    assert {n // 100 for n in numbers(valid["own"], 6)} == {11}
    assert {n // 100 for n in numbers(valid["web"], 5)} == {13}
    # neither other sets nor how many windows are used changes the order
    alone = changed(sets, valid={"x": sets.valid["web"]})
    assert numbers(build_valid_datasets(alone, 2, tokenizer)["x"], 5) == numbers(valid["web"], 5)


def test_default_validation_sets_are_the_training_sets_own(sets, tokenizer):
    valid = build_valid_datasets(changed(sets, valid={}), 6, tokenizer)
    assert {name: len(dataset) for name, dataset in valid.items()} == {"a": 6, "b": 8}
    single = DataConfig(prefix=sets.blend[1].prefix, tokenizer="plain", seq_length=4)
    valid = build_valid_datasets(single, 6, tokenizer)
    assert {name: len(dataset) for name, dataset in valid.items()} == {"valid": 8}


def test_options_hold_for_validation_too(sets, write_split, tokenizer):
    prefix = write_split("e", [[5, 6, EOD], [7, EOD], [8, 9, 10, EOD]], "valid")
    options = {"reset_attention_mask": True, "reset_position_ids": True, "eod_mask_loss": True}
    data = changed(sets, valid={"e": prefix}, **options)
    sample = build_valid_datasets(data, 1, tokenizer)["e"][0]
    tokens = sample["tokens"].tolist()
    assert sample["loss_mask"].tolist() == [float(t != EOD) for t in tokens]
    assert sample["position_ids"][tokens.index(EOD)] == tokens.index(EOD)
    assert (sample["document_start"][: tokens.index(EOD) + 1] == 0).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"valid": {"own": "A", "web": "none"}}, r"data\.valid\.web=none_valid\.idx: no such file"),
        ({"valid": {}}, r"data\.blend\.0\.prefix=.*a: the valid split has 6 windows .* 7 are"),
        ({"valid": {"w": "A"}}, r"data\.valid\.w=.*a: the valid split has 6 windows of 4 tokens"),
    ],
)
def test_validation_errors_name_the_set(sets, tokenizer, fields, message):
    valid = {k: v.replace("A", sets.valid["own"]) for k, v in fields["valid"].items()}
    with pytest.raises(DataError, match=message) as caught:
        build_valid_datasets(
            changed(sets, valid=valid), 7 if "none" not in str(fields) else 1, tokenizer
        )
    assert "\n" not in str(caught.value)


def test_training_errors_name_the_entry(sets, write_split, tokenizer):
    def build(*prefixes, **fields):
        entries = [{"prefix": prefix, "weight": 1} for prefix in prefixes]
        build_train_dataset(changed(sets, blend=entries, **fields), 1, 1, tokenizer)

    a = sets.blend[0].prefix
    with pytest.raises(DataError, match=r"data\.blend\.1\.prefix=none_train\.idx: no such file"):
        build(a, "none")
    with pytest.raises(DataError, match=r"data\.blend\.1\.prefix=.*s_train: 3 tokens, one sample "):
        build(a, write_split("s", [[5, 6, EOD]]))
    with pytest.raises(DataError, match=r"data\.blend\.1\.prefix=.*v_train\.bin: token id 60000 "):
        build(a, write_split("v", [[5, 60_000, 6, 7, EOD]]))
    with pytest.raises(DataError, match=r"data\.blend\.2\.prefix=.*holds the same data as data\.b"):
        build(a, sets.blend[1].prefix, a)
    Path(f"{a}.json").write_text("{}")
    with pytest.raises(DataError, match=r"data\.blend\.1\.prefix=.*a\.json: not a manifest"):
        build(sets.blend[1].prefix, a)


@pytest.mark.parametrize("option", ["reset_attention_mask", "reset_position_ids", "eod_mask_loss"])
def test_documents_without_ends_are_refused_when_ends_matter(
    write_split, data_config, tokenizer, option
):
    prefix = write_split("d", [[5, 6, EOD], [], [7, 8, 9], [6, 6, 6, EOD]])
    build_train_dataset(data_config(prefix=prefix), 1, 1, tokenizer)
    with pytest.raises(DataError, match=r"data\.prefix=.*d_train: document 2 does not end with"):
        build_train_dataset(data_config(prefix=prefix, **{option: True}), 1, 1, tokenizer)
    good = write_split("g", [[5, 6, EOD], [], [7, 8, EOD], [EOD]])
    build_train_dataset(data_config(prefix=good, **{option: True}), 1, 1, tokenizer)


def test_unused_splits_need_not_exist(sets, tokenizer):
    for path in Path(sets.blend[1].prefix).parent.glob("b_valid.*"):
        path.unlink()
    build_train_dataset(sets, 1, 1, tokenizer)
    build_valid_datasets(sets, 1, tokenizer)


def test_fingerprints_see_contents_weights_and_order_and_not_places(sets, tokenizer, tmp_path):
    facts = data_fingerprints(sets, tokenizer)
    assert list(facts) == [
        "tokenizer_sha256",
        "train_data",
        "valid_data.own",
        "valid_data.web",
    ]
    assert data_fingerprints(sets, type(tokenizer)("1" * 64)) == {
        **facts,
        "tokenizer_sha256": "1" * 64,
    }
    a, b = ({"prefix": e.prefix, "weight": e.weight} for e in sets.blend)

    def train(*blend):
        return data_fingerprints(changed(sets, blend=blend), tokenizer)["train_data"]

    assert train({**a, "weight": 1}, {**b, "weight": 3}) == facts["train_data"]
    for other in ((b, a), (a,), (a, {**b, "weight": 1}), ({**a, "prefix": sets.valid["web"]}, b)):
        assert train(*other) != facts["train_data"]
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in tmp_path.glob("a_train.*"):
        shutil.copy(path, moved)
    assert train({**a, "prefix": f"{moved}/a"}, b) == facts["train_data"]
    # the same lengths and other tokens
    tokens = np.fromfile(moved / "a_train.bin", np.uint16)
    tokens[-2] += 1
    tokens.tofile(moved / "a_train.bin")
    assert train({**a, "prefix": f"{moved}/a"}, b) != facts["train_data"]
    other_valid = data_fingerprints(changed(sets, valid={"own": sets.valid["web"]}), tokenizer)
    assert other_valid["train_data"] == facts["train_data"]
    assert other_valid["valid_data.own"] == facts["valid_data.web"]
