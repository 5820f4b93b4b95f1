"""`bitcpm convert`: its options are the fields of `ConvertOptions`."""

from __future__ import annotations

import inspect
from typing import Annotated, Any, get_args

import typer
from pydantic.fields import FieldInfo

from megatron_bitcpm.cli.output import print_report
from megatron_bitcpm.conversion.options import ConvertOptions, QuantizerOptions


def convert_command(**given: Any) -> None:
    """Convert between Megatron and Hugging Face, and prove that nothing changed."""
    from megatron_bitcpm.conversion.convert import convert

    print_report(convert(**{name: value for name, value in given.items() if value is not None}))


def _types(annotation: Any) -> list[Any]:
    return [annotation, *(kind for part in get_args(annotation) for kind in _types(part))]


def _option(name: str, field: FieldInfo) -> inspect.Parameter:
    """Return an option as typer reads it; one that is not given is None, or False for a flag."""
    # Every other type is a text here, which the field reads.
    kind: Any = next((kind for kind in (bool, int, float) if kind in _types(field.annotation)), str)
    if name in _TEXTS:
        kind = str
    default = inspect.Parameter.empty if field.is_required() else False if kind is bool else None
    option = typer.Option(f"--{name.replace('_', '-')}", help=field.description)
    value: Any = kind if default is not None else kind | None
    keyword = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, keyword, default=default, annotation=Annotated[value, option])


_TEXTS = ("group_size", "max_shard_size")
"""Fields that are numbers or words."""
_LAST = tuple(QuantizerOptions.model_fields)
_FIELDS = {name: f for name, f in ConvertOptions.model_fields.items() if name not in _LAST}
_OPTIONS = [_option(*item) for item in (_FIELDS | QuantizerOptions.model_fields).items()]
convert_command.__signature__ = inspect.Signature(_OPTIONS)  # type: ignore[attr-defined]
convert_command.__annotations__ = {option.name: option.annotation for option in _OPTIONS}
