"""Reads LMCache's settings from file and environment, and finds mistakes in them before a run starts.

LMCache itself is less strict: it logs a warning for an unknown key, turns a bad value into None, and fails with a
traceback if the file is missing or not YAML.
"""

from __future__ import annotations

import types
import typing
from pathlib import Path
from typing import Any

import yaml

from kvshare.core.errors import UserError

NOT_SETTINGS = {"LMCACHE_CONFIG_FILE", "LMCACHE_LOG_LEVEL", "LMCACHE_TRACK_USAGE", "LMCACHE_FORCE_SKIP_SAVE"}
"""Environment variables of LMCache that do not correspond to a key of the config file."""


def path(environ: typing.Mapping[str, str]) -> str | None:
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
        raise UserError(f"LMCache config {file} does not exist: set LMCache_CONFIG_FILE to one that does")
    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"LMCache config {file}{where} is not YAML: correct it, or start from config/") from None
    if not isinstance(settings, dict):
        raise UserError(f"LMCache config {file} is not a mapping of keys to values: start from config/")
    return settings


def mistakes(settings: dict[str, Any], definitions: dict[str, dict[str, Any]], file: str) -> list[str]:
    """One line for each key that LMCache does not know and each value of the wrong type.

    Args:
        settings: content of the config file.
        definitions: as ``definitions()`` returns them.
        file: name of the config file, for the messages.
    """
    out = []
    for key, value in settings.items():
        if key not in definitions:
            near = _near(str(key), definitions)
            out.append(f"{file}: LMCache knows no key {key}{near}: remove or correct it")
        elif (
            value is not None
            and not fits(value, definitions[key]["type"])
            and not _is_list_in_text(value, definitions[key])
        ):
            out.append(f"{file}: {key} is {value!r}, must be {type_name(definitions[key]['type'])}: correct it")
    return out


def environment_mistakes(environ: typing.Mapping[str, str], definitions: dict[str, dict[str, Any]]) -> list[str]:
    """One line for each ``LMCACHE_<KEY>`` in ``environ`` whose value has the wrong type."""
    out = []
    for name, text in environ.items():
        if not name.startswith("LMCACHE_") or name in NOT_SETTINGS:
            continue
        definition = definitions.get(name.removeprefix("LMCACHE_").lower())
        if definition is None:
            continue  # other parts of LMCache read further variables
        wanted = type_name(definition["type"])
        if wanted.startswith("a list") and text.strip().startswith("["):
            out.append(f"{name}={text}: LMCache ignores a list in brackets: write it comma-separated without them")
            continue
        try:
            definition["env_converter"](text)
        except Exception:
            out.append(f"{name}={text!r} must be {wanted}: correct or unset it")
    return out


def effective(path: str | None) -> Any:
    """LMCache's config object, built from a file and the environment. The environment takes precedence.

    Raises:
        UserError: LMCache rejects the combination.
    """
    from lmcache.v1.config import LMCacheEngineConfig

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
        return config
    except Exception as error:
        raise UserError(f"LMCache refuses {path}: {str(error).splitlines()[0] if str(error) else error!r}") from None


def definitions() -> dict[str, dict[str, Any]]:
    """Keys of the installed LMCache, with ``type`` and ``env_converter`` of each; aliases included."""
    from lmcache.v1 import config

    known = dict(config._CONFIG_DEFINITIONS)
    for alias, name in getattr(config, "_CONFIG_ALIASES", {}).items():
        known.setdefault(alias, known.get(name, {"type": object}))
    return known


def fits(value: Any, wanted: Any) -> bool:
    """Whether a YAML value matches a type annotation such as Optional[list[int]]."""
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


def _is_list_in_text(value: Any, definition: dict[str, Any]) -> bool:
    """Whether ``value`` is a list written as comma-separated text, which LMCache accepts."""
    if not isinstance(value, str) or not type_name(definition["type"]).startswith("a list"):
        return False
    try:
        return bool(definition["env_converter"](value))
    except ValueError:
        return False


def type_name(wanted: Any) -> str:
    """A type annotation in words, e.g. "a list of integers"."""
    origin = typing.get_origin(wanted)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_name(t) for t in typing.get_args(wanted) if t is not type(None))
    if origin is list:
        return f"a list of {type_name(typing.get_args(wanted)[0])}s"
    names = {int: "integer", float: "number", bool: "true or false", str: "text", dict: "a mapping"}
    return names.get(wanted, str(wanted))


def _near(key: str, definitions: dict[str, Any]) -> str:
    import difflib

    close = difflib.get_close_matches(key, definitions, n=1)
    return f" (did you mean {close[0]}?)" if close else ""
