"""The quantiser that trained unstamped latent weights, as a user names it.

A model with a stamp says itself which quantiser trained it; settings given beside it may repeat the
stamp and must not contradict it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from megatron_bitcpm.config import QuantConfig
from megatron_bitcpm.conversion.stamp import BF16_RECIPROCAL, FP32, NUMERICS, QuantizerStamp
from megatron_bitcpm.errors import CheckpointError
from megatron_bitcpm.quant.grids import GRIDS
from megatron_bitcpm.quant.scales import DEFAULT_EPS, check_eps


@dataclass(frozen=True)
class QuantizerSettings:
    """What was named, checked by `parse_quantizer_settings`; None: the stamp's, or the default.

    Attributes:
        quant_type: a grid of `GRIDS`.
        group_size: inputs per scale, -1 for a row, "tensor" for a projection.
        numerics: one of `NUMERICS`; default fp32.
        eps: smallest scale, in units of the weight; default 1e-5.
    """

    quant_type: str | None
    group_size: int | str | None
    numerics: str | None
    eps: float | None

    def given(self) -> dict[str, Any]:
        """Return the settings that were named."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def check_agrees(self, stamp: QuantizerStamp) -> None:
        """Refuse settings that are not those of the training.

        Raises:
            CheckpointError: names the first that contradicts the stamp.
        """
        stamped = {
            "quant_type": stamp.quant.grid,
            "group_size": stamp.quant.group_size,
            "numerics": stamp.numerics,
            "eps": stamp.quant.eps,
        }
        for name, value in self.given().items():
            if value != stamped[name]:
                raise CheckpointError(
                    f"{name}={value}: the model was trained with {stamped[name]}, says its stamp. "
                    f"Use {stamped[name]}."
                )

    def make_stamp(self) -> QuantizerStamp:
        """Return the quantiser of a model without a stamp.

        Raises:
            CheckpointError: quant_type or group_size was not named.
        """
        for name in ("quant_type", "group_size"):
            if getattr(self, name) is None:
                raise CheckpointError(
                    f"{name}=None: must be named with the other settings of the quantiser. Use the "
                    "one of the training, for example --quant-type ternary --group-size -1."
                )
        eps = DEFAULT_EPS if self.eps is None else self.eps
        content: dict[str, Any] = {
            "grid": self.quant_type,
            "group_size": self.group_size,
            "eps": eps,
        }
        return QuantizerStamp(QuantConfig(**content), 1, self.numerics or FP32)


def parse_quantizer_settings(
    quant_type: str | None,
    group_size: int | str | None,
    numerics: str | None,
    eps: float | None,
) -> QuantizerSettings:
    """Check settings by themselves; arguments as in `QuantizerSettings`, numbers also as text.

    Raises:
        BitcpmError: one is unknown or out of range.
    """
    if quant_type is not None and quant_type not in GRIDS:
        raise CheckpointError(f"quant_type={quant_type}: is no quantiser. Use {', '.join(GRIDS)}.")
    if group_size is not None and group_size != "tensor":
        try:
            number = 0 if isinstance(group_size, bool | float) else int(group_size)
        except (TypeError, ValueError):
            number = 0
        if number < 1 and number != -1:
            raise CheckpointError(
                f"group_size={group_size}: must be at least 1, -1 for the whole row, or tensor. "
                "Use the one of the training."
            )
        group_size = number
    if numerics is not None and numerics not in NUMERICS:
        raise CheckpointError(f"numerics={numerics}: is unknown. Use {' or '.join(NUMERICS)}.")
    if numerics == BF16_RECIPROCAL and quant_type not in (None, "ternary"):
        raise CheckpointError(
            f"numerics={numerics}: exists for the ternary grid, not for {quant_type}. Use numerics "
            f"{FP32}."
        )
    if eps is not None:
        if isinstance(eps, bool) or not isinstance(eps, int | float):
            raise CheckpointError(f"eps={eps!r}: is no number. Use 1e-5.")
        check_eps(eps)
    return QuantizerSettings(quant_type, group_size, numerics, eps)
