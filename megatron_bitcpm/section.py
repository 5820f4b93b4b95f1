"""The base of configuration sections: frozen, no unknown keys, numbers that are numbers."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError


class Section(BaseModel):
    """A group of settings."""

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
