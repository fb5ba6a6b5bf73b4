"""Takes the policy out of LMCache's keys, to see that tests notice."""

from pathlib import Path

PLUGIN = """
def register():
    import kvshare.core.policy as p
    p.fold = lambda chunk_hash, *identity: chunk_hash
    p.salt = lambda policy, cache_salt: ""
"""


def plugin_path(folder: Path, code: str = PLUGIN) -> str:
    """A folder for PYTHONPATH with a vLLM plugin, by default one under which all policies share their keys."""
    plugin = folder / "plugin"
    info = plugin / "plain_keys-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plain-keys\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\nplain = plain_keys_plugin:register\n")
    (plugin / "plain_keys_plugin.py").write_text(code)
    return str(plugin)
