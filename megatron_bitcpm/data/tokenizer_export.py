"""A SentencePiece BPE model as a Hugging Face `tokenizer.json`, with identical ids.

SentencePiece joins, again and again, the adjacent pair whose concatenation is the earliest piece
(leftmost on a tie). `tokenizers`' BPE joins the pair of lowest merge rank (leftmost on a tie).
The two agree when the merges are every split of every piece into two pieces, in order of the
whole piece. Normalisation, prefix and special tokens change nothing else.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_bitcpm.files import write_json
from megatron_bitcpm.records import Record

SPACE_MARK = "\u2581"
"""SentencePiece writes a space as this character; in decoded text it is a space again."""

UNK, BOS, EOS = "<unk>", "<s>", "</s>"
UNK_ID, BOS_ID, EOS_ID = 0, 1, 2

MARKER_FILE = "bitcpm_tokenizer.json"
"""Present in folders written by `train_tokenizer`."""


class Marker(Record):
    """What loading needs of the marker file: `tokenizer_sha256` of the folder as it was trained."""

    sha256: str


def build_merges(pieces: list[str], is_normal: list[bool]) -> list[list[str]]:
    """Return the merges ``[left, right]`` of a SentencePiece BPE vocabulary, the first one first.

    Normal pieces stand in order of training, most frequent merge first, followed by the single
    characters; no merge may produce or use others (control, unknown, bytes). Splits of one piece
    are ordered by the ids of their halves. Their order matters only where neighbours a, b, c with
    ab == bc meet (runs such as ``- -- -``): SentencePiece then joins the left pair, tokenizers the
    one that is first here. The tests compare both on long runs and random text and find no such
    case.
    """
    ids = {piece: i for i, piece in enumerate(pieces) if is_normal[i]}
    merges: list[list[str]] = []
    for piece in sorted(ids, key=ids.__getitem__):
        splits = [
            (piece[:i], piece[i:])
            for i in range(1, len(piece))
            if piece[:i] in ids and piece[i:] in ids
        ]
        splits.sort(key=lambda pair: (ids[pair[0]], ids[pair[1]]))
        merges += [list(pair) for pair in splits]
    return merges


def tokenizer_json(pieces: list[str], is_normal: list[bool]) -> dict[str, Any]:
    """Return the content of `tokenizer.json` for a SentencePiece BPE vocabulary."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": i,
                "content": token,
                **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
                "special": True,
            }
            for i, token in enumerate((UNK, BOS, EOS))
        ],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": UNK,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece: i for i, piece in enumerate(pieces)},
            "merges": build_merges(pieces, is_normal),
        },
    }


def tokenizer_config() -> dict[str, Any]:
    """Return the content of `tokenizer_config.json`.

    `PreTrainedTokenizerFast` takes `tokenizer.json` as it is; the Llama class would rebuild it with
    a prefix space. `split_special_tokens`: text that happens to read ``</s>`` (HTML has that tag)
    must not end a document, and SentencePiece does not let it.
    """
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "unk_token": UNK,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 10**30,
    }


def write_hf_files(folder: Path, model: bytes) -> None:
    """Write the files of a serialised SentencePiece BPE model with byte fallback into a folder."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = range(processor.get_piece_size())
    pieces = [processor.id_to_piece(i) for i in ids]
    is_normal = [
        not (processor.is_control(i) or processor.is_unknown(i) or processor.is_byte(i))
        for i in ids
    ]
    (folder / "tokenizer.model").write_bytes(model)
    write_json(folder / "tokenizer.json", tokenizer_json(pieces, is_normal), indent=1)
    write_json(folder / "tokenizer_config.json", tokenizer_config(), indent=1)
