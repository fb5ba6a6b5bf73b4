"""What is not stored because a load has failed, or may have; stand-ins for LMCache's and vLLM's objects.

tests/hooks/test_live_faults.py has it on live engines.
"""

from types import SimpleNamespace

import pytest
import torch

from kvshare.core import policy
from kvshare.hooks.lmcache import failed_loads, generated

BLOCK = 16


def request(*blocks, loads=False):
    slots = torch.cat([torch.arange(block * BLOCK, (block + 1) * BLOCK) for block in blocks])
    return SimpleNamespace(
        slot_mapping=slots,
        load_spec=SimpleNamespace(can_load=loads),
        save_spec=SimpleNamespace(can_save=True),
    )


@pytest.mark.parametrize(("failed", "stored"), [(set(), [True] * 3), ({2}, [False, False, True])])
def test_requests_with_blocks_that_were_not_loaded_store_nothing(monkeypatch, failed, stored):
    monkeypatch.setattr(failed_loads, "_of_all_ranks", lambda blocks: blocks)
    requests = [request(1, 2, 3, loads=True), request(1, 2, 4), request(5, 6)]  # the second shares the first's prompt
    parent = SimpleNamespace(_get_connector_metadata=lambda: SimpleNamespace(requests=requests))
    connector = SimpleNamespace(_parent=parent, _invalid_block_ids=failed, _block_size=BLOCK)
    calls = []
    failed_loads._wait_for_save(lambda: calls.append("stored"), connector, (), {})
    assert calls == ["stored"]
    assert [each.save_spec.can_save for each in requests] == stored


@pytest.mark.parametrize(
    ("status", "generated_tokens", "preemptions", "wanted"),
    [
        ("FINISHED_STOPPED", 1, 0, True),
        ("FINISHED_ABORTED", 5, 0, True),
        ("FINISHED_ABORTED", 0, 0, False),
        ("FINISHED_ABORTED", 5, 1, False),
    ],
)
def test_an_aborted_request_is_stored_once_its_load_is_known_to_have_arrived(
    monkeypatch, status, generated_tokens, preemptions, wanted
):
    monkeypatch.setattr(generated, "config_of", lambda request, key: policy.ALWAYS)
    ended = SimpleNamespace(
        status=SimpleNamespace(name=status), num_output_tokens=generated_tokens, num_preemptions=preemptions
    )
    assert generated._wanted(ended) == wanted
