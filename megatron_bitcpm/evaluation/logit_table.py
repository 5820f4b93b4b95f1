"""How far apart two models are where it counts: the probabilities of the next token.

The table of the vLLM-Ascend model cards: for each prompt the most likely next token of a reference
and of another model, and over all prompts how often and how closely they agree. The reference
computes in float32; the other model in float32 or in the type of its files.

With t the reference's most likely token, p the reference's probability, q the other's:

    top-1 probability error   |q(t) - p(t)|, and divided by p(t)
    top-10 errors             |q(i) - p(i)| over the reference's ten likeliest tokens i
    KL                        sum of p(i) * ln(p(i) / q(i)) over the whole vocabulary, in nats

Source: the model cards of BitCPM4 (accuracy on Ascend); the KL is added here.

Shape legend: N prompts, V vocabulary, K tokens compared.
"""

from __future__ import annotations

import json
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
from megatron_bitcpm.data.tokenizer_ids import VOCABULARY_FILES
from megatron_bitcpm.errors import BitcpmError, CheckpointError

Probabilities = npt.NDArray[np.float64]
_DTYPES = ("float32", "auto")


def read_prompts(path: str | Path, key: str = "prompt") -> list[str]:
    """Read prompts: of a ``.jsonl`` file one value of each object, of another file its lines.

    Args:
        path: the file, UTF-8; empty lines are left out.
        key: of the prompt in each object.

    Raises:
        BitcpmError: unreadable, no prompts, or an object without the key; names file and line.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "is no UTF-8 text"
        raise BitcpmError(f"logits={path}: {reason}. Name a text file of prompts.") from error
    prompts = []
    for number, line in enumerate(lines, start=1):
        line = line.removesuffix("\r")
        if not line.strip():
            continue
        if path.suffix == ".jsonl":
            line = _read_object(line, key, f"{path} line {number}")
        prompts.append(line)
    if not prompts:
        raise BitcpmError(f"logits={path}: holds no prompts. Write one a line.")
    return prompts


def _read_object(line: str, key: str, where: str) -> str:
    try:
        value = json.loads(line)[key]
        if isinstance(value, str) and value:
            return value
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise BitcpmError(f"logits={where}: holds no text under {key}. Name another key.")


def logit_table(
    a: str | Path,
    b: str | Path,
    prompts: Sequence[str],
    tokenizer: str | Path | None = None,
    dtype: str = "float32",
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Compare the next token of two models after each prompt.

    Args:
        a: the reference, computed in float32: Hugging Face folder or Megatron checkpoint.
        b: the other model.
        prompts: texts, at least one.
        tokenizer: tokenizer folder; default the one that comes with `a`, else with `b`.
        dtype: in which `b` computes: float32, or auto, the type of its files (Hugging Face only).
        trust_remote_code: run modelling code of a folder that is not this package's.
    Returns:
        reference, model, dtype; prompts: see `compare_probabilities`; summary: likewise.

    Raises:
        BitcpmError: a model or the tokenizer does not load, the vocabularies differ, or a prompt is
            empty or longer than a model's longest sequence.
    """
    if dtype not in _DTYPES:
        raise BitcpmError(f"dtype={dtype}: is no choice. Use {' or '.join(_DTYPES)}.")
    sources = [open_source(path, tokenizer) for path in (a, b)]
    if dtype != "float32" and isinstance(sources[1], MegatronSource):
        raise BitcpmError(f"dtype={dtype}: a Megatron model is computed in float32. Leave it out.")
    if sources[0].vocab_size != sources[1].vocab_size:
        raise CheckpointError(
            f"vocab_size={sources[1].vocab_size}: of {b}, that of {a} is {sources[0].vocab_size}. "
            "Compare models of one vocabulary."
        )
    tokens, words = _tokenize(prompts, sources, tokenizer)
    found: list[Probabilities | None] = [None, None]
    # Preparing Megatron changes torch for the whole process: transformers has to come first.
    for index in sorted((0, 1), key=lambda i: isinstance(sources[i], MegatronSource)):
        kind: torch.dtype | str = torch.float32 if index == 0 or dtype == "float32" else "auto"
        found[index] = _next_token_probabilities(sources[index], tokens, kind, trust_remote_code)
    assert found[0] is not None and found[1] is not None
    rows, summary = compare_probabilities(found[0], found[1])
    for prompt, row in zip(prompts, rows, strict=True):
        row["prompt"] = prompt
        for side in ("reference", "model"):
            row[f"{side}_token"] = words(row[f"{side}_id"])
            for entry in row[f"{side}_top"]:
                entry["token"] = words(entry["id"])
    return {
        "reference": str(a),
        "model": str(b),
        "dtype": dtype,
        "prompts": rows,
        "summary": summary,
    }


