"""The README.md of a written folder: what it is, how it loads, what is known about it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_bitcpm.arch.model import Form, iter_places
from megatron_bitcpm.conversion.source import ModelSource
from megatron_bitcpm.quant.grids import find_grid
from megatron_bitcpm.quant.settings import BF16_RECIPROCAL
from megatron_bitcpm.quantizer import Quantizer
from megatron_bitcpm.version import __version__

_HEAD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [{tags}]
---
# {title}
"""
_FACTS = """\
## Facts

| | |
|---|---|"""
_PRETRAINED = """
This is a pretrained model: it continues text and was not tuned to follow \
instructions, unless its training data did that."""
_LICENCE = """
## Licence

To be stated by whoever publishes the model; the licence of the training data matters.
"""
_PSEUDO = """\
A {bits} language model, pseudo-quantised: every weight of the {tensors} projection
matrices is one of {levels}, where s is the scale of {groups}. The values are
stored in {dtype}, so the folder is as large as a full-precision one and loads as {loads}.
Embeddings, norms and the output layer are in full precision.{excluded}

Exported by megatron_bitcpm {version} and compared with its source: no code differs.
Check again with `bitcpm verify FOLDER [CHECKPOINT]`. `bitcpm_quantizer.json` records the quantiser.
"""
_LATENT = """\
The latent weights ({dtype}) of a {bits} language model, for fine-tuning: `modeling_bitcpm.py`
quantises the {tensors} projection matrices in each forward, to {levels}, where s is the scale of
{groups}, and passes gradients straight through. Without that file these
weights are not the model: do not serve the folder, convert it first.{excluded}

Written by megatron_bitcpm {version} and compared with its source. `bitcpm_quantizer` in
`config.json` records the quantiser.
"""
_ACTIVATION = """\
In training each token was rounded to 8 bits in front of these matrices. {then}
"""
_NO_ACTIVATION = (
    "The format of this\nfolder has no such step: whoever loads it multiplies with activations in "
    "full precision."
)
_NUMERICS = """\
Codes and scales follow the arithmetic of the weights' type with a reciprocal (`bf16_reciprocal`),
not the default float32 arithmetic: converting it with the other one changes codes.
"""
_FULL_PRECISION = """\
A language model in full precision ({dtype}), {loads}, written by megatron_bitcpm {version}.
"""
_FOLDED = """\
## Folded

This Llama is a MiniCPM whose constants were multiplied into the weights: the embedding by
{scale_emb:g}, `o_proj` and `down_proj` by {residual:.9g}
(scale_depth {scale_depth:g} / sqrt(layers)), `lm_head` by {output:.9g}
(dim_model_base {dim_model_base} / hidden size).
Codes are those of the MiniCPM; scales, embedding and output layer were rounded
once{rounding}. It cannot be undone.
"""
_USE = """\
## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER"{trust})
model = AutoModelForCausalLM.from_pretrained("FOLDER", dtype="auto"{trust})
inputs = tokenizer("Once upon a time", return_tensors="pt", return_token_type_ids=False)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```

{serve}
"""
_SERVE_LLAMA = "`vllm serve FOLDER` serves it; no plug-in and no remote code is needed."
_SERVE_MINICPM = """\
`vllm serve FOLDER --trust-remote-code` serves it: vLLM has the architecture, Transformers takes it
from `modeling_bitcpm.py`."""
_FINE_TUNE = """\
## Fine-tune

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("FOLDER", dtype="auto", trust_remote_code=True)
```

Train it like any model, with the Trainer of Transformers or any framework that loads remote code.
The quantiser is part of the forward pass; nothing else has to be changed. `save_pretrained` keeps
the quantiser and the modelling file.

## Convert afterwards

    bitcpm convert --input FINE-TUNED --output SERVED

writes the folder that serves the fine-tuned model, with the codes that its forward used. A weight
file alone is converted by

    python tools/qat-convert.py --input_bin FINE-TUNED/model.safetensors \\
        --output SERVED.safetensors --quant_type {quant_type} --group_size {group_size}{numerics}
"""


def write_model_card(
    source: ModelSource,
    form: Form,
    config: Mapping[str, Any],
    report: Mapping[str, Any],
    folding: Mapping[str, Any] | None = None,
) -> str:
    """Return the text of README.md.

    `source` is the model as written, `config` its config.json, `report` that of the verification
    and `folding` that of `describe_folding`.
    """
    quantizer = source.quantizer if form != "plain" else None
    tags = [source.model.architecture, "megatron-bitcpm"]
    title = source.model.family.title
    if quantizer is not None:
        ternary = quantizer.grid.is_ternary
        tags += ["ternary", "1.58-bit"] if ternary else [quantizer.grid.name]
        title = f"{'Ternary' if ternary else 'Quantised'} {title}"
    title += ", latent weights" if form == "latent" else ""
    parts = [_HEAD.format(tags=", ".join(tags), title=title)]
    parts.append(_describe(source, form, config, report, quantizer))
    rounded = quantizer is not None and quantizer.config.activation != "none"
    if rounded:
        then = "So does `modeling_bitcpm.py`." if form == "latent" else _NO_ACTIVATION
        parts.append(_ACTIVATION.format(then=then))
    if quantizer is not None and quantizer.numerics == BF16_RECIPROCAL:
        parts.append(_NUMERICS)
    if folding is not None:
        largest = folding.get("largest_relative_rounding")
        rounding = "" if largest is None else f", by {largest:.2e} of a value at most"
        parts.append(_FOLDED.format(**dict(folding) | {"rounding": rounding}))
    parts += [_describe_use(source, form, quantizer), _FACTS]
    rows = _list_facts(config, source.facts, report, rounded and form == "pseudo")
    parts += [f"| {name} | {value} |" for name, value in rows]
    if source.kind != "hf":
        parts.append(_PRETRAINED)
    return "\n".join([*parts, _LICENCE])


