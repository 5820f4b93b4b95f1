"""Write a model as a Hugging Face folder, tensor by tensor: complete and verified, or absent.

Three forms: ``pseudo``, which Transformers and vLLM load as any model; ``latent``, with a modelling
file that quantises the weights in its forward; ``plain``, a model without a quantiser.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from megatron_bitcpm.arch.model import Form
from megatron_bitcpm.conversion.hf.model_card import write_model_card
from megatron_bitcpm.conversion.hf.side_files import (
    describe_folding,
    find_tokenizer,
    write_side_files,
)
from megatron_bitcpm.conversion.hf.weight_files import write_weight_files
from megatron_bitcpm.conversion.options import MAX_SHARD_BYTES
from megatron_bitcpm.conversion.output_folder import new_folder
from megatron_bitcpm.conversion.source import ModelSource
from megatron_bitcpm.conversion.verify import verify_written


def write_folder(
    source: ModelSource,
    output: Path,
    form: Form,
    *,
    weights: str = "safetensors",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
    tokenizer: Path | None = None,
) -> dict[str, Any]:
    """Write a model as a Hugging Face folder, and verify it.

    `source` has its quantiser, is folded where that is wanted, and can become `form`; `output` has
    no symbolic links, and its parents are made. `ConvertOptions` has the other settings.

    Raises:
        CheckpointError: bad input; nothing is left behind and an old output is as it was.
    """
    warnings = _warn_of_head_size(source, form)
    tokenizer_folder, ids = find_tokenizer(source, tokenizer, warnings)
    with new_folder(output, overwrite) as scratch:
        start = time.perf_counter()
        files, total_bytes = write_weight_files(scratch, source, form, weights, max_shard_bytes)
        config = write_side_files(scratch, source, form, tokenizer_folder, ids)
        written = time.perf_counter()
        verified = verify_written(scratch, source, output)
        done = time.perf_counter()
        folding = describe_folding(source)
        card = write_model_card(source, form, config, verified, folding)
        (scratch / "README.md").write_text(card, encoding="utf-8")
    return {
        "folder": str(output),
        "files": files,
        "bytes": total_bytes,
        "write_seconds": round(written - start, 3),
        "verify_seconds": round(done - written, 3),
        "verify": verified,
        "folding": folding,
        "warnings": warnings,
    }


def _warn_of_head_size(source: ModelSource, form: Form) -> list[str]:
    model = source.model
    standard = model.head_dim * model.num_attention_heads == model.hidden_size
    if form == "latent" or not model.has_constants or standard:
        return []
    return [
        f"vLLM takes hidden / heads for the head size of a minicpm, this one has {model.head_dim}: "
        "serve it with Transformers, or write it as llama"
    ]
