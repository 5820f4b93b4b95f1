"""Sizes of a config.json that are no sizes are refused in one line, before anything is made."""

from __future__ import annotations

import json
import time

import pytest
from helpers.tiny_folders import make_folder

from megatron_bitcpm.conversion.open import open_source
from megatron_bitcpm.errors import CheckpointError

HUGE = 2**26


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": "4"}, "num_attention_heads='4': must be a whole number"),
        ({"num_attention_heads": HUGE}, f"num_attention_heads={HUGE}: must be .* to 1048576 "),
        ({"head_dim": HUGE}, f"head_dim={HUGE}: must be .* to 1048576 "),
        ({"vocab_size": HUGE}, f"vocab_size={HUGE}: must be .* to 16777216 "),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000: must be .* to 4096 "),
        (
            {"num_attention_heads": 2**20, "head_dim": 2**20},
            "num_attention_heads=1048576: all heads together have 1099511627776 channels",
        ),
        (
            {"num_hidden_layers": 4096, "intermediate_size": 2**20},
            "num_hidden_layers=4096: times the width 1048576 is more than 134217728 ",
        ),
    ],
)
def test_a_size_out_of_bounds(changes, message, tmp_path):
    folder = make_folder(tmp_path / "model")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    start = time.process_time()
    with pytest.raises(CheckpointError, match=f"^{message}") as caught:
        open_source(folder)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    assert time.process_time() - start < 2
