"""Check that an upstream function is one that kvshare knows: by version, by parameters, or by source.

Every check looks at the project's version first. That version must be in the table of ``core.versions``.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import textwrap
from collections.abc import Mapping
from typing import Any

from packaging.specifiers import SpecifierSet

from kvshare.core import versions

Digests = Mapping[str, str]
"""Maps the digest of a function's source to the versions with that source, e.g. {"5f2c07d9be41": "0.5.3, 0.5.6"}."""


class UpstreamChanged(RuntimeError):
    """kvshare does not know the installed version of a function that it wraps or replaces."""


def version(project: str) -> None:
    """Raise UpstreamChanged unless the installed version of ``project`` is in the table."""
    found, known = versions.installed(project), versions.known(project)
    sets = [SpecifierSet(one) for one in known.split(", ") if one]
    if found == "unknown" or not any(one.contains(found, prereleases=True) for one in sets):
        raise UpstreamChanged(f"kvshare knows {project} {known}, and not {found}: install one of those")


def parameters(module: Any, path: str, *names: str) -> None:
    """Raise UpstreamChanged unless ``module.path`` exists and takes parameters of these names."""
    takes = inspect.signature(_find(module, path)).parameters
    if missing := [name for name in names if name not in takes]:
        raise _changed(module, path, f"lacks {', '.join(missing)}", versions.known(_project(module)))


def source(module: Any, path: str, digests: Digests) -> None:
    """Raise UpstreamChanged unless the digest of the source of ``module.path`` is in ``digests``."""
    target = _find(module, path)
    owner, known = inspect.getmodule(target) or module, ", ".join(digests.values())  # a method may be inherited
    try:
        found = digest(target)
    except (OSError, TypeError) as error:
        raise _changed(owner, path, f"has no source to compare ({error})", known) from error
    if found not in digests:
        raise _changed(owner, path, f"has a source that kvshare does not know (digest {found})", known)


def digest(target: Any) -> str:
    """Digest of the code of a function or class, without its formatting, comments and docstrings."""
    return digest_tree(ast.parse(textwrap.dedent(inspect.getsource(target))).body[0])


def digest_tree(tree: ast.AST) -> str:
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and ast.get_docstring(node) is not None
        ):
            del node.body[0]
    code = ast.dump(tree).replace(", type_params=[]", "")  # only in Python 3.12 and later
    return hashlib.sha256(code.encode()).hexdigest()[:12]


def _find(module: Any, path: str) -> Any:
    version(_project(module))
    try:
        return functools.reduce(getattr, path.split("."), module)
    except AttributeError:
        raise _changed(module, path, "is gone", versions.known(_project(module))) from None


def _project(module: Any) -> str:
    return module.__name__.split(".")[0].partition("_cu1")[0].replace("_", "-")  # nixl_cu12 belongs to nixl


def _changed(module: Any, path: str, what: str, known: str) -> UpstreamChanged:
    project = _project(module)
    return UpstreamChanged(
        f"{module.__name__}: {path} {what} in {project} {versions.installed(project)}; "
        f"kvshare knows it from {project} {known}: install one of those"
    )
