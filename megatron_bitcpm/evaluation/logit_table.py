"""How far apart two models are where it counts: the probabilities of the next token.

The table of the model cards of BitCPM4 (accuracy on Ascend), with the KL added: for each prompt the
most likely next token of a reference and of another model, and how closely they agree over all.

With t the reference's most likely token, p the reference's probability, q the other's:

    top-1 probability error   |q(t) - p(t)|, and divided by p(t)
    top-10 errors             |q(i) - p(i)| over the reference's ten likeliest tokens i
    KL                        sum of p(i) * ln(p(i) / q(i)) over the whole vocabulary, in nats

Shape legend: N prompts, V vocabulary, K tokens compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from megatron_bitcpm.conversion.difference import markdown_table
from megatron_bitcpm.conversion.megatron.source import MegatronSource
from megatron_bitcpm.conversion.open import open_source
from megatron_bitcpm.conversion.source import ModelSource
from megatron_bitcpm.errors import BitcpmError, CheckpointError
from megatron_bitcpm.evaluation.generate import load_hf_model
from megatron_bitcpm.evaluation.logits import follow_length, megatron_logits, megatron_model
from megatron_bitcpm.evaluation.prompts import tokenize_prompts

Probabilities = npt.NDArray[np.float64]
_DTYPES = ("float32", "auto")


def logit_table(
    a: str | Path,
    b: str | Path,
    prompts: Sequence[str],
    tokenizer: str | Path | None = None,
    dtype: str = "float32",
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Compare the next tokens of `a`, the reference in float32, and `b`, which computes in `dtype`.

    Each is a Hugging Face folder or a Megatron checkpoint; the dtype auto is that of the files,
    Hugging Face only. Returns reference, model, dtype, and both of `compare_probabilities`.
    """
    if dtype not in _DTYPES:
        raise BitcpmError(f"dtype={dtype}: is unknown. Use {' or '.join(_DTYPES)}.")
    sources = [open_source(path, tokenizer) for path in (a, b)]
    if dtype != "float32" and isinstance(sources[1], MegatronSource):
        raise BitcpmError(f"dtype={dtype}: a Megatron model is computed in float32. Leave it out.")
    if sources[0].vocab_size != sources[1].vocab_size:
        raise CheckpointError(
            f"vocab_size={sources[1].vocab_size}: of {b}, that of {a} is {sources[0].vocab_size}. "
            "Compare models of one vocabulary."
        )
    tokens, word = tokenize_prompts(prompts, sources, tokenizer)
    found: dict[int, Probabilities] = {}
    # Preparing Megatron changes torch for the whole process: transformers has to come first.
    for index in sorted((0, 1), key=lambda i: isinstance(sources[i], MegatronSource)):
        kind = "float32" if index == 0 else dtype
        found[index] = _next_token_probabilities(sources[index], tokens, kind, trust_remote_code)
    rows, summary = compare_probabilities(found[0], found[1])
    for prompt, row in zip(prompts, rows, strict=True):
        row["prompt"] = prompt
        for side in ("reference", "model"):
            row[f"{side}_token"] = word(row[f"{side}_id"])
            for entry in row[f"{side}_top"]:
                entry["token"] = word(entry["id"])
    models = {"reference": str(a), "model": str(b), "dtype": dtype}
    return models | {"prompts": rows, "summary": summary}