def _describe(
    source: ModelSource,
    form: Form,
    config: Mapping[str, Any],
    report: Mapping[str, Any],
    quantizer: Quantizer | None,
) -> str:
    model = source.model
    loads = f"a {model.family.title}" if model.has_constants else f"a plain {model.family.title}"
    if quantizer is None:
        return _FULL_PRECISION.format(dtype=config["torch_dtype"], loads=loads, version=__version__)
    projections = sum(place.spec.role == "projection" for place in iter_places(source.model))
    left_out = projections - report["ternary_tensors"]
    grid, sizes = quantizer.grid, ", ".join(map(str, report["group_sizes"]))
    groups = (
        "the whole matrix" if quantizer.per_projection else f"its group of inputs ({sizes} inputs)"
    )
    return (_LATENT if form == "latent" else _PSEUDO).format(
        bits="ternary (1.58-bit)" if grid.is_ternary else f"quantised ({grid.name})",
        tensors=report["ternary_tensors"],
        levels=_list_levels(quantizer),
        groups=groups,
        dtype=config["torch_dtype"],
        loads=loads,
        excluded=f" {left_out} projections were kept in full precision too." if left_out else "",
        version=__version__,
    )


def _list_levels(quantizer: Quantizer) -> str:
    def word(level: float) -> str:
        factor = "" if abs(level) == 1 else f"{abs(level):g} "
        return "0" if level == 0 else f"{'-' if level < 0 else ''}{factor}s"

    return ", ".join(word(level) for level in quantizer.grid.levels)


def _describe_use(source: ModelSource, form: Form, quantizer: Quantizer | None) -> str:
    if form == "latent":
        assert quantizer is not None
        other = quantizer.numerics == BF16_RECIPROCAL
        return _FINE_TUNE.format(
            quant_type=quantizer.grid.name,
            group_size=quantizer.config.group_size,
            numerics=f" --numerics {quantizer.numerics}" if other else "",
        )
    minicpm = source.model.has_constants
    return _USE.format(
        trust=", trust_remote_code=True" if minicpm else "",
        serve=_SERVE_MINICPM if minicpm else _SERVE_LLAMA,
    )


def _list_facts(
    config: Mapping[str, Any], facts: Mapping[str, Any], report: Mapping[str, Any], rounded: bool
) -> list[tuple[str, str]]:
    sizes = {
        "layers, hidden, feed-forward": ("num_hidden_layers", "hidden_size", "intermediate_size"),
        "heads, key/value heads, head size": (
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
        ),
        "vocabulary, longest sequence": ("vocab_size", "max_position_embeddings"),
    }
    rows = [(name, ", ".join(str(config[key]) for key in keys)) for name, keys in sizes.items()]
    if facts.get("iteration") is not None:
        rows.append(("optimizer steps", f"{facts['iteration']:,}"))
    if facts.get("tokens") is not None:
        length = facts.get("seq_length")
        sequences = "" if length is None else f", in sequences of {length:,}"
        rows.append(("tokens trained on", f"{facts['tokens']:,}{sequences}"))
    # Measured on the trained model: the folder without that rounding is another one.
    loss_name = f"validation loss{' (with 8-bit activations, as trained)' if rounded else ''}"
    loss = facts.get("valid_loss")
    rows.append((loss_name, "not measured" if loss is None else f"{loss:.4f} nats per token"))
    if report["ternary_tensors"]:
        ternary = find_grid(report["grid"]).is_ternary
        grid_name = "ternary" if ternary else "quantised"
        rows += [
            (f"{grid_name} weights", f"{report['weights']:,} in {report['groups']:,} groups"),
            ("other parameters", f"{report['other_parameters']:,}"),
            (f"zeros among {grid_name} weights", f"{report['zero_fraction']:.2%}"),
            ("entropy of the codes", f"{report['entropy_bits_per_weight']:.4f} bits per weight"),
            (
                "packed in 2 bits with float32 scales" if ternary else "packed with float32 scales",
                f"{report['packed_bits_per_weight']:.4f} bits per weight",
            ),
        ]
    return rows
