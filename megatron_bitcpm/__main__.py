"""`python -m megatron_bitcpm` is the `bitcpm` command, for torchrun."""

from megatron_bitcpm.cli import main

if __name__ == "__main__":
    main()
