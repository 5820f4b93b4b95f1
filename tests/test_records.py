"""Records refuse what other code would take for something else, and say so on one line."""

from __future__ import annotations

import json
from typing import Literal

import pytest
from pydantic import ConfigDict, Field, ValidationError, field_validator, model_validator

from megatron_bitcpm.records import Record, explain


class Part(Record):
    tokens: int = Field(ge=0)


class Whole(Record):
    name: str
    parts: dict[str, Part] = Field(default_factory=dict)
    rate: float = 1.0
    shape: tuple[int, ...] = ()
    kind: Literal["a", "b"] = "a"
    safe: bool = False

    @field_validator("name")
    @classmethod
    def check_name(cls, name: str) -> str:
        if not name.isascii():
            raise ValueError("must be ASCII.")
        return name

    @model_validator(mode="after")
    def check_rate(self) -> Whole:
        if self.kind == "b" and self.rate < 0:
            raise ValueError("b needs a rate")
        return self


class Options(Record):
    model_config = ConfigDict(extra="forbid")

    threads: int = 1


def reason(values) -> str:
    """Why Whole refuses values: the same from JSON text and from Python values."""
    reasons = []
    for read in (lambda: Whole.model_validate_json(json.dumps(values)), lambda: Whole(**values)):
        with pytest.raises(ValidationError) as caught:
            read()
        reasons.append(explain(caught.value))
    assert reasons[0] == reasons[1] and "\n" not in reasons[0]
    return reasons[0]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, "name is missing"),
        ({"name": 3}, "name=3: must be a valid string"),
        ({"name": "\u00e9\n"}, "name='\u00e9\\n': must be ASCII"),
        ({"name": "x", "parts": {"t": {}}}, "parts.t.tokens is missing"),
        ({"name": "x", "parts": {"t": {"tokens": True}}}, "parts.t.tokens=True: must be a valid"),
        ({"name": "x", "parts": {"t": {"tokens": "3"}}}, "parts.t.tokens='3': must be a valid"),
        ({"name": "x", "parts": {"t": {"tokens": 3.0}}}, "parts.t.tokens=3.0: must be a valid"),
        ({"name": "x", "parts": {"t": {"tokens": -1}}}, "=-1: must be greater than or equal to 0"),
        ({"name": "x", "rate": True}, "rate=True: must be a valid number"),
        ({"name": "x", "rate": float("nan")}, "rate=nan: must be a finite number"),
        ({"name": "x", "kind": "c"}, "kind='c': must be 'a' or 'b'"),
        ({"name": "x", "safe": 1}, "safe=1: must be a valid boolean"),
        ({"name": "x", "kind": "b", "rate": -1}, "b needs a rate"),
        ({"name": ["y" * 999]}, "name=['" + "y" * 58 + ": must be a valid string"),
        ({"name": "x", "parts": {"t": 3}}, "parts.t=3: must be an object"),
        ({"name": 1, "rate": "", "kind": 0, "safe": 0, "parts": 0}, "rate='': must be a valid"),
    ],
)
def test_a_wrong_value_is_one_line_with_its_field(values, expected):
    found = reason(values)
    assert expected in found and not found.endswith(".")
    assert found.endswith("; and 2 more") == (len(values) == 5)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"[]", "must be an object"),
        (b"{", "Invalid JSON: EOF"),
        (b"\xff\xfe", "Invalid JSON"),
        (b"[" * 100_000, "Invalid JSON: recursion limit"),
    ],
)
def test_what_is_not_a_record_at_all(text, expected):
    with pytest.raises(ValidationError) as caught:
        Whole.model_validate_json(text)
    assert explain(caught.value).startswith(expected) and "\n" not in explain(caught.value)


def test_values_of_the_right_types_are_kept():
    found = Whole.model_validate_json('{"name": "x", "rate": 2, "shape": [4, 2], "later": null}')
    assert (found.rate, found.shape, found.model_extra) == (2.0, (4, 2), None)
    with pytest.raises(ValidationError, match="frozen"):
        found.name = "y"


def test_options_that_nothing_reads_are_refused():
    with pytest.raises(ValidationError) as caught:
        Options.model_validate({"thread": 2})
    assert explain(caught.value) == "thread is not a known field"


def test_other_errors_are_explained_too(tmp_path):
    with pytest.raises(OSError) as caught:
        (tmp_path / "absent.json").read_bytes()
    assert explain(caught.value) == "No such file or directory (absent.json)"
