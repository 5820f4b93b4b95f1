"""The table of next-token probabilities: its measures, and models of every form in it."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
from helpers.ranks import run_ranks

from megatron_bitcpm.errors import BitcpmError, CheckpointError
from megatron_bitcpm.evaluation.logit_table import (
    compare_probabilities,
    logit_table,
    render_logit_table,
)
from megatron_bitcpm.evaluation.prompts import read_prompts

LOGITS_A = np.array([[2.0, 1.0, 0.0, -1.0, 0.5, 0.1], [0.0, 3.0, 1.0, 2.5, -2.0, 0.2]])
LOGITS_B = np.array([[2.1, 1.1, 0.0, -1.2, 0.4, 0.1], [0.1, 2.4, 1.1, 2.6, -2.0, 0.3]])


def softmax(row):
    powers = [math.exp(x) for x in row]
    return [power / math.fsum(powers) for power in powers]


def make_table(**changes):
    p, q = (np.array([softmax(row) for row in logits]) for logits in (LOGITS_A, LOGITS_B))
    rows, summary = compare_probabilities(p, q, top=3)
    for row in rows:
        row |= {"prompt": "a | b", "reference_token": " x", "model_token": "\n"}
    return {"reference": "A", "model": "B", "dtype": "auto", "prompts": rows, "summary": summary}


def test_the_measures_follow_their_definitions():
    """Worked one value at a time, in plain Python."""
    table = make_table()
    kls, relative, top_errors = [], [], []
    # By hand: the three likeliest of A and of B, likeliest first.
    tops = [((0, 1, 4), (0, 1, 4)), ((1, 3, 2), (3, 1, 2))]
    for row, a, b, (top_a, top_b) in zip(table["prompts"], LOGITS_A, LOGITS_B, tops, strict=True):
        p, q = softmax(a), softmax(b)
        kls.append(math.fsum(x * math.log(x / y) for x, y in zip(p, q, strict=True)))
        best = top_a[0]
        relative.append(abs(q[best] - p[best]) / p[best])
        top_errors += [abs(q[i] - p[i]) for i in top_a]
        assert (row["reference_id"], row["model_id"]) == (top_a[0], top_b[0])
        assert row["reference_prob"] == pytest.approx(p[best], rel=1e-12)
        assert row["model_prob"] == pytest.approx(q[top_b[0]], rel=1e-12)
        assert row["top1_relative_error"] == pytest.approx(relative[-1], rel=1e-12)
        assert row["kl"] == pytest.approx(kls[-1], rel=1e-9)
        assert row["top10_overlap"] == 3
        assert [entry["id"] for entry in row["reference_top"]] == list(top_a)
        assert [entry["id"] for entry in row["model_top"]] == list(top_b)
    wanted = {
        "prompts": 2,
        "top1_match_rate": 0.5,
        "top5_containment_rate": 1.0,
        "top10_overlap_rate": 1.0,
        "top1_relative_error_mean": sum(relative) / 2,
        "top1_relative_error_max": max(relative),
        "top10_mae": sum(top_errors) / 6,
        "top10_max_error": max(top_errors),
        "top10_rmse": math.sqrt(sum(e * e for e in top_errors) / 6),
        "kl_mean": sum(kls) / 2,
        "kl_max": max(kls),
    }
    summary = table["summary"]
    assert {key: summary[key] for key in wanted} == pytest.approx(wanted, rel=1e-9)


def test_overlap_and_containment_of_other_tokens():
    p = np.full((1, 24), 0.01)
    p[0, :12] = np.linspace(0.09, 0.05, 12)
    q = p[:, ::-1].copy()
    rows, summary = compare_probabilities(p / p.sum(), q / q.sum())
    assert rows[0]["top10_overlap"] == summary["top10_overlap_rate"] == 0
    assert summary["top5_containment_rate"] == summary["top1_match_rate"] == 0
    rows, summary = compare_probabilities(p / p.sum(), p / p.sum())
    assert rows[0]["top10_overlap"] == 10
    assert summary["kl_max"] == summary["top10_max_error"] == 0


def test_a_token_that_the_model_excludes():
    p, q = np.array([[0.5, 0.5]]), np.array([[1.0, 0.0]])
    assert compare_probabilities(p, q)[1]["kl_max"] == math.inf
    assert compare_probabilities(q, p)[1]["kl_max"] == pytest.approx(math.log(2))


def test_markdown():
    text = render_logit_table(make_table())
    assert text.startswith("A: A (float32)\nB: B (auto)\n\n| Prompt | A top-1 token | A prob |")
    p, q = softmax(LOGITS_A[0]), softmax(LOGITS_B[0])
    error = abs(q[0] - p[0]) / p[0]
    assert f"| a \\| b | ' x' | {p[0]:.4f} | '\\n' | {q[0]:.4f} | {error:.2%} | 3/3 |" in text
    assert "| Top-1 token match rate | 50% (1/2) |" in text
    assert "| Top-5 token containment | 100% (2/2) |" in text
    assert "| Top-3 token overlap | 100% (mean 3.0/3) |" in text


def test_prompts_of_a_text_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("first\r\n\n second \u2028 line\n", encoding="utf-8")
    assert read_prompts(path) == ["first", " second \u2028 line"]


def test_prompts_of_a_jsonl_file(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "a\nb", "text": "c"}) + "\n", encoding="utf-8")
    assert read_prompts(path) == ["a\nb"]
    assert read_prompts(path, key="text") == ["c"]
    with pytest.raises(BitcpmError, match=r"prompts.jsonl line 1: holds no text under question\."):
        read_prompts(path, key="question")


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xff\xfe", None])
def test_bad_prompt_files(content, tmp_path):
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BitcpmError, match=r"^logits=.*prompts\.txt: ") as caught:
        read_prompts(path)
    assert "\n" not in str(caught.value)


PROMPTS = ["ab cde", "f", "jj ihg fed"]


def make_tables(rank: int, checkpoint: str, folder: str) -> list[dict]:
    """Megatron against the folder, and the folder against itself in the type of its files."""
    return [
        logit_table(checkpoint, folder, PROMPTS),
        logit_table(folder, folder, PROMPTS, dtype="auto"),
    ]


@pytest.mark.slow
def test_a_checkpoint_against_its_export(trained, exported):
    case = "tp1_untied"
    arguments = (str(trained(case).directory), str(exported(case)))
    ((against_megatron, in_bfloat16),) = run_ranks(1, make_tables, *arguments, timeout_s=280)
    summary = against_megatron["summary"]
    assert summary["top1_match_rate"] == summary["top10_overlap_rate"] == 1
    # Both compute in float32 but order their sums differently.
    assert summary["top10_max_error"] < 1e-6
    assert 0 < summary["kl_max"] < 1e-8 or summary["kl_max"] == 0
    row = against_megatron["prompts"][2]
    assert row["prompt"] == PROMPTS[2]
    assert isinstance(row["model_token"], str)
    assert row["model_top"][0]["token"] == row["model_token"]
    # bfloat16 keeps 8 bits: it must show, and stay small.
    assert 1e-6 < in_bfloat16["summary"]["top10_max_error"] < 0.02
    assert in_bfloat16["dtype"] == "auto"
    json.dumps(against_megatron)


def refuse(message, *arguments, **options):
    with pytest.raises(BitcpmError, match=message) as caught:
        logit_table(*arguments, **options)
    assert "\n" not in str(caught.value)


def test_arguments_are_checked(exported, trained, tmp_path):
    folder, checkpoint = exported("tp1_untied"), trained("tp1_untied").directory
    refuse("^dtype=float16: is unknown", folder, folder, PROMPTS, dtype="float16")
    refuse("^dtype=auto: a Megatron model", folder, checkpoint, PROMPTS, dtype="auto")
    refuse("^logits=.*no prompts", folder, folder, [])
    refuse(r"^prompt='a a .*: has \d+ tokens, the models take 1 to 80", folder, folder, ["a " * 99])
    bare = shutil.copytree(folder, tmp_path / "bare")
    for path in bare.glob("*token*"):
        path.unlink()
    refuse("^tokenizer=None: neither .* has one", bare, bare, PROMPTS)


def test_code_of_others_is_not_run(exported, tmp_path):
    folder = shutil.copytree(exported("tp1_untied"), tmp_path / "foreign")
    path = folder / "config.json"
    names = {"AutoModelForCausalLM": "modeling_foreign.Model"}
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": names}))
    (folder / "modeling_foreign.py").write_text("raise SystemExit('the code was run')\n")
    message = "modelling code is not the one that this package writes.*--trust-remote-code"
    with pytest.raises(CheckpointError, match=message):
        logit_table(folder, folder, PROMPTS)
