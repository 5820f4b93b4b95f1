"""The sets that a configuration names: their checks before training, and their fingerprints."""

from __future__ import annotations

from megatron_bitcpm.config import DataConfig
from megatron_bitcpm.data.blend import blend_shares
from megatron_bitcpm.data.index_cache import fail_on_all_ranks
from megatron_bitcpm.data.indexed import (
    IndexedFiles,
    check_documents_end,
    check_indexed_files,
    check_token_range,
    manifest_path,
    read_manifest,
)
from megatron_bitcpm.data.tokenizer import TextTokenizer
from megatron_bitcpm.errors import DataError


def check_train_sets(data: DataConfig, tokenizer: TextTokenizer) -> dict[str, IndexedFiles]:
    """Check ``<prefix>_train`` of every training set: key of the prefix -> its index."""
    checked: dict[str, IndexedFiles] = {}
    seen: dict[str, str] = {}
    for key, prefix in _train_keys(data):
        files = _check_split(data, key, prefix, "train", tokenizer)
        first = seen.setdefault(files.fingerprint, key)
        if first != key:
            # Both would give the same samples at nearly the same time.
            raise DataError(
                f"{key}={prefix}: holds the same data as {first}. Use one entry, add the weights."
            )
        checked[key] = files
    return checked


def check_valid_sets(
    data: DataConfig, num_samples: int, tokenizer: TextTokenizer
) -> dict[str, IndexedFiles]:
    """Check ``<prefix>_valid`` of every set, `num_samples` windows each: name -> index."""
    checked = {}
    for name, (key, prefix) in _valid_keys(data).items():
        files = _check_split(data, key, prefix, "valid", tokenizer)
        windows = (files.num_tokens - 1) // data.seq_length
        if windows < num_samples:
            raise DataError(
                f"{key}={prefix}: the valid split has {windows} windows of {data.seq_length} "
                f"tokens, {num_samples} are needed (training.eval_iters x global_batch_size). "
                "Lower training.eval_iters, or prepare more text or a larger valid_fraction."
            )
        checked[name] = files
    return checked


def data_fingerprints(data: DataConfig, tokenizer: TextTokenizer) -> dict[str, str]:
    """Return what the samples of a run are made of, to compare when it is resumed.

    Files count by their contents (see `IndexedFiles.fingerprint`), not by their place.
    ``tokenizer_sha256`` and ``train_data`` (weights and files, in order) must stay what they are
    for a run to continue with the samples it would have had. ``valid_data.<name>``, one for each
    validation set, may change: only the losses reported for that name do with it.
    """
    with fail_on_all_ranks():
        shares = blend_shares([entry.weight for entry in data.train_sets])
        train = [
            f"{share}:{check_indexed_files(f'{prefix}_train', key).fingerprint}"
            for share, (key, prefix) in zip(shares, _train_keys(data), strict=True)
        ]
        valid = {
            f"valid_data.{name}": check_indexed_files(f"{prefix}_valid", key).fingerprint
            for name, (key, prefix) in _valid_keys(data).items()
        }
    return {"tokenizer_sha256": tokenizer.sha256, "train_data": " ".join(train), **valid}


def _check_split(
    data: DataConfig, key: str, prefix: str, split: str, tokenizer: TextTokenizer
) -> IndexedFiles:
    """Check one split and its manifest, which data of Megatron's own tools does not have."""
    manifest = read_manifest(prefix, key)
    if manifest is not None and manifest.tokenizer_sha256 != tokenizer.sha256:
        raise DataError(
            f"{key}={prefix}: was prepared with a tokenizer of sha256 "
            f"{manifest.tokenizer_sha256[:12]}... ({manifest_path(prefix).name}), "
            f"{tokenizer.folder} has {tokenizer.sha256[:12]}.... Set data.tokenizer to that one, "
            "or run prepare again."
        )
    files = check_indexed_files(f"{prefix}_{split}", key)
    counted = getattr(manifest.splits, split).tokens if manifest else files.num_tokens
    if files.num_tokens != counted:
        raise DataError(
            f"{key}={files.prefix}.idx: {files.num_tokens} tokens, the manifest says {counted}. "
            "Run prepare again, or copy all five files from one run."
        )
    if files.num_tokens < data.seq_length + 1:
        raise DataError(
            f"{key}={files.prefix}: {files.num_tokens} tokens, one sample of data.seq_length "
            f"{data.seq_length} needs {data.seq_length + 1}. Prepare more text, raise "
            "valid_fraction, or lower data.seq_length."
        )
    check_token_range(files, tokenizer.vocab_size, key)
    if data.reset_attention_mask or data.reset_position_ids or data.eod_mask_loss:
        check_documents_end(files, tokenizer.eod, key)
    return files


def _train_keys(data: DataConfig) -> list[tuple[str, str]]:
    """(configuration key, prefix) of each training set."""
    if not data.blend:
        return [("data.prefix", str(data.prefix))]
    return [(f"data.blend.{i}.prefix", entry.prefix) for i, entry in enumerate(data.blend)]


def _valid_keys(data: DataConfig) -> dict[str, tuple[str, str]]:
    """Name of each validation set -> (configuration key, prefix)."""
    if data.valid:
        return {name: (f"data.valid.{name}", prefix) for name, prefix in data.valid.items()}
    return dict(zip(data.valid_sets, _train_keys(data), strict=True))
