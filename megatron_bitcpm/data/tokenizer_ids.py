"""How many ids a tokenizer folder has and which are special, read from its files alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, Field, ValidationError

from megatron_bitcpm.errors import CheckpointError, describe
from megatron_bitcpm.files import read_json, tokenizer_sha256
from megatron_bitcpm.records import Record, explain

VOCABULARY_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    # Beside it, a SentencePiece file of another name cuts the text only; the ids are here.
    "vocab.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.txt",
)
"""Files that hold a tokenizer's vocabulary; of several the first one counts."""


@dataclass(frozen=True)
class TokenizerIds:
    """What a model needs to know: largest id + 1, and special ids, None where there is none."""

    size: int
    bos: int | None
    eos: int | None
    pad: int | None


def has_vocabulary(folder: Path | None) -> bool:
    """Whether there is a folder, with a tokenizer's vocabulary in it."""
    return folder is not None and any((folder / name).is_file() for name in VOCABULARY_FILES)


def check_tokenizer_folder(folder: str | Path) -> Path:
    """Return the folder's path; refuse one that is absent, also where it turns out not needed."""
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(
            f"tokenizer={folder}: no such folder. Name the tokenizer of the run (--tokenizer)."
        )
    return folder


def read_tokenizer_ids(folder: str | Path, vocab_size: int | None = None) -> TokenizerIds:
    """Read sizes and special ids out of the files of a tokenizer or model folder.

    `vocab_size` is the model's where it is known; files with another number of ids are refused.
    """
    folder = check_tokenizer_folder(folder)
    try:
        ids = _read_ids(folder)
    except CheckpointError:
        raise
    # RuntimeError: a model file that sentencepiece cannot parse.
    except (ValueError, OSError, RuntimeError) as error:
        raise CheckpointError(
            f"tokenizer={folder}: cannot be understood ({describe(error)}). Name the tokenizer of "
            "the run (--tokenizer)."
        ) from error
    if vocab_size is not None and ids.size != vocab_size:
        raise CheckpointError(
            f"tokenizer={folder}: its files hold {ids.size} ids, the model has {vocab_size}. Name "
            "the tokenizer of the run (--tokenizer), or save it with a tokenizer.json."
        )
    return ids


def read_run_tokenizer(folder: str | Path, vocab_size: int, recorded: str | None) -> TokenizerIds:
    """Read the tokenizer of a model; refuse another than the one `recorded` in training."""
    ids = read_tokenizer_ids(folder, vocab_size)
    if recorded not in (None, tokenizer_sha256(folder)):
        raise CheckpointError(
            f"tokenizer={folder}: is not the one of the training (its files have another sha256). "
            "Name the tokenizer of the run (--tokenizer)."
        )
    return ids


class _Token(Record):
    content: str


class _AddedToken(_Token):
    id: int


class _Model(Record):
    # Unigram models list (piece, score) pairs, in the order of the ids.
    vocab: dict[str, int] | list[tuple[str, float]]


class _TokenizerFile(Record):
    model: _Model
    added_tokens: list[_AddedToken] | None = None


def _take_content(token: Any) -> Any:
    return token.get("content", token) if isinstance(token, dict) else token


_Special = Annotated[str | None, BeforeValidator(_take_content)]


class _Config(Record):
    added_tokens_decoder: dict[int, _Token] = Field(default_factory=dict)
    bos_token: _Special = None
    eos_token: _Special = None
    pad_token: _Special = None


_R = TypeVar("_R", bound=Record)


def _read(kind: type[_R], path: Path) -> _R:
    try:
        return kind.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise ValueError(f"{path.name}: {explain(error)}") from error


def _read_ids(folder: Path) -> TokenizerIds:
    ids, special = _read_vocabulary(folder)
    if not ids:
        raise CheckpointError(
            f"tokenizer={folder}: holds no vocabulary ({', '.join(VOCABULARY_FILES)}). Save it "
            "with a tokenizer.json, or name another folder."
        )
    if (folder / "added_tokens.json").is_file():
        ids |= read_json(folder / "added_tokens.json")
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            config = _read(_Config, folder / name)
            ids |= {token.content: index for index, token in config.added_tokens_decoder.items()}
            special |= config.model_dump(include=set(special), exclude_unset=True)
    for token, index in ids.items():
        # A bool is an int in Python.
        if type(index) is not int or index < 0:
            raise ValueError(f"token {token!r} has id {index!r}")
    return TokenizerIds(max(ids.values()) + 1, *(ids.get(special[key]) for key in special))


def _read_vocabulary(folder: Path) -> tuple[dict[Any, int], dict[str, str | None]]:
    """Return (token -> id, special token by its key) of the first vocabulary file there is."""
    special: dict[str, str | None] = dict.fromkeys(("bos_token", "eos_token", "pad_token"))
    name = next((name for name in VOCABULARY_FILES if (folder / name).is_file()), None)
    path = folder / str(name)
    ids: dict[Any, int] = {}
    if name == "tokenizer.json":
        content = _read(_TokenizerFile, path)
        vocab = content.model.vocab
        ids = vocab if isinstance(vocab, dict) else {pair[0]: i for i, pair in enumerate(vocab)}
        ids |= {token.content: token.id for token in content.added_tokens or ()}
    elif name == "vocab.json":
        ids = read_json(path)
    elif name == "vocab.txt":
        # Not `splitlines`, which would cut at more than line ends.
        with open(path, encoding="utf-8") as lines:
            ids = {line.rstrip("\n"): index for index, line in enumerate(lines)}
    elif name is not None:
        # Some classes of transformers move the ids of a SentencePiece file or add some. Their
        # `added_tokens_decoder`, read by the caller, gives the largest id and the special ones.
        import sentencepiece

        processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        ids = {processor.id_to_piece(i): i for i in range(processor.get_piece_size())}
        for key in special:
            index = getattr(processor, key.replace("token", "id"))()
            special[key] = processor.id_to_piece(index) if index >= 0 else None
    return ids, special
