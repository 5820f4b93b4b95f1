"""Text from an exported folder, with transformers; nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_bitcpm.errors import BitcpmError, CheckpointError


def generate(
    folder: str | Path,
    prompt: str,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 50,
    seed: int = 0,
) -> str:
    """Continue a prompt.

    Args:
        folder: Hugging Face model folder with its tokenizer.
        prompt: text; an empty one starts a new document.
        max_new_tokens: longest continuation, in tokens; the end token ends it earlier, and so does
            the model's longest sequence.
        temperature: 0 takes the most likely token each time; above 0 samples.
        top_k: sample among this many most likely tokens; 0 among all.
        seed: of the sampling.
    Returns:
        The continuation, without the prompt.

    Raises:
        BitcpmError: an argument out of range, no transformers, or a folder that does not load.
    """
    if temperature < 0:
        raise BitcpmError.of("temperature", temperature, "is negative", "Use 0 for greedy decoding")
    if max_new_tokens < 1:
        raise BitcpmError.of("max_new_tokens", max_new_tokens, "is no length", "Use 64")
    model, tokenizer = load_hf_model(folder), load_hf_tokenizer(folder)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if not ids:
        # In training an end token stands before every document but the first.
        ids = [tokenizer.eos_token_id]
    room = model.config.max_position_embeddings - len(ids)
    if room < 1:
        raise BitcpmError.of(
            "prompt", f"({len(ids)} tokens)",
            f"leaves no room in the model's {model.config.max_position_embeddings} positions",
            "Shorten it",
        )  # fmt: skip
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": top_k}
    torch.manual_seed(seed)
    input_ids = torch.tensor([ids], device=model.device)
    with torch.no_grad():
        output = model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=min(max_new_tokens, room),
            **sampling,
        )
    new_ids = output[0, len(ids) :].tolist()
    text: str = tokenizer.decode(
        new_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return text


def load_hf_model(folder: str | Path, dtype: torch.dtype | str = "auto") -> Any:
    """Load a model folder with transformers, local files only, no remote code.

    Args:
        folder: Hugging Face model folder.
        dtype: type of the weights; ``auto`` is the one of the files.

    Raises:
        CheckpointError: transformers is not installed, or cannot load the folder.
    """
    from_pretrained = _import_auto_class("AutoModelForCausalLM", folder)
    with torch.device("meta"):
        # Where replaced factories escape this context, transformers leaves its rotary buffers
        # uninitialised and computes nonsense without a word.
        honoured = torch.empty(0).device.type == "meta"
    if not honoured:
        raise CheckpointError.of(
            "model", folder, "torch.device contexts have no effect in this process any more",
            "Load the model in a process of its own",
        )  # fmt: skip
    return _load(from_pretrained, folder, dtype=dtype).eval()


def load_hf_tokenizer(folder: str | Path) -> Any:
    """Load the tokenizer of a model folder; raises as `load_hf_model`."""
    return _load(_import_auto_class("AutoTokenizer", folder), folder)


def _import_auto_class(name: str, folder: str | Path) -> Any:
    if not Path(folder).is_dir():
        raise CheckpointError.of(
            "model", folder, "no such folder", "Name a folder written by bitcpm export hf"
        )
    try:
        import transformers
    except ImportError as error:
        raise CheckpointError.of(
            "model", folder, "needs transformers, which is not installed",
            "Install megatron-bitcpm[hf]",
        ) from error  # fmt: skip
    # Its bar for loading weights would stand between prompt and text.
    transformers.utils.logging.disable_progress_bar()
    return getattr(transformers, name).from_pretrained


def _load(from_pretrained: Any, folder: str | Path, **options: Any) -> Any:
    try:
        return from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False, **options
        )
    except Exception as error:  # transformers raises many kinds, from OSError to TypeError
        reason = " ".join(str(error).split())[:300].rstrip(".")
        raise CheckpointError.of(
            "model", folder, f"transformers cannot load it ({type(error).__name__}: {reason})",
            "Check it with bitcpm verify",
        ) from error  # fmt: skip
