"""Reads LMCache's settings as the engine will, and finds mistakes in them before a run starts.

LMCache itself is less strict: it logs a warning for an unknown key, turns a bad value into None or False, and fails
with a traceback if the file is missing or not YAML. Settings come from the config file, then ``LMCACHE_<KEY>``, then
``lmcache.<key>`` in vLLM's ``kv_connector_extra_config``; the last one wins.
"""

from __future__ import annotations

import difflib
import math
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from kvshare.core.errors import UserError

Definitions = Mapping[str, dict[str, Any]]
"""LMCache's keys, with ``type``, ``default`` and ``env_converter`` of each."""

NOT_SETTINGS = {"LMCACHE_CONFIG_FILE", "LMCACHE_LOG_LEVEL", "LMCACHE_TRACK_USAGE", "LMCACHE_FORCE_SKIP_SAVE"}
"""Environment variables of LMCache that do not correspond to a key of the config file."""

EXTRA = "lmcache."
"""Prefix of LMCache's keys in ``kv_connector_extra_config``."""

BOOLEANS = {"true": True, "1": True, "false": False, "0": False}
"""LMCache takes any other text for false."""

POSITIVE = ("size", "timeout", "interval", "heartbeat_time")
"""Parts of names of settings that must not be 0, unless 0 is their default."""


def path(environ: Mapping[str, str]) -> str | None:
    """Path of the config file. LMCache reads only the second name; launchers and users may set the first."""
    return environ.get("LMCache_CONFIG_FILE") or environ.get("LMCACHE_CONFIG_FILE")


def read(path: str | None) -> dict[str, Any]:
    """Read a config file.

    Raises:
        UserError: the file is missing, not YAML, or not a mapping.
    """
    if not path:
        raise UserError("LMCACHE_CONFIG_FILE is not set: export it as the path of the LMCache YAML")
    file = Path(path)
    if not file.is_file():
        what = "is not a file" if file.exists() else "does not exist"
        raise UserError(f"LMCache config {file} {what}: set LMCache_CONFIG_FILE to a YAML file")
    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"LMCache config {file} cannot be read ({error.strerror}): make it readable") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"LMCache config {file}{where} is not YAML: correct it, or start from config/") from None
    if not isinstance(settings, dict):
        raise UserError(f"LMCache config {file} is not a mapping of keys to values: start from config/")
    return settings


def mistakes(settings: Mapping[str, Any], definitions: Definitions, where: str) -> list[str]:
    """One line for each key that LMCache does not know and each value that it would not take as it is meant.

    Args:
        settings: keys and values of the config file or of ``kv_connector_extra_config``.
        where: what the settings are from, for the messages.
    """
    out = []
    for key, value in settings.items():
        if key not in definitions:
            out.append(f"{where}: LMCache knows no key {key}{near(str(key), definitions)}: remove or correct it")
        elif wanted := _mistake(value, definitions[key]):
            out.append(f"{where}: {key} is {value!r}, must be {wanted}: correct it")
    return out


def environment_mistakes(environ: Mapping[str, str], definitions: Definitions) -> list[str]:
    """One line for each ``LMCACHE_<KEY>`` in ``environ`` that LMCache would not take as it is meant."""
    out = []
    for name, text in sorted(environ.items()):
        definition = definitions.get(name.removeprefix("LMCACHE_").lower()) if name.startswith("LMCACHE_") else None
        if definition is None:
            continue
        wanted = type_name(definition["type"])
        if wanted.startswith("a list") and text.strip().startswith("["):
            out.append(f"{name}={text}: LMCache ignores a list in brackets: write it comma-separated without them")
        elif wrong := _mistake(_unquoted(text), definition):
            out.append(f"{name}={text!r} must be {wrong}: correct or unset it")
    return out


def out_of_range(config: Any, definitions: Definitions) -> Iterator[tuple[str, str]]:
    """The settings of LMCache's config object that are no possible size, time or port, and what they must be."""
    for key, definition in definitions.items():
        default, value = definition.get("default"), getattr(config, key, None)
        if key.endswith(("port", "ports")) and any(not 0 <= port < 65536 for port in _numbers(value)):
            yield key, "from 0 to 65535"
        elif any(math.isnan(number) for number in _numbers(value)):
            yield key, "a number"
        elif not isinstance(value, int | float) or isinstance(value, bool):
            continue
        elif value < 0:
            yield key, "0 or more"
        elif value == 0 != default and any(part in key for part in POSITIVE):
            yield key, "more than 0"
        elif math.isinf(value) and default != value:
            yield key, "finite"


