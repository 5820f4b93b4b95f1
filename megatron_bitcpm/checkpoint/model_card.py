"""The README.md of an exported folder: what it is, how it loads, what is known about it."""

from __future__ import annotations

from typing import Any

from megatron_bitcpm.config import QuantConfig
from megatron_bitcpm.version import __version__

_TERNARY = """\
A ternary (1.58-bit) language model, pseudo-quantised: every weight of the {tensors} projection
matrices is one of -s, 0, s, where s is the scale of {groups}. The values are
stored in {dtype}, so the folder is as large as a full-precision one and loads as a plain Llama.
Embeddings, norms and the output layer are in full precision.{excluded}

Exported by megatron_bitcpm {version} and compared with its training checkpoint: no code differs.
Check again with `bitcpm verify FOLDER [CHECKPOINT]`. `bitcpm_quantizer.json` records the quantiser.
"""
_ACTIVATION = """
In training each token was rounded to 8 bits in front of these matrices. The format of this
folder has no such step: whoever loads it multiplies with activations in full precision.
"""
_FULL_PRECISION = """\
A language model in full precision ({dtype}), a plain Llama, exported by megatron_bitcpm {version}.
"""
_USE = """\
## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = AutoModelForCausalLM.from_pretrained("FOLDER", dtype="auto")
inputs = tokenizer("Once upon a time", return_tensors="pt", return_token_type_ids=False)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```

`vllm serve FOLDER` serves it; no plug-in and no remote code is needed.
"""


def write_model_card(
    config: dict[str, Any],
    facts: dict[str, Any],
    report: dict[str, Any] | None,
    quant: QuantConfig | None,
) -> str:
    """Return the text of README.md.

    Args:
        config: content of config.json.
        facts: of the training: iteration, tokens, valid_loss, seq_length.
        report: of `verify`; None for a full-precision model.
        quant: the quantiser of a ternary model.
    """
    dtype = config["torch_dtype"]
    tags = ["llama", "megatron-bitcpm", *(["ternary", "1.58-bit"] if report else [])]
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        f"tags: [{', '.join(tags)}]",
        "---",
        "# Ternary Llama" if report else "# Llama",
        "",
    ]
    if report and quant:
        expected = 7 * config["num_hidden_layers"]
        left_out = expected - report["ternary_tensors"]
        lines.append(
            _TERNARY.format(
                tensors=report["ternary_tensors"],
                groups=_describe_groups(report["group_sizes"], quant),
                dtype=dtype,
                excluded=f" {left_out} projections were kept in full precision too."
                if left_out
                else "",
                version=__version__,
            )
        )
        if quant.activation != "none":
            lines.append(_ACTIVATION)
    else:
        lines.append(_FULL_PRECISION.format(dtype=dtype, version=__version__))
    lines += [_USE, "## Facts", "", "| | |", "|---|---|"]
    rounded = bool(report and quant and quant.activation != "none")
    facts_rows = _list_facts(config, facts, report, rounded)
    lines += [f"| {name} | {value} |" for name, value in facts_rows]
    lines += [
        "",
        "This is a pretrained model: it continues text and was not tuned to follow instructions.",
        "",
        "## Licence",
        "",
        "To be stated by whoever publishes the model; the licence of the training data matters.",
    ]
    return "\n".join(lines) + "\n"


def _describe_groups(sizes: list[int], quant: QuantConfig) -> str:
    if quant.group_size == "tensor":
        return "the whole matrix"
    return f"its group of inputs ({', '.join(map(str, sizes))} inputs)"


def _list_facts(
    config: dict[str, Any], facts: dict[str, Any], report: dict[str, Any] | None, rounded: bool
) -> list[tuple[str, str]]:
    loss = facts["valid_loss"]
    # Measured on the trained model: the folder without that rounding is another one.
    loss_name = f"validation loss{' (with 8-bit activations, as trained)' if rounded else ''}"
    rows = [
        ("layers, hidden, feed-forward", "{num_hidden_layers}, {hidden_size}, {intermediate_size}"),
        ("heads, key/value heads, head size", "{num_attention_heads}, {num_key_value_heads}, "
         "{head_dim}"),
        ("vocabulary, longest sequence", "{vocab_size}, {max_position_embeddings}"),
    ]  # fmt: skip
    rows = [(name, text.format(**config)) for name, text in rows]
    rows += [
        ("optimizer steps", f"{facts['iteration']:,}"),
        ("tokens trained on", f"{facts['tokens']:,}, in sequences of {facts['seq_length']:,}"),
        (loss_name, "not measured" if loss is None else f"{loss:.4f} nats per token"),
    ]
    if report:
        rows += [
            ("ternary weights", f"{report['weights']:,} in {report['groups']:,} groups"),
            ("other parameters", f"{report['other_parameters']:,}"),
            ("zeros among ternary weights", f"{report['zero_fraction']:.2%}"),
            ("entropy of the codes", f"{report['entropy_bits_per_weight']:.4f} bits per weight"),
            (
                "packed in 2 bits with float32 scales",
                f"{report['packed_bits_per_weight']:.4f} bits per weight",
            ),
        ]
    return rows
