"""The two messages of LMCache's ``lm://`` protocol (lmcache/v1/protocol.py).

Written out here because importing LMCache takes ten seconds, and 300 MB for torch.
"""

from __future__ import annotations

import struct

REQUEST = struct.Struct("9i150s")  # command, length, format, dtype, location, 4 of shape, key
REPLY = struct.Struct("9i")  # code, length, format, dtype, 4 of shape, location
PUT, GET, EXIST, HEALTH = 1, 2, 3, 5
SUCCESS, FAIL = 200, 400
NO_DATA = (0, 1, 2, 0, 0, 0, 0, 0)  # the rest of a reply without data, as LMCache's server fills it

HEALTH_REQUEST = REQUEST.pack(HEALTH, 0, 1, 2, 0, 0, 0, 0, 0, b"kvshare@1@0@0@half".ljust(150))
"""Asks an ``lm://`` server whether it is healthy."""
