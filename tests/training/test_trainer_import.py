"""What is imported before the devices are prepared."""

from __future__ import annotations

import subprocess
import sys


def test_the_trainer_loads_megatron_after_the_patches():
    code = (
        "import sys, megatron_bitcpm.training.trainer\n"
        "print([name for name in sys.modules if name.startswith('megatron.')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
