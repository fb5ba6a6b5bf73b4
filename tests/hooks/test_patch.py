"""What kvshare wraps and replaces: every hook on the installed packages, and what happens where they are others."""

import ast
import importlib
import json
import linecache
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from packaging.specifiers import SpecifierSet

import kvshare.hooks
from kvshare.core import versions
from kvshare.hooks import check, imports
from kvshare.hooks.patch import PATCHES, UpstreamChanged, optional, replace, wrap

INSTALL = """
import importlib, json, sys
from kvshare import vllm_plugin
from kvshare.hooks import check, imports, patch

modules, checked = [], []
def recording(verb, really):
    def call(module, path, *known_by):
        really(module, path, *known_by)
        target = check._find(module, path)
        owner = verb == "source" and sys.modules[target.__module__] or module
        digest = check.digest(target) if verb == "source" else None
        known_by = known_by[0] if verb == "source" else known_by
        checked.append([f"{module.__name__}.{path}", check._project(owner), digest, known_by])
    return call
check.parameters, check.source = recording("parameters", check.parameters), recording("source", check.source)
really = imports.when_imported
def when_imported(module, hook):
    modules.append(module)
    really(module, hook)
vllm_plugin.when_imported = imports.when_imported = when_imported

vllm_plugin.register()
from kvshare import verl_plugin
for module in modules:
    if not module.startswith("lmcache_ascend"):  # tests/npu
        importlib.import_module(module)
from kvshare.hooks.verl import cpu_weight_sync, rollout_server

patches = [[f"{p.module.__name__}.{p.path}", list(p.known_by)] for p in patch.PATCHES]
json.dump({"checked": checked, "patches": patches}, open(sys.argv[1], "w"))
"""

CHECKED = {"nixl_cu12._bindings.nixlAgent": "nixl_cu12._api.nixl_agent.__init__"}
"""What is compiled is known by what calls it."""


@pytest.fixture(scope="module")
def hooks(tmp_path_factory):
    """All hooks that a run on CPU has, installed in a process of their own; logs of errors are none."""
    out = tmp_path_factory.mktemp("hooks") / "hooks.json"
    environment = {**os.environ, "VERL_PLATFORM": "cpu", "VERL_ENGINE_DEVICE": "cuda", "VLLM_LOGGING_LEVEL": "ERROR"}
    done = subprocess.run([sys.executable, "-c", INSTALL, out], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "kvshare knows" not in done.stderr
    return json.loads(out.read_text())


def test_all_that_is_patched_was_checked(hooks):
    checked = {name for name, *_ in hooks["checked"]}
    for name, known_by in hooks["patches"]:
        assert known_by, name
        assert CHECKED.get(name, name) in checked
    print()
    for name, project, digest, known_by in sorted(hooks["checked"]):
        if digest:
            print(f"{name}: source as in {project} {', '.join(known_by.values())}")
        else:
            print(f"{name}: takes {', '.join(known_by)}; {project} {of_table(name, project)}")


def of_table(name, project):
    """Versions that a hook may meet; the multi-process connector's are for the mp backend only."""
    if not any(part in name for part in ("lmcache_mp_", "multi_process", "multiprocess")):
        return versions.known(project)
    fits = [fit for of_device in versions.FITS.values() for fit in of_device if "mp" in fit.backends]
    return ", ".join(sorted({{**fit.packages, **fit.backends["mp"]}[project] for fit in fits}))


def test_sources_are_of_the_versions_that_are_named(hooks):
    replaced = [(name, *rest) for name, *rest in hooks["checked"] if rest[1]]
    assert len(replaced) >= 12
    for name, project, digest, known_by in replaced:
        version = versions.installed(project).partition("+")[0]
        assert version in known_by[digest].split(", "), name
        table = [SpecifierSet(one) for one in versions.known(project).split(", ")]
        for known in ", ".join(known_by.values()).split(", "):
            assert any(one.contains(known) for one in table), f"{name}: {project} {known} is not in core/versions.py"


def functions():
    for file in sorted(Path(kvshare.hooks.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield file, node


def test_what_replaces_does_not_pass_for_a_wrapper():
    for file, node in functions():
        if [arg.arg for arg in node.args.args[:1]] == ["wrapped"]:
            uses = [n for n in ast.walk(node) if isinstance(n, ast.Name) and n.id == "wrapped"]
            assert uses, f"{file.name}: {node.name} never calls what it wraps: replace() it"


def test_nothing_goes_around():
    for file, node in functions():
        if node.name.startswith("patch_"):
            for n in ast.walk(node):
                target = n.targets[0] if isinstance(n, ast.Assign) else None
                assert not isinstance(target, ast.Attribute), f"{file.name}: {node.name} assigns {ast.unparse(target)}"


# -- upstream that is not what it was ---------------------------------------------------------

SOURCE = '''
class Cache:
    """Upstream's."""

    def reset(self, what):  # all of it
        return f"{what} is {'reset'}"

    def other(self):
        return 1
'''
REFORMATTED = '''
class Cache:
    def reset(
        self,
        what,
    ):
        """Now with a docstring."""
        return f'{what} is {"reset"}'
'''


@pytest.fixture
def upstream(tmp_path, monkeypatch):
    """Makes a module ``lmcache_made.cache`` of source; "lmcache-made" is in the table, and installed."""
    monkeypatch.setattr(versions, "known", lambda project: "==1.0.*, >=1.2,<1.3")
    monkeypatch.setattr(versions, "installed", lambda project: upstream.version)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "lmcache_made").mkdir()
    (tmp_path / "lmcache_made" / "__init__.py").touch()

    def upstream(source=SOURCE) -> ModuleType:
        (tmp_path / "lmcache_made" / "cache.py").write_text(source)
        for name in [name for name in sys.modules if name.startswith("lmcache_made")]:
            del sys.modules[name]
        importlib.invalidate_caches()
        return importlib.import_module("lmcache_made.cache")

    upstream.version = "1.2.1"
    yield upstream
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, imports._Refused)]
    for name in [name for name in sys.modules if name.startswith("lmcache_made")]:
        del sys.modules[name]


