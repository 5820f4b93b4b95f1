"""`bitcpm inspect` as a script. A file named inspect.py would hide Python's module."""

import sys

from megatron_bitcpm.cli import main

if __name__ == "__main__":
    main(["inspect", *sys.argv[1:]])
