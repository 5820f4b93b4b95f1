"""What `bitcpm verify` reports: whether tensors are equal, then how far predictions are apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_bitcpm.conversion.open import open_source
from megatron_bitcpm.conversion.output_folder import check_report, write_report
from megatron_bitcpm.conversion.verify import Report, compare
from megatron_bitcpm.errors import BitcpmError
from megatron_bitcpm.evaluation.logit_table import logit_table, render_logit_table
from megatron_bitcpm.evaluation.prompts import read_prompts


def verify_models(
    model: Path,
    other: Path | None = None,
    tokenizer: Path | None = None,
    logits: Path | None = None,
    logits_key: str | None = None,
    logits_dtype: str | None = None,
    markdown: Path | None = None,
    trust_remote_code: bool = False,
) -> tuple[Report, str | None, dict[str, Any] | None]:
    """Check a model, compare it with another one and, after the prompts of `logits`, predictions.

    Returns the comparison of the tensors, whose problems are not raised, and what to show of it:
    the tables, None where they went to the .md file `markdown` or a proof needs none; the content
    with the predictions, None where the problems say it all.
    """
    only_with_logits: dict[str, Any] = {
        "logits-key": logits_key,
        "logits-dtype": logits_dtype,
        "trust-remote-code": trust_remote_code or None,
    }
    for name, value in only_with_logits.items():
        if value is not None and logits is None:
            raise BitcpmError(f"{name}={value}: has no effect without --logits. Leave it out.")
    for name, value in {"logits": logits, "markdown": markdown}.items():
        if value is not None and other is None:
            raise BitcpmError(f"{name}={value}: needs two models. Name the second one.")
    if markdown is not None:
        check_report(markdown, [p for p in (model, other, tokenizer, logits) if p is not None])
    prompts = None if logits is None else read_prompts(logits, logits_key)

    found = open_source(model, tokenizer)
    wanted = None if other is None else open_source(other, tokenizer)
    report = compare(found, wanted, tokenizer)
    content, tables = report.content, report.render()
    if prompts is not None and other is not None:
        table = logit_table(
            model, other, prompts, tokenizer, logits_dtype or "float32", trust_remote_code
        )
        content = content | {"logits": table}
        tables = f"{tables}\n{render_logit_table(table)}"
    if markdown is not None:
        write_report(markdown, tables)
    shows_tables = markdown is None and (prompts is not None or bool(report.problems))
    shows_content = prompts is not None or not report.problems
    return report, tables if shows_tables else None, content if shows_content else None
