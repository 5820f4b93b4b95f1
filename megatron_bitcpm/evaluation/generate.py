"""Text from a Hugging Face folder, with transformers; nothing is downloaded.

Folders whose architecture transformers does not know come with a modelling file. It is run without
a question only where it is, byte for byte, the one that this package writes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_bitcpm.conversion.hf.config import CONFIG_FILE
from megatron_bitcpm.conversion.hf.modeling.writer import QUANTIZER_KEY, trusted_modeling_files
from megatron_bitcpm.errors import BitcpmError, CheckpointError
from megatron_bitcpm.files import read_json


def generate(
    folder: str | Path,
    prompt: str,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 50,
    seed: int = 0,
    trust_remote_code: bool = False,
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
        trust_remote_code: run modelling code of the folder that is not this package's.
    Returns:
        The continuation, without the prompt.

    Raises:
        BitcpmError: an argument out of range, no transformers, or a folder that does not load.
    """
    if temperature < 0:
        raise BitcpmError(f"temperature={temperature}: is negative. Use 0 for greedy decoding.")
    if max_new_tokens < 1:
        raise BitcpmError(f"max_new_tokens={max_new_tokens}: is no length. Use 64.")
    model = load_hf_model(folder, trust_remote_code=trust_remote_code)
    tokenizer = load_hf_tokenizer(folder)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if not ids:
        # In training an end token stands before every document but the first.
        ids = [tokenizer.eos_token_id]
    room = model.config.max_position_embeddings - len(ids)
    if room < 1:
        raise BitcpmError(
            f"prompt=({len(ids)} tokens): leaves no room in the model's "
            f"{model.config.max_position_embeddings} positions. Shorten it."
        )
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


def load_hf_model(
    folder: str | Path, dtype: torch.dtype | str = "auto", trust_remote_code: bool = False
) -> Any:
    """Load a model folder with transformers, local files only.

    Args:
        folder: Hugging Face model folder.
        dtype: type of the weights; ``auto`` is the one of the files. Latent weights are quantised
            in the type of the files whatever it is, as in training; such a model is for inference.
        trust_remote_code: run modelling code of the folder that is not this package's.

    Raises:
        CheckpointError: transformers is not installed, cannot load the folder, or would have to run
            code that is not trusted.
    """
    from_pretrained = _import_auto_class("AutoModelForCausalLM", folder)
    with torch.device("meta"):
        # Where replaced factories escape this context, transformers leaves its rotary buffers
        # uninitialised and computes nonsense without a word.
        honoured = torch.empty(0).device.type == "meta"
    if not honoured:
        raise CheckpointError(
            f"model={folder}: torch.device contexts have no effect in this process any more. Load "
            "the model in a process of its own."
        )
    runs_code = _needs_code(folder)
    if runs_code and not trust_remote_code and not trusted_modeling_files(folder):
        raise CheckpointError(
            f"model={folder}: its modelling code is not the one that this package writes, and "
            "loading would run it. Read it, then add --trust-remote-code."
        )
    config = read_json(Path(folder) / CONFIG_FILE) if runs_code else {}
    if QUANTIZER_KEY not in config or dtype == "auto":
        return _load(from_pretrained, folder, dtype=dtype, trust_remote_code=runs_code).eval()
    model = _load(from_pretrained, folder, dtype="auto", trust_remote_code=True)
    return _quantize_for_good(model).to(dtype).eval()


class _AsItIs:
    """In place of a quantiser: the weight holds the values of the forward already.

    Attributes:
        slices: parts of a token that are rounded by themselves, see the modelling file.
    """

    def __init__(self, slices: int) -> None:
        self.slices = slices

    def __call__(self, w_OI: torch.Tensor) -> torch.Tensor:
        return w_OI


@torch.no_grad()
def _quantize_for_good(model: Any) -> Any:
    """Replace latent weights by their values on the grid, rounded to the type of the latents."""
    for module in model.modules():
        if type(module).__name__ == "LinearQuantizer":
            module.weight.data = module.quantized_weight()
            module.quantizer = _AsItIs(module.quantizer.slices)
    return model


def load_hf_tokenizer(folder: str | Path) -> Any:
    """Load the tokenizer of a model folder; raises as `load_hf_model`."""
    # Transformers asks for the model's code too, which it needs to read config.json.
    trusted = _needs_code(folder) and trusted_modeling_files(folder)
    from_pretrained = _import_auto_class("AutoTokenizer", folder)
    return _load(from_pretrained, folder, trust_remote_code=trusted)


def _needs_code(folder: str | Path) -> bool:
    """Whether config.json names a class in a file of the folder for the model."""
    path = Path(folder) / CONFIG_FILE
    names = read_json(path).get("auto_map") if path.is_file() else None
    return isinstance(names, dict) and "AutoModelForCausalLM" in names


def _import_auto_class(name: str, folder: str | Path) -> Any:
    if not Path(folder).is_dir():
        raise CheckpointError(
            f"model={folder}: no such folder. Name a folder written by bitcpm export hf."
        )
    try:
        import transformers
    except ImportError as error:
        raise CheckpointError(
            f"model={folder}: needs transformers, which is not installed. Install "
            "megatron-bitcpm[hf]."
        ) from error
    # Its bar for loading weights would stand between prompt and text.
    transformers.utils.logging.disable_progress_bar()
    return getattr(transformers, name).from_pretrained


def _load(from_pretrained: Any, folder: str | Path, **options: Any) -> Any:
    try:
        return from_pretrained(str(folder), local_files_only=True, **options)
    except Exception as error:  # transformers raises many kinds, from OSError to TypeError
        reason = " ".join(str(error).split())[:300].rstrip(".")
        raise CheckpointError(
            f"model={folder}: transformers cannot load it ({type(error).__name__}: {reason}). "
            "Check it with bitcpm verify."
        ) from error
