"""Positions, starts and masks of packed documents, against slow loops and stock Megatron."""

import pytest
import torch

from megatron_bitcpm.data.documents import add_document_fields, document_starts

EOD = 2
pytestmark = pytest.mark.both_versions

CASES = {
    "by hand": [5, 6, EOD, 7, EOD, EOD, 8, 9],
    "no end": [5, 6, 7, 8],
    "all ends": [EOD] * 5,
    "first": [EOD, 5, 6, 7],
    "last": [5, 6, 7, EOD],
}


def fields(tokens, **options):
    tokens = torch.tensor(tokens)
    labels = torch.cat([tokens[1:], torch.tensor([11])])
    flags = {"reset_attention_mask": True, "reset_position_ids": True, "eod_mask_loss": True}
    return add_document_fields(tokens, labels, EOD, **{**flags, **options})


def test_by_hand():
    sample = fields(CASES["by hand"])
    assert sample["document_start"].tolist() == [0, 0, 0, 3, 3, 5, 6, 6]
    assert sample["position_ids"].tolist() == [0, 1, 2, 0, 1, 0, 0, 1]
    assert sample["loss_mask"].tolist() == [1, 1, 0, 1, 0, 0, 1, 1]
    assert sample["labels"].tolist() == [6, EOD, 7, EOD, EOD, 8, 9, 11]
    assert sample["loss_mask"].dtype == torch.float32
    for key in ("tokens", "labels", "position_ids", "document_start"):
        assert sample[key].dtype == torch.int64


@pytest.mark.parametrize("case", [*CASES, "random"])
def test_equal_to_stock_megatron(case):
    """Stock builds the S x S mask and loops; its numbers are the reference."""
    from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids

    tokens = CASES.get(case) or torch.randint(0, 8, (200,)).tolist()
    sample = fields(tokens)
    stock_mask, loss_mask, position_ids = _get_ltor_masks_and_position_ids(
        torch.tensor(tokens), EOD, True, True, True, True
    )
    assert torch.equal(sample["position_ids"], position_ids)
    assert torch.equal(sample["loss_mask"], loss_mask)
    index = torch.arange(len(tokens))
    attends = (index[None] <= index[:, None]) & (index[None] >= sample["document_start"][:, None])
    # stock says True where a token must NOT be attended to
    assert torch.equal(attends, ~stock_mask[0])


def test_a_packed_sample_is_its_documents_apart():
    lengths = [5, 1, 9, 3, 14]
    documents = [[*range(10, 9 + n), EOD] for n in lengths]
    packed = fields([t for document in documents for t in document])
    begin = 0
    for document in documents:
        apart = fields(document)
        part = slice(begin, begin + len(document))
        assert torch.equal(packed["position_ids"][part], apart["position_ids"])
        assert torch.equal(packed["document_start"][part] - begin, apart["document_start"])
        assert torch.equal(packed["loss_mask"][part], apart["loss_mask"])
        # a label of another document never counts
        counted = packed["loss_mask"][part] > 0
        assert torch.equal(packed["labels"][part][counted], apart["labels"][counted])
        begin += len(document)


def test_each_option_changes_only_its_own_field():
    tokens = CASES["by hand"]
    plain = fields(
        tokens, reset_attention_mask=False, reset_position_ids=False, eod_mask_loss=False
    )
    assert sorted(plain) == ["labels", "loss_mask", "position_ids", "tokens"]
    assert plain["position_ids"].tolist() == list(range(8))
    assert plain["loss_mask"].tolist() == [1.0] * 8
    only_mask = fields(tokens, reset_position_ids=False, eod_mask_loss=False)
    assert only_mask["document_start"].tolist() == [0, 0, 0, 3, 3, 5, 6, 6]
    assert only_mask["position_ids"].tolist() == list(range(8))
    only_positions = fields(tokens, reset_attention_mask=False, eod_mask_loss=False)
    assert "document_start" not in only_positions
    assert only_positions["position_ids"].tolist() == [0, 1, 2, 0, 1, 0, 0, 1]


def test_starts_of_a_long_sample_equal_a_loop():
    tokens = torch.randint(0, 900, (32_768,))
    start, wanted = 0, []
    for t, token in enumerate(tokens.tolist()):
        wanted.append(start)
        if token == EOD:
            start = t + 1
    assert len(set(wanted)) > 20
    assert document_starts(tokens, EOD).tolist() == wanted