def compare_probabilities(
    p_NV: Probabilities, q_NV: Probabilities, top: int = 10
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Compare distributions of the reference, p, and the other model, q; rows sum to 1.

    Returns the measures of each prompt, with the K = min(top, V) likeliest tokens of both; and
    those over all, where top5_containment counts the reference's likeliest among the other's five.
    """
    count, n_N = min(top, p_NV.shape[1]), np.arange(len(p_NV))
    p_top_NK, q_top_NK = (np.argsort(-x, axis=1, kind="stable")[:, :count] for x in (p_NV, q_NV))
    best_N, other_N = p_top_NK[:, 0], q_top_NK[:, 0]
    error_N = np.abs(q_NV[n_N, best_N] - p_NV[n_N, best_N])
    columns = {
        "reference_id": best_N,
        "reference_prob": p_NV[n_N, best_N],
        "model_id": other_N,
        "model_prob": q_NV[n_N, other_N],
        "top1_absolute_error": error_N,
        "top1_relative_error": error_N / p_NV[n_N, best_N],
        "top10_overlap": (p_top_NK[:, :, None] == q_top_NK[:, None, :]).sum((1, 2)),
        "in_top5": (q_top_NK[:, :5] == best_N[:, None]).any(1),
        "kl": _kl(p_NV, q_NV),
    }
    values = zip(*(column.tolist() for column in columns.values()), strict=True)
    rows = [dict(zip(columns, row, strict=True)) for row in values]
    for n, row in enumerate(rows):
        row["reference_top"] = _list_top(p_top_NK[n], p_NV[n])
        row["model_top"] = _list_top(q_top_NK[n], q_NV[n])
    errors_NK = np.abs(np.take_along_axis(q_NV - p_NV, p_top_NK, axis=1))
    summary = {
        "prompts": len(rows),
        "top1_match_rate": float(np.mean(best_N == other_N)),
        "top5_containment_rate": float(np.mean(columns["in_top5"])),
        "top10_overlap_rate": float(np.mean(columns["top10_overlap"])) / count,
        **_mean_and_max("top1_relative_error", columns["top1_relative_error"]),
        **_mean_and_max("top1_absolute_error", columns["top1_absolute_error"]),
        "top10_mae": float(errors_NK.mean()),
        "top10_max_error": float(errors_NK.max()),
        "top10_rmse": float(np.sqrt(np.square(errors_NK).mean())),
        **_mean_and_max("kl", columns["kl"]),
        "compared_tokens": count,
    }
    return rows, summary


def _mean_and_max(name: str, values_N: Probabilities) -> dict[str, float]:
    return {f"{name}_mean": float(values_N.mean()), f"{name}_max": float(values_N.max())}


def _kl(p_NV: Probabilities, q_NV: Probabilities) -> Probabilities:
    """KL(p || q) of each row in nats; infinite where q is 0 and p is not."""
    with np.errstate(divide="ignore", invalid="ignore"):
        terms_NV = np.where(p_NV > 0, p_NV * (np.log(p_NV) - np.log(q_NV)), 0.0)
    return np.maximum(terms_NV.sum(1), 0.0)  # rounding can give -1e-17


def _list_top(ids_K: npt.NDArray[np.int64], p_V: Probabilities) -> list[dict[str, Any]]:
    return [{"id": int(i), "prob": float(p_V[i])} for i in ids_K]


def render_logit_table(table: dict[str, Any]) -> str:
    """Return the result of `logit_table` as Markdown: prompts, then the summary."""
    summary = table["summary"]
    count, total = summary["compared_tokens"], summary["prompts"]

    def share(rate: float) -> str:
        return f"{rate:.0%} ({round(rate * total)}/{total})"

    columns = {
        "Prompt": "{prompt}",
        "A top-1 token": "{reference_token!r}",
        "A prob": "{reference_prob:.4f}",
        "B top-1 token": "{model_token!r}",
        "B prob": "{model_prob:.4f}",
        "Top-1 probability error": "{top1_relative_error:.2%}",
        f"Top-{count} overlap": f"{{top10_overlap}}/{count}",
    }
    rows = [[text.format(**row) for text in columns.values()] for row in table["prompts"]]
    worst = max(table["prompts"], key=lambda row: float(row["top1_relative_error"]))
    overlap, prob, top = summary["top10_overlap_rate"], "Top-1 probability", f"Top-{count}"
    measures = {
        "Top-1 token match rate": share(summary["top1_match_rate"]),
        "Top-5 token containment": share(summary["top5_containment_rate"]),
        f"{top} token overlap": f"{overlap:.0%} (mean {overlap * count:.1f}/{count})",
        f"{prob}, mean relative error": f"{summary['top1_relative_error_mean']:.2%}",
        f"{prob}, max relative error": f"{summary['top1_relative_error_max']:.2%} "
        f"(prompt {worst['prompt']!r})",
        f"{prob}, mean absolute error": f"{summary['top1_absolute_error_mean']:.3g}",
        f"{prob}, max absolute error": f"{summary['top1_absolute_error_max']:.3g}",
        f"{top} probabilities, mean absolute error (MAE)": f"{summary['top10_mae']:.3g}",
        f"{top} probabilities, max absolute error": f"{summary['top10_max_error']:.3g}",
        f"{top} probabilities, RMSE": f"{summary['top10_rmse']:.3g}",
        "KL divergence, mean (nats)": f"{summary['kl_mean']:.3g}",
        "KL divergence, max (nats)": f"{summary['kl_max']:.3g}",
    }
    sides = f"A: {table['reference']} (float32)\nB: {table['model']} ({table['dtype']})\n"
    facts = markdown_table(("Measure", "Value"), measures.items())
    return f"{sides}\n{markdown_table(columns, rows)}\n{facts}"


@torch.no_grad()
def _next_token_probabilities(
    source: ModelSource, tokens: list[list[int]], dtype: str, trust_remote_code: bool
) -> Probabilities:
    """Softmax of the last position's logits, [N, V], each prompt computed by itself."""
    rows = []
    if isinstance(source, MegatronSource):
        with megatron_model(source) as model:
            device = next(model.parameters()).device
            for ids in tokens:
                follow_length(model, source, len(ids))
                rows.append(megatron_logits(model, torch.tensor([ids], device=device))[0, -1])
    else:
        kind = torch.float32 if dtype == "float32" else dtype
        model = load_hf_model(source.path, kind, trust_remote_code)
        for ids in tokens:
            rows.append(model(torch.tensor([ids], device=model.device)).logits[0, -1])
    logits_NV = torch.stack([row[: source.vocab_size].double().cpu() for row in rows])
    if not bool(logits_NV.isfinite().all()):
        raise CheckpointError(
            "logits=NaN or infinite: nothing can be compared. Check the models with bitcpm verify."
        )
    return logits_NV.softmax(1).numpy()
