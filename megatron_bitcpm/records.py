"""Bases of what is read from a file or given as options: fields are checked once, at the door."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from megatron_bitcpm.errors import describe, one_line

_SHOWN = 3
_VALUE_CHARS = 60


class Record(BaseModel):
    """Base of a record: frozen, and no value is converted: true is not 1, "3" is not 3.

    Unknown fields are left out, because newer versions may write more; options that nothing reads
    are refused by ``model_config = ConfigDict(extra="forbid")``. A list fits a tuple only when
    JSON text is read (`model_validate_json`): of Python values declare a list.
    """

    model_config = ConfigDict(
        frozen=True, strict=True, extra="ignore", allow_inf_nan=False, protected_namespaces=()
    )


class Section(BaseModel):
    """Base of a group of settings: frozen, no unknown keys, numbers that are numbers."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False
    )

    def changed(self, *names: str) -> list[str]:
        """Return those of the named fields that differ from their defaults.

        A saved configuration spells out every default, so that a field was given says nothing.
        """
        return [n for n in names if getattr(self, n) != type(self).model_fields[n].default]

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_bool_for_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse ``true`` where a number belongs: pydantic would read it as 1."""
        if isinstance(value, bool) and info.field_name is not None:
            annotation = cls.model_fields[info.field_name].annotation
            if not {int, float}.isdisjoint({annotation, *get_args(annotation)}):
                raise PydanticCustomError("bool_for_number", "must be a number, not true or false")
        return value


def explain(error: Exception) -> str:
    """Return why a record cannot be read, on one line, without a full stop.

    A ValidationError names its first fields: ``splits.train.tokens='3': must be a valid integer``.
    """
    if not isinstance(error, ValidationError):
        return describe(error)
    problems = [_explain_field(entry) for entry in error.errors(include_url=False)]
    more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    return "; ".join(problems[:_SHOWN]) + more


def _explain_field(entry: Any) -> str:
    field = one_line(".".join(map(str, entry["loc"])))
    if entry["type"] == "missing":
        return f"{field} is missing"
    if entry["type"] == "extra_forbidden":
        return f"{field} is not a known field"
    rule = rule_of(entry)
    # Without a field the value is the whole record.
    return f"{field}={one_line(repr(entry['input']), _VALUE_CHARS)}: {rule}" if field else rule


def rule_of(entry: Any) -> str:
    """Return the rule that an entry of `ValidationError.errors` breaks, without a full stop."""
    if entry["type"] in ("model_type", "dict_type"):
        return "must be an object"  # pydantic names the class here
    rule = one_line(entry["msg"]).replace("Input should be", "must be")
    return rule.removeprefix("Value error, ")