def effective(path: str | None, extra: Mapping[str, Any] | None = None) -> Any:
    """LMCache's config object, as the engine has it.

    Args:
        path: config file. The environment takes precedence over it.
        extra: ``kv_connector_extra_config``, whose ``lmcache.*`` keys take precedence over both.

    Raises:
        UserError: LMCache rejects the combination.
    """
    from lmcache.v1.config import LMCacheEngineConfig, validate_and_set_config_value

    try:
        config = LMCacheEngineConfig.from_file(path) if path else LMCacheEngineConfig.from_defaults()
        try:
            config.update_config_from_env()
        except ValueError:
            if config.lmcache_worker_ports:
                raise
            config.lmcache_worker_ports = [0]  # p2p_replica picks free ports later; LMCache wants one now
            config.validate()
            config.lmcache_worker_ports = []
        for key, value in (extra or {}).items():
            if key.startswith(EXTRA):
                validate_and_set_config_value(config, key.removeprefix(EXTRA), value)
        return config
    except Exception as error:
        raise UserError(f"LMCache refuses {path}: {str(error).splitlines()[0] if str(error) else error!r}") from None


def source(key: str, file: str | None, environ: Mapping[str, str], extra: Mapping[str, Any]) -> str:
    """Where the effective value of a key comes from."""
    if f"{EXTRA}{key}" in extra:
        return f"kv_connector_extra_config {EXTRA}{key}"
    name = f"LMCACHE_{key.upper()}"
    return name if name in environ else f"{file}: {key}"


def definitions() -> Definitions:
    """Keys of the installed LMCache, aliases included."""
    from lmcache.v1 import config

    known = dict(config._CONFIG_DEFINITIONS)
    for alias, name in getattr(config, "_CONFIG_ALIASES", {}).items():
        known.setdefault(alias, known.get(name, {"type": object}))
    return known


def in_source(pattern: str, *packages: str) -> set[str]:
    """All matches of a pattern in the source of installed packages, e.g. the variables that LMCache reads."""
    found: set[str] = set()
    for package in packages:
        try:
            spec = find_spec(package)
        except ModuleNotFoundError:  # the parent is not installed
            continue
        for folder in (spec.submodule_search_locations or []) if spec else []:
            for file in Path(folder).rglob("*.py"):
                found |= set(re.findall(pattern, file.read_text(errors="ignore")))
    return found


def near(key: str, known: Iterable[str]) -> str:
    """ "(did you mean …?)" if a known name is close, else nothing."""
    close = difflib.get_close_matches(key, known, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def fits(value: Any, wanted: Any) -> bool:
    """Whether a value matches a type annotation such as Optional[list[int]]."""
    origin = typing.get_origin(wanted)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, option) for option in typing.get_args(wanted))
    if origin is list:
        return isinstance(value, list) and all(fits(item, typing.get_args(wanted)[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict)
    if wanted in (object, Any):
        return True
    if wanted is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if wanted is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, wanted)


def type_name(wanted: Any) -> str:
    """A type annotation in words, e.g. "a list of integers"."""
    origin = typing.get_origin(wanted)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_name(t) for t in typing.get_args(wanted) if t is not type(None))
    if origin is list:
        return f"a list of {type_name(typing.get_args(wanted)[0])}s"
    names = {int: "integer", float: "number", bool: "true or false", str: "text", dict: "a mapping"}
    return names.get(wanted, str(wanted))


def _mistake(value: Any, definition: Mapping[str, Any]) -> str | None:
    """What a value must be, if LMCache's converter fails with it or makes something else of it."""
    wanted = definition["type"]
    if value is None:
        return None if definition.get("default") is None else type_name(wanted)
    if wanted is bool and str(value).strip().lower() not in BOOLEANS:
        return type_name(wanted)
    if isinstance(value, bool) and wanted is not bool and not fits(value, wanted):
        return type_name(wanted)  # a boolean is an integer to Python
    if isinstance(value, float) and not fits(value, wanted) and not value.is_integer():
        return type_name(wanted)  # int() would cut it off
    if isinstance(value, dict | list) and not fits(value, wanted):
        return type_name(wanted)
    try:
        converted = definition.get("env_converter", lambda same: same)(value)
    except Exception:
        return type_name(wanted)
    return None if converted is None or fits(converted, wanted) else type_name(wanted)


def _unquoted(text: str) -> str:
    from lmcache.v1 import config

    return getattr(config, "_parse_quoted_string", lambda same: same)(text)


def _numbers(value: Any) -> list[float]:
    """The numbers in a setting: itself, or the items of a list."""
    values = value if isinstance(value, list) else [value]
    return [item for item in values if isinstance(item, int | float) and not isinstance(item, bool)]
