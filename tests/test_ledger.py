import json

from kvshare.ledger import Ledger


def test_ledger_writes_lines(tmp_path):
    Ledger(3, str(tmp_path / "run")).write("store", policy="p", keys=[1])
    line = json.loads((tmp_path / "run" / "events-3.jsonl").read_text())
    assert (line["op"], line["replica"], line["keys"]) == ("store", 3, [1])


def test_ledger_that_cannot_write_is_in_nobodys_way(tmp_path):
    Ledger(0, None).write("store")
    (tmp_path / "file").write_text("")
    Ledger(0, str(tmp_path / "file")).write("store")
    Ledger(0, "/dev/full/x").write("store")
