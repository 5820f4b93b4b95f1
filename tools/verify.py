"""`bitcpm verify` as a script, for those who look here first."""

import sys

from megatron_bitcpm.cli import main

if __name__ == "__main__":
    main(["verify", *sys.argv[1:]])