def around(wrapped, instance, args, kwargs):
    return wrapped(*args, **kwargs)


def test_digest_is_of_the_code(upstream, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    digests = []
    for source in (SOURCE, REFORMATTED, SOURCE.replace("is {", "was {")):
        linecache.clearcache()
        digests.append(check.digest(upstream(source).Cache.reset))
    assert digests[0] == digests[1] != digests[2]


def test_another_body_is_not_replaced(upstream):
    module = upstream()
    with pytest.raises(UpstreamChanged) as error:
        replace(module, "Cache.reset", None, {"0123456789ab": "1.0.0, 1.2.0"})
    digest = check.digest(module.Cache.reset)
    assert str(error.value) == (
        f"lmcache_made.cache: Cache.reset has a source that kvshare does not know (digest {digest}) in "
        "lmcache-made 1.2.1; kvshare knows it from lmcache-made 1.0.0, 1.2.0: install one of those"
    )
    replace(module, "Cache.reset", lambda self: "ours", {digest: "1.2.1"})
    assert module.Cache().reset() == "ours"


def test_a_parameter_that_is_gone_is_not_wrapped(upstream):
    module = upstream()
    with pytest.raises(UpstreamChanged, match=r"Cache.reset lacks connector in lmcache-made 1.2.1; .* ==1.0.\*, >="):
        wrap(module, "Cache.reset", around, "what", "connector")
    with pytest.raises(UpstreamChanged, match=r"Cache.clear is gone in lmcache-made 1.2.1"):
        wrap(module, "Cache.clear", around, "what")
    with pytest.raises(TypeError, match="parameter"):
        wrap(module, "Cache.reset", around)


def test_without_source_nothing_is_replaced(upstream):
    module = upstream()
    exec("def compiled(): pass", vars(module))
    for path in ("compiled", "Cache.__new__"):
        with pytest.raises(UpstreamChanged, match=f"{path} has no source to compare"):
            replace(module, path, None, {"0123456789ab": "1.0.0"})


@pytest.mark.parametrize("version", ["1.1.0", "1.3.0", "unknown"])
def test_other_versions_are_refused_whatever_they_look_like(upstream, version):
    module, upstream.version = upstream(), version
    for patch in (
        lambda: wrap(module, "Cache.reset", around, "what"),
        lambda: replace(module, "Cache.reset", None, {check.digest(module.Cache.reset): "1.2.1"}),
    ):
        with pytest.raises(UpstreamChanged, match=f"lmcache-made .*, and not {version}: install one of those"):
            patch()


def test_an_optional_hook_leaves_all_as_it_is(upstream, caplog):
    module = upstream()
    before, patches = dict(vars(module.Cache)), list(PATCHES)

    @optional("Nothing is counted")
    def hook(module):
        wrap(module, "Cache.other", around, "self")
        wrap(module, "Cache.__str__", around, "self")  # inherited
        wrap(module, "Cache.reset", around, "gone")

    with caplog.at_level(logging.ERROR):
        hook(module)
    assert dict(vars(module.Cache)) == before
    assert patches == PATCHES
    (record,) = caplog.records
    assert record.message.startswith("Nothing is counted: lmcache_made.cache: Cache.reset lacks gone")


def test_a_refused_module_stays_refused(upstream, monkeypatch):
    """Else who catches the error and imports again has a module without its hooks."""
    upstream()
    del sys.modules["lmcache_made.cache"]
    hooks = ModuleType("kvshare.hooks.made")
    hooks.patch_cache = lambda module: wrap(module, "Cache.reset", around, "gone")
    monkeypatch.setitem(sys.modules, hooks.__name__, hooks)
    imports.when_imported("lmcache_made.cache", "made:patch_cache")
    for _ in range(2):
        with pytest.raises(UpstreamChanged, match="lacks gone"):
            importlib.import_module("lmcache_made.cache")
