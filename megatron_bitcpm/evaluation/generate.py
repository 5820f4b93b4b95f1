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
from megatron_bitcpm.errors import BitcpmError, CheckpointError, one_line
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
    """Return the continuation of a prompt; an empty prompt starts a new document.

    It may end early, with the end token or at the model's longest sequence. A temperature of 0
    takes the most likely token each time, above 0 samples among the `top_k` likeliest, 0 for all.
    """
    if temperature < 0:
        raise BitcpmError(f"temperature={temperature}: is negative. Use 0 for greedy decoding.")
    if max_new_tokens < 1:
        raise BitcpmError(f"max_new_tokens={max_new_tokens}: must be at least 1. Use 64.")
    if top_k < 0:
        raise BitcpmError(f"top_k={top_k}: is negative. Use 0 to sample among all tokens.")
    model = load_hf_model(folder, trust_remote_code=trust_remote_code)
    tokenizer = load_hf_tokenizer(folder)
    # In training an end token stands before every document but the first.
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"] or [tokenizer.eos_token_id]
    positions = model.config.max_position_embeddings
    if len(ids) >= positions:
        raise BitcpmError(
            f"prompt=({len(ids)} tokens): leaves no room in the model's {positions} positions. "
            "Shorten it."
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
            max_new_tokens=min(max_new_tokens, positions - len(ids)),
            **sampling,
        )
    text: str = tokenizer.decode(
        output[0, len(ids) :].tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return text


def load_hf_model(
    folder: str | Path, dtype: torch.dtype | str = "auto", trust_remote_code: bool = False
) -> Any:
    """Load a model folder with transformers, local files only; for inference.

    The weights get `dtype`; ``auto`` is that of the files, in which latent weights are quantised
    whatever it is, as in training. With `trust_remote_code` modelling code of the folder runs that
    is not this package's.
    """
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
    quantizes = QUANTIZER_KEY in config and dtype != "auto"
    kind = "auto" if quantizes else dtype
    model = _load("AutoModelForCausalLM", folder, dtype=kind, trust_remote_code=runs_code)
    if quantizes:
        _quantize_for_good(model)
        model = model.to(dtype)
    return model.eval()


class _AsItIs:
    """In place of a quantiser: the weight holds the values of the forward already."""

    def __init__(self, slices: int) -> None:
        self.slices = slices  # parts of a token that are rounded by themselves

    def __call__(self, w_OI: torch.Tensor) -> torch.Tensor:
        return w_OI


@torch.no_grad()
def _quantize_for_good(model: Any) -> None:
    """Replace latent weights by their values on the grid, rounded to the type of the latents."""
    for module in model.modules():
        if type(module).__name__ == "LinearQuantizer":
            module.weight.data = module.quantized_weight()
            module.quantizer = _AsItIs(module.quantizer.slices)


def load_hf_tokenizer(folder: str | Path) -> Any:
    """Load the tokenizer of a model folder with transformers, local files only."""
    # Transformers asks for the model's code too, which it needs to read config.json.
    trusted = _needs_code(folder) and trusted_modeling_files(folder)
    return _load("AutoTokenizer", folder, trust_remote_code=trusted)


def _needs_code(folder: str | Path) -> bool:
    """Whether config.json names a class in a file of the folder for the model."""
    path = Path(folder) / CONFIG_FILE
    names = read_json(path).get("auto_map") if path.is_file() else None
    return isinstance(names, dict) and "AutoModelForCausalLM" in names


def _load(auto_class: str, folder: str | Path, **options: Any) -> Any:
    if not Path(folder).is_dir():
        raise CheckpointError(
            f"model={folder}: no such folder. Name a folder written by bitcpm convert."
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
    from_pretrained = getattr(transformers, auto_class).from_pretrained
    try:
        return from_pretrained(str(folder), local_files_only=True, **options)
    except Exception as error:  # transformers raises many kinds, from OSError to TypeError
        raise CheckpointError(
            f"model={folder}: transformers cannot load it ({type(error).__name__}: "
            f"{one_line(error, 300)}). Check it with bitcpm verify."
        ) from error
