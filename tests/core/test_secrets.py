import pytest

from kvshare.core.secrets import is_secret, redacted

SHOWN = {
    "redis://me:hidden@host:6379/0": "redis://***@host:6379/0",
    "rediss://:hid/den@host:1 does not answer": "rediss://***@host:1 does not answer",
    "'redis://hidden@a:1,b:2'": "'redis://***@a:1,b:2'",
    "me:hidden@127.0.0.1:1": "***@127.0.0.1:1",
    "http://host/x?a=1&password=hidden&b=2": "http://host/x?a=1&password=***&b=2",
    "lm://localhost:65432": "lm://localhost:65432",
    "/models/qwen@7b, port 1: taken": "/models/qwen@7b, port 1: taken",
}


@pytest.mark.parametrize("text", SHOWN)
def test_no_password_is_shown(text):
    assert redacted(text) == SHOWN[text]


def test_secret_variables():
    assert is_secret("LMCACHE_REMOTE_URL", "redis://me:hidden@host:1")
    assert is_secret("LMCACHE_RESP_PASSWORD", "x")
    assert not is_secret("LMCACHE_REMOTE_URL", "lm://localhost:65432")
