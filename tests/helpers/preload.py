"""Imported once by the fork server, so that each rank of a test starts in milliseconds."""

import importlib
import warnings

warnings.filterwarnings("ignore")

from megatron_bitcpm.platforms import current_platform  # noqa: E402

current_platform().prepare()

# What a training run and its checkpoints import on their way. The last may be absent.
for _name in (
    "helpers.tiny_models",
    "megatron.core.datasets.gpt_dataset",
    "megatron.core.dist_checkpointing.strategies.torch",
    "megatron_bitcpm.checkpoint.saver",
    "megatron_bitcpm.cli",
    "megatron_bitcpm.training.setup",
    "megatron_bitcpm.training.step",
    "megatron_bitcpm.training.trainer",
    "psutil",
    "sentencepiece",
    "matplotlib.backends.backend_agg",
    "matplotlib.pyplot",
):
    importlib.import_module(_name)
