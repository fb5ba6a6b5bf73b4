"""Keeps passwords out of everything kvshare prints or passes on."""

from __future__ import annotations

import re

HIDDEN = "***"
NAME = re.compile("PASSWORD|PASSWD|SECRET|TOKEN|API_KEY|ACCESS_KEY", re.IGNORECASE)
"""Names of environment variables whose whole value is secret, e.g. LMCACHE_RESP_PASSWORD."""

_PATTERNS = (
    re.compile(r"(?<=://)[^\s'\"]*@"),  # scheme://user:password@host; a password may contain / and @
    re.compile(r"[^\s'\"/=@]*:[^\s'\"/@]+@(?=[\w\[])"),  # the same without a scheme
    re.compile(r"(?<=[?&])((?:password|passwd|token|secret|auth|api_key|access_key)=)[^\s&'\"]+", re.IGNORECASE),
)


def redacted(text: str) -> str:
    """``text`` with the user and password of every URL replaced by ``***``."""
    credentials, bare, query = _PATTERNS
    text = credentials.sub(f"{HIDDEN}@", text)
    text = bare.sub(f"{HIDDEN}@", text)
    return query.sub(rf"\1{HIDDEN}", text)


def is_secret(name: str, value: str) -> bool:
    """Whether an environment variable holds a password, by itself or in a URL."""
    return bool(NAME.search(name)) or redacted(value) != value
