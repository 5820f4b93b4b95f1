"""Fuse the fake quantiser into latent weights: pseudo-quantised weights, ready to serve.

    python tools/qat-convert.py --input_bin F --output F --quant_type ternary --group_size -1

Reads and writes .bin and .safetensors files, or folders; only the seven projections of each layer
change. See `megatron_bitcpm.conversion.qat_convert`.
"""

from __future__ import annotations

import argparse
import sys

from megatron_bitcpm.conversion.qat_convert import qat_convert
from megatron_bitcpm.errors import BitcpmError


def main() -> None:
    """Parse the command line, convert, print what was done."""
    parser = argparse.ArgumentParser(
        description="Fuse the fake quantiser into latent weights.", allow_abbrev=False
    )
    parser.add_argument("--input_bin", required=True, help="latent .bin or .safetensors, or folder")
    parser.add_argument("--output", required=True, help="file (by its suffix) or folder to write")
    parser.add_argument("--quant_type", required=True, help="grid: ternary, asym4, half_sym4, ...")
    parser.add_argument("--group_size", required=True, help="inputs per scale; -1 row; tensor")
    parser.add_argument("--numerics", help="fp32 (default) or bf16_reciprocal")
    parser.add_argument("--eps", type=float, help="smallest scale, default 1e-5")
    parser.add_argument("--force", action="store_true", help="also weights that look untrained")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    try:
        report = qat_convert(**vars(parser.parse_args()))
    except BitcpmError as error:
        print(f"qat-convert: {error}", file=sys.stderr)
        sys.exit(2)
    for warning in report["warnings"]:
        print(f"qat-convert: warning: {warning}", file=sys.stderr)
    if "projections" in report:
        print(
            f"{report['output']}: {report['projections']} projections, {report['quant_type']}, "
            f"group size {report['group_size']}, numerics {report['numerics']}; "
            f"{report['other_tensors']} other tensors unchanged"
        )
    else:
        print(f"{report['folder']}: {report['verify']['ternary_tensors']} projections quantised")
    if "other_numerics" in report:
        print(
            f"no stamp: numerics {report['other_numerics']} would change {report['changed_codes']} "
            f"of {report['weights']} codes ({report['changed_fraction']:.4%})"
        )


if __name__ == "__main__":
    main()
