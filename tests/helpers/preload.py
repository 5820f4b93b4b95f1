"""Imported once by the fork server, so that each rank of a test starts in milliseconds."""

import warnings

warnings.filterwarnings("ignore")

from megatron_bitcpm.platforms import current_platform  # noqa: E402

current_platform().prepare()

import helpers.tiny_models  # noqa: E402, F401
import megatron_bitcpm.training.setup  # noqa: E402, F401
