"""`bitcpm convert` as a script, for those who look here first."""

import sys

from megatron_bitcpm.cli import main

if __name__ == "__main__":
    main(["convert", *sys.argv[1:]])
