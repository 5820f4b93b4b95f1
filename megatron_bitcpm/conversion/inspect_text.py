"""The report of `inspect` as text for people."""

from __future__ import annotations

from typing import Any

_KINDS = {
    "hf": "Hugging Face folder",
    "torch_dist": "Megatron checkpoint (torch_dist)",
    "legacy": "Megatron checkpoint (legacy mp_rank_* shards)",
    "file": "file of tensors",
}
_ARCHITECTURE = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "tie_word_embeddings",
    "torch_dtype",
)
_STAMP_LINE = ("grid", "group_size", "scale_sync", "numerics", "tensor_model_parallel_size")


def render(report: dict[str, Any]) -> str:
    """Return the text of a report of `inspect`."""
    lines = [report["path"], f"  {_KINDS[report['kind']]}, {_say_form(report)}"]
    lines += _render_architecture(report)
    lines += _render_quantizer(report)
    lines += _render_memory(report)
    if report["facts"]:
        facts = ", ".join(f"{key} {value}" for key, value in report["facts"].items())
        lines += ["training", f"  {facts}"]
    if report["problems"]:
        lines += ["problems", *(f"  {problem}" for problem in report["problems"])]
    return "\n".join(lines) + "\n"


def _say_form(report: dict[str, Any]) -> str:
    """Say what the model is: by its stamp, and without one by its values."""
    form, grids = report["form"], report["grids"]
    if form == "latent":
        return "latents of a quantised model (its forward quantises them)"
    if form == "pseudo":
        return "pseudo-quantised, with a stamp"
    if grids and not report["latents"]:
        return f"no stamp, but every projection is on the {' or '.join(grids)} grid"
    if grids:
        return f"no stamp; some projections are on the {' or '.join(grids)} grid"
    return "no stamp, no projection on a grid: full precision, or latents"


def _render_architecture(report: dict[str, Any]) -> list[str]:
    found = report["architecture"]
    lines = [f"architecture, by its tensors ({report['parameters']:,} parameters)"]
    for key in _ARCHITECTURE:
        if found.get(key) is not None:
            lines.append(f"  {key:<20} {found[key]}")
    if "head_dim_from" in found:
        lines.append(f"  head_dim follows from: {found['head_dim_from']}")
    if report["contradictions"]:
        lines.append("config.json contradicts the tensors")
        for item in report["contradictions"]:
            lines.append(
                f"  {item['field']:<20} {item['config']}, in the tensors {item['weights']}"
            )
        if report["fixed"]:
            lines.append(f"  corrected; the old one is {report['fixed']}")
        elif report["unfixable"]:
            lines.append(f"  --fix-config cannot correct it: {report['unfixable']}")
        else:
            lines.append("  --fix-config corrects it")
    return lines


def _render_quantizer(report: dict[str, Any]) -> list[str]:
    lines = ["quantiser"]
    stamp = report["stamp"]
    if stamp:
        said = ", ".join(f"{key} {stamp[key]}" for key in _STAMP_LINE if key in stamp)
        lines.append(f"  stamp: {said}")
    else:
        lines.append("  no stamp")
    if report["folding"]:
        said = ", ".join(f"{key} {value:.7g}" for key, value in report["folding"].items())
        lines.append(f"  folded MiniCPM: {said}")
    for name, sizes in report["projections"].items():
        found = ", ".join(f"group size {size} ({count} layers)" for size, count in sizes.items())
        lines.append(f"  {name:<20} {found}")
    for grid, values in report["grids"].items():
        lines.append(
            f"  {grid}: {values['tensors']} tensors, {values['groups']:,} groups, "
            f"{100 * values['zero_fraction']:.2f} % zeros, "
            f"{values['entropy_bits_per_weight']:.4f} bits of entropy, "
            f"{values['packed_bits_per_weight']:.4f} bits per weight packed"
        )
    latents = report["latents"]
    if latents:
        lines.append(
            f"  {latents['tensors']} projections are not on a grid, first {latents['first']}"
        )
        lines.append(f"  {latents['description']}")
    return lines


def _render_memory(report: dict[str, Any]) -> list[str]:
    lines = [f"memory {'':<14}{'parameters':>16}{'stored MB':>12}{'packed MB':>12}"]
    parts = dict(report["memory"])
    keys = ("parameters", "stored_bytes", "packed_bytes")
    parts["all"] = {key: sum(values[key] for values in parts.values()) for key in keys}
    for name, values in parts.items():
        lines.append(
            f"  {name:<19}{values['parameters']:>16,}{values['stored_bytes'] / 1e6:>12.1f}"
            f"{values['packed_bytes'] / 1e6:>12.1f}"
        )
    total = sum(report["dtypes"].values()) or 1
    shares = ", ".join(
        f"{name} {100 * size / total:.1f} %" for name, size in report["dtypes"].items()
    )
    return [*lines, f"  types by bytes: {shares}"]
