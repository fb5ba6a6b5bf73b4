from hypothesis import given
from hypothesis import strategies as st

from kvshare.routing import digests
from kvshare.routing.digests import Conversations, before_images, chunk_digests


def test_one_digest_a_whole_chunk():
    assert chunk_digests([1] * 255, 256) == []
    assert chunk_digests([1] * 256, 256) == chunk_digests([1] * 256 + [2] * 255, 256)
    assert chunk_digests([1] * 256, 256) != chunk_digests([2] + [1] * 255, 256)


def test_prompts_share_the_digests_of_what_they_share():
    one, other = chunk_digests([1] * 512 + [2] * 256, 256), chunk_digests([1] * 512 + [3] * 256, 256)
    assert one[:2] == other[:2]
    assert one[2] != other[2]


@given(st.lists(st.tuples(st.integers(0, 600), st.booleans()), min_size=1, max_size=5), st.integers(0, 400))
def test_turns_have_the_digests_of_their_prompts(turns, shorter):
    """Also after an agent loop has replaced or dropped earlier tokens."""
    conversations, ids = Conversations(64), []
    for number, (more, edits) in enumerate(turns):
        ids = [*([token + 1 for token in ids] if edits else ids), *[number] * more]
        assert conversations.digests("talk", ids) == chunk_digests(ids, 64)
    assert conversations.digests("talk", ids[:shorter]) == chunk_digests(ids[:shorter], 64)


def test_only_what_a_turn_adds_is_hashed(monkeypatch):
    conversations, hashed, extend = Conversations(64), [], digests._extend
    monkeypatch.setattr(digests, "_extend", lambda d, ids, size: hashed.append(len(ids)) or extend(d, ids, size))
    for tokens in (1000, 1500):
        conversations.digests("talk", [7] * tokens)
    assert hashed == [1000, 1500 - 1000 // 64 * 64]


def test_prompt_is_cut_before_the_first_image():
    assert before_images([1, 2, 9, 9, 3, 8], (8, 9)) == [1, 2]
    assert before_images([1, 2, 3], (8, 9)) == [1, 2, 3]
