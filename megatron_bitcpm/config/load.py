"""From YAML text to a checked `RunConfig`, with every problem in one error."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from megatron_bitcpm.config.rules import cross_field_problems
from megatron_bitcpm.config.sections import RunConfig
from megatron_bitcpm.errors import ConfigError, describe
from megatron_bitcpm.records import rule_of


def load_config(
    path: str | Path, overrides: list[str] | None = None, world_size: int = 1
) -> RunConfig:
    """Read a run's YAML file with ``section.key=value`` overrides; ConfigError has all problems."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ConfigError(
            f"--config={path}: {reason}. Name a YAML file, see launch/configs."
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--config={path}: is not UTF-8 text. Name a YAML file.") from error
    return parse_config(text, overrides, world_size, source=str(path))


def parse_config(
    text: str,
    overrides: list[str] | None = None,
    world_size: int = 1,
    source: str = "configuration",
) -> RunConfig:
    """Like `load_config`, from the YAML text itself."""
    try:
        tree = yaml.safe_load(text)
    # ValueError: a date that is none, or an integer of thousands of digits.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        where = _one_line(error)
        raise ConfigError(f"--config={source}: {where}. Correct the YAML.") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"--config={source}: is not a YAML mapping. See launch/configs.")
    for override in overrides or []:
        _apply_override(tree, override)
    _read_rope_factors(tree)
    try:
        config = RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError([_explain(e) for e in error.errors()]) from error
    if problems := list(cross_field_problems(config, world_size)):
        raise ConfigError(problems)
    return config


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    override = _one_line(override)
    if not equals or not key:
        raise ConfigError(f"--set={override}: is not key=value. Write --set a.b=1.")
    *sections, name = key.strip().split(".")
    node = tree
    for section in sections:
        child = node.setdefault(section, {})
        if not isinstance(child, dict):
            raise ConfigError(f"--set={override}: {section} is not a section. Check the key.")
        node = child
    try:
        node[name] = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"--set={override}: the value is not YAML. Quote it.") from error


def _read_rope_factors(tree: dict[str, Any]) -> None:
    """Replace ``model.rope_scaling.hf_config`` by what that file says, in place."""
    model: Any = tree.get("model")
    rope = model.get("rope_scaling") if isinstance(model, dict) else None
    if not isinstance(rope, dict) or rope.get("hf_config") is None:
        return
    path = rope["hf_config"]
    where = f"model.rope_scaling.hf_config={path}"
    kept = {key: value for key, value in rope.items() if key != "hf_config"}
    given = sorted({k for k in kept if kept[k]} - {"rope_type", "attention_factor"})
    if given:
        raise ConfigError(f"{where}: the file gives {', '.join(given)} too. Remove either.")
    try:
        hf = json.loads(Path(str(path)).read_text(encoding="utf-8"))
        # Transformers 5 keeps RoPE in rope_parameters, earlier versions in rope_scaling.
        found = hf.get("rope_scaling") or hf["rope_parameters"]
        kind = found.get("rope_type") or found["type"]
        if kind != "longrope":
            raise ValueError(f"rope_type is {kind}, not longrope")
        length = "original_max_position_embeddings"
        factors = {key: list(found[key]) for key in ("short_factor", "long_factor")}
        factors[length] = found.get(length) or hf[length]
    except (OSError, KeyError, ValueError, TypeError, AttributeError) as error:
        reason = f"has no {error.args[0]}" if isinstance(error, KeyError) else describe(error)
        raise ConfigError(
            f"{where}: {reason}. Name the config.json of a LongRoPE model."
        ) from error
    if "attention_factor" not in kept and found.get("attention_factor") is not None:
        kept["attention_factor"] = found["attention_factor"]
    model["rope_scaling"] = {**kept, **factors, "source": str(path)}


def _explain(error: Any) -> str:
    """One line for one pydantic error; an unknown key names the nearest known one."""
    path = [_one_line(part) for part in error["loc"]]
    field = ".".join(path)
    value = _one_line(error["input"])
    if error["type"] == "extra_forbidden":
        known = _known_keys(path[:-1])
        near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.4)
        fix = f"Did you mean {near[0]}?" if near else f"Known keys: {', '.join(known)}."
        return f"{field}={value}: unknown key. {fix}"
    if error["type"] == "missing":
        return f"{field}=(absent): is required. Add the key."
    return f"{field}={value}: {rule_of(error)}. Correct the value."


def _one_line(value: Any) -> str:
    """Return a value of the user as text without line breaks."""
    return " ".join(str(value).split())


def _known_keys(path: list[str]) -> list[str]:
    section: type[BaseModel] = RunConfig
    for part in path:
        if part not in section.model_fields:
            continue  # the number of an entry in a list
        candidates = [section.model_fields[part].annotation]
        for candidate in candidates:
            candidates.extend(get_args(candidate))
        section = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return list(section.model_fields)
