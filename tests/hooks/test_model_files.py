import os
import shutil
import time

import pytest

from kvshare.hooks.lmcache.model_files import fingerprint


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    for file in folder.iterdir():
        os.utime(file, (1000, 1000))
    return folder


def test_same_files_have_one_fingerprint(model, tmp_path):
    copy = shutil.copytree(model, tmp_path / "copy")  # keeps the times, as rsync -a does
    assert fingerprint(str(model), None, time.time()) == fingerprint(str(copy), None, time.time()) is not None


def test_checkpoint_written_over_another_is_another(model):
    before = fingerprint(str(model), None, time.time())
    (model / "model.safetensors").write_bytes(b"WEIGHTS")
    assert fingerprint(str(model), None, time.time() + 1) != before


def test_files_of_one_time_are_told_apart(model):
    """Container images are often built with the same time for all files."""
    before = fingerprint(str(model), None, time.time())
    (model / "model.safetensors").write_bytes(b"WEIGHTS")
    os.utime(model / "model.safetensors", (1000, 1000))
    assert fingerprint(str(model), None, time.time()) != before


def test_files_that_changed_while_the_engine_started_tell_nothing(model):
    (model / "model.safetensors").touch()
    assert fingerprint(str(model), None, time.time() - 60) is None


def test_blob_of_the_hub_is_its_content(tmp_path):
    """On two hosts a snapshot has the same blobs, but other times."""
    found = set()
    for host, mtime in (("a", 1000), ("b", 2000)):
        blobs, snapshot = tmp_path / host / "blobs", tmp_path / host / "snapshots" / "main"
        blobs.mkdir(parents=True)
        snapshot.mkdir(parents=True)
        (blobs / "0123abcd").write_bytes(b"weights")
        os.utime(blobs / "0123abcd", (mtime, mtime))
        (snapshot / "model.safetensors").symlink_to(blobs / "0123abcd")
        found.add(fingerprint(str(snapshot), None, time.time()))
    assert len(found) == 1


@pytest.mark.parametrize("name", ["no/such-model-anywhere", "s3://bucket/model"])
def test_weights_that_are_not_here_tell_nothing(name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert fingerprint(name, None, time.time()) is None
