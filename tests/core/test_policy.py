import subprocess
import sys

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from kvshare.core import policy

HASH = st.integers(min_value=-(2**63), max_value=2**64 - 1)
RUN = st.text("0123456789abcdef", min_size=16, max_size=16)
POLICY = st.builds(policy.policy_id, RUN, st.integers(0, 10**6))


TEXT = st.text("@+.-ab1", max_size=4)  # what could run into its neighbour
IDENTITY = st.tuples(HASH, TEXT.filter(bool), TEXT, st.integers(0, 3))  # chunk, policy, salt, rank


@given(IDENTITY, IDENTITY)
def test_keys_differ_as_what_they_are_of(one, other):
    assert (policy.fold(*one) == policy.fold(*other)) == (one == other)


@given(IDENTITY)
def test_folded_hash_is_unsigned_64_bit(identity):
    assert 0 <= policy.fold(*identity) < 2**64


@given(HASH)
def test_no_key_without_a_policy(chunk):
    with pytest.raises(ValueError, match="without a policy"):
        policy.fold(chunk, "")


@given(st.tuples(TEXT, TEXT, TEXT), st.tuples(TEXT, TEXT, TEXT))
def test_salts_differ_as_configuration_adapter_and_cache_salt(one, other):
    assert (policy.key_salt(*one) == policy.key_salt(*other)) == (one == other)


def test_no_two_runs_are_the_same():
    assert len({policy.new_run() for _ in range(1000)}) == 1000


def test_same_policy_gives_the_same_key_in_another_process():
    code = "from kvshare.core.policy import *; print(fold(12345, policy_id('0123456789abcdef', 7)))"
    keys = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, check=True, text=True
        ).stdout
        for seed in ("0", "1", "random")
    }
    assert len(keys) == 1


def test_private_policies_are_never_the_same():
    assert len({policy.private_policy() for _ in range(1000)}) == 1000


@given(st.text(min_size=1), HASH, POLICY)
def test_every_model_name_fits_into_an_lm_key(name, chunk, run):
    short = policy.key_model_name(name)
    key = f"{short}@128@127@{policy.fold(chunk, run):x}@float8_e4m3fn"
    assert "@" not in short
    assert len(key) <= 150


@given(st.text(), st.text())
def test_two_model_names_stay_two(one, other):
    assume(one != other)
    assert policy.key_model_name(one) != policy.key_model_name(other)


@given(st.text(), st.text(), st.text(), st.text())
def test_two_policies_never_share_a_salt(one, other, salt, another):
    assume((one, salt) != (other, another))
    assert policy.salt(one, salt) != policy.salt(other, another)


@given(st.text(), st.text())
def test_every_salt_is_one_that_lmcache_takes(name, salt):
    from lmcache.v1.distributed.api import ObjectKey

    ObjectKey(b"", "model", 0, cache_salt=policy.salt(name, salt))