def compare_probabilities(
    p_NV: Probabilities, q_NV: Probabilities, top: int = 10
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Compare next-token distributions.

    Args:
        p_NV: of the reference, [N, V], float64, rows sum to 1.
        q_NV: of the other model.
        top: how many of the likeliest tokens to compare; K = min(top, V).
    Returns:
        For each prompt: reference_id and model_id (the likeliest tokens), their reference_prob and
        model_prob, top1_absolute_error and top1_relative_error (of the reference's token),
        top10_overlap (tokens in both lists), kl (nats), reference_top and model_top (id, prob).
        Over all prompts: prompts, top1_match_rate, top5_containment_rate (the reference's likeliest
        token is among the other's five), top10_overlap_rate, top1_relative_error_mean and _max,
        top1_absolute_error_mean and _max, top10_mae, top10_max_error, top10_rmse, kl_mean, kl_max.
    """
    count = min(top, p_NV.shape[1])
    p_top_NK, q_top_NK = (np.argsort(-x, axis=1, kind="stable")[:, :count] for x in (p_NV, q_NV))
    kl_N = _kl(p_NV, q_NV)
    rows: list[dict[str, Any]] = []
    for n, (p_V, q_V) in enumerate(zip(p_NV, q_NV, strict=True)):
        best, other = int(p_top_NK[n, 0]), int(q_top_NK[n, 0])
        error = abs(float(q_V[best] - p_V[best]))
        rows.append(
            {
                "reference_id": best,
                "reference_prob": float(p_V[best]),
                "model_id": other,
                "model_prob": float(q_V[other]),
                "top1_absolute_error": error,
                "top1_relative_error": error / float(p_V[best]),
                "top10_overlap": len({*p_top_NK[n].tolist()} & {*q_top_NK[n].tolist()}),
                "in_top5": best in q_top_NK[n, :5],
                "kl": float(kl_N[n]),
                "reference_top": _list_top(p_top_NK[n], p_V),
                "model_top": _list_top(q_top_NK[n], q_V),
            }
        )
    errors_NK = np.abs(np.take_along_axis(q_NV - p_NV, p_top_NK, axis=1))
    relative = [row["top1_relative_error"] for row in rows]
    absolute = [row["top1_absolute_error"] for row in rows]
    summary = {
        "prompts": len(rows),
        "top1_match_rate": float(np.mean([r["reference_id"] == r["model_id"] for r in rows])),
        "top5_containment_rate": float(np.mean([r["in_top5"] for r in rows])),
        "top10_overlap_rate": float(np.mean([r["top10_overlap"] for r in rows])) / count,
        "top1_relative_error_mean": float(np.mean(relative)),
        "top1_relative_error_max": max(relative),
        "top1_absolute_error_mean": float(np.mean(absolute)),
        "top1_absolute_error_max": max(absolute),
        "top10_mae": float(errors_NK.mean()),
        "top10_max_error": float(errors_NK.max()),
        "top10_rmse": float(np.sqrt(np.square(errors_NK).mean())),
        "kl_mean": float(kl_N.mean()),
        "kl_max": float(kl_N.max()),
        "compared_tokens": count,
    }
    return rows, summary


def _kl(p_NV: Probabilities, q_NV: Probabilities) -> npt.NDArray[np.float64]:
    """Return KL(p || q) of each row in nats; infinite where q is 0 and p is not."""
    with np.errstate(divide="ignore", invalid="ignore"):
        terms_NV = np.where(p_NV > 0, p_NV * (np.log(p_NV) - np.log(q_NV)), 0.0)
    total: npt.NDArray[np.float64] = np.maximum(terms_NV.sum(1), 0.0)  # rounding can give -1e-17
    return total


def _list_top(ids_K: npt.NDArray[np.int64], p_V: Probabilities) -> list[dict[str, Any]]:
    return [{"id": int(i), "prob": float(p_V[i])} for i in ids_K]


def render_logit_table(table: dict[str, Any]) -> str:
    """Return the result of `logit_table` as Markdown: prompts, then the summary."""
    summary = table["summary"]
    count, total = summary["compared_tokens"], summary["prompts"]

    def share(rate: float) -> str:
        return f"{rate:.0%} ({round(rate * total)}/{total})"

    rows = [
        (
            row["prompt"],
            repr(row["reference_token"]),
            f"{row['reference_prob']:.4f}",
            repr(row["model_token"]),
            f"{row['model_prob']:.4f}",
            f"{row['top1_relative_error']:.2%}",
            f"{row['top10_overlap']}/{count}",
        )
        for row in table["prompts"]
    ]
    worst = max(table["prompts"], key=lambda row: float(row["top1_relative_error"]))
    overlap = summary["top10_overlap_rate"]
    facts = [
        ("Top-1 token match rate", share(summary["top1_match_rate"])),
        ("Top-5 token containment", share(summary["top5_containment_rate"])),
        (f"Top-{count} token overlap", f"{overlap:.0%} (mean {overlap * count:.1f}/{count})"),
        ("Top-1 probability, mean relative error", f"{summary['top1_relative_error_mean']:.2%}"),
        (
            "Top-1 probability, max relative error",
            f"{summary['top1_relative_error_max']:.2%} (prompt {worst['prompt']!r})",
        ),
        ("Top-1 probability, mean absolute error", f"{summary['top1_absolute_error_mean']:.3g}"),
        ("Top-1 probability, max absolute error", f"{summary['top1_absolute_error_max']:.3g}"),
        (f"Top-{count} probabilities, mean absolute error (MAE)", f"{summary['top10_mae']:.3g}"),
        (f"Top-{count} probabilities, max absolute error", f"{summary['top10_max_error']:.3g}"),
        (f"Top-{count} probabilities, RMSE", f"{summary['top10_rmse']:.3g}"),
        ("KL divergence, mean (nats)", f"{summary['kl_mean']:.3g}"),
        ("KL divergence, max (nats)", f"{summary['kl_max']:.3g}"),
    ]
    sides = f"A: {table['reference']} (float32)\nB: {table['model']} ({table['dtype']})\n"
    header = (
        "Prompt",
        "A top-1 token",
        "A prob",
        "B top-1 token",
        "B prob",
        "Top-1 probability error",
        f"Top-{count} overlap",
    )
    return f"{sides}\n{markdown_table(header, rows)}\n{markdown_table(('Measure', 'Value'), facts)}"


def _tokenize(
    prompts: Sequence[str], sources: Sequence[ModelSource], tokenizer: str | Path | None
) -> tuple[list[list[int]], Any]:
    """Return the ids of each prompt, and what turns an id into its text."""
    from megatron_bitcpm.evaluation.generate import load_hf_tokenizer

    if not prompts:
        raise BitcpmError("logits=[]: no prompts. Give at least one.")
    folder = tokenizer or next((s.side_files for s in sources if _has_tokenizer(s)), None)
    if folder is None:
        raise BitcpmError(
            f"tokenizer=None: neither {sources[0].path} nor {sources[1].path} has one. Name one "
            "(--tokenizer)."
        )
    loaded = load_hf_tokenizer(folder)
    longest = min(source.model.max_position_embeddings for source in sources)
    tokens = []
    for prompt in prompts:
        ids = list(loaded(prompt)["input_ids"])
        if not 1 <= len(ids) <= longest:
            raise BitcpmError(
                f"prompt={prompt[:40]!r}: has {len(ids)} tokens, the models take 1 to "
                f"{longest}. Change it."
            )
        if max(ids) >= sources[0].vocab_size:
            raise BitcpmError(
                f"tokenizer={folder}: has id {max(ids)}, the models {sources[0].vocab_size} ids. "
                "Name the tokenizer of the models (--tokenizer)."
            )
        tokens.append(ids)

    def word(index: int) -> str:
        return str(loaded.decode([index], clean_up_tokenization_spaces=False))

    return tokens, word


def _has_tokenizer(source: ModelSource) -> bool:
    folder = source.side_files
    return folder is not None and any((folder / name).is_file() for name in VOCABULARY_FILES)


@torch.no_grad()
def _next_token_probabilities(
    source: ModelSource,
    tokens: list[list[int]],
    dtype: torch.dtype | str,
    trust_remote_code: bool,
) -> Probabilities:
    """Return softmax of the last position's logits, [N, V], each prompt computed by itself."""
    from megatron_bitcpm.evaluation import generate, logits

    rows = []
    if isinstance(source, MegatronSource):
        with logits.megatron_model(source) as model:
            device = next(model.parameters()).device
            for ids in tokens:
                logits.follow_length(model, source, len(ids))
                rows.append(
                    logits.megatron_logits(model, torch.tensor([ids], device=device))[0, -1]
                )
            return _softmax(rows, source.vocab_size)
    model = generate.load_hf_model(source.path, dtype, trust_remote_code)
    for ids in tokens:
        rows.append(model(torch.tensor([ids], device=model.device)).logits[0, -1])
    return _softmax(rows, source.vocab_size)


def _softmax(rows: list[torch.Tensor], vocab_size: int) -> Probabilities:
    logits_NV = torch.stack([row[:vocab_size].double().cpu() for row in rows])
    if not bool(logits_NV.isfinite().all()):
        raise CheckpointError(
            "logits=NaN or infinite: nothing can be compared. Check the models with bitcpm verify."
        )
    result: Probabilities = logits_NV.softmax(1).numpy()
    return result
