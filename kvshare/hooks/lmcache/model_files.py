"""Fingerprint a model's files, so that engines with the same initial weights get the same policy."""

from __future__ import annotations

import hashlib
from pathlib import Path

SAMPLES, SAMPLE = 64, 4096  # per file: the number of samples, and the bytes in each


def fingerprint(model: str, revision: str | None, before: float) -> str | None:
    """Identity of a model's files. It is the same on every host with the same files.

    For a file in the Hugging Face cache, it covers the name of the blob, which is a digest of the content. For any
    other file, it covers name, size, modification time and samples of the content. The samples are there because
    container images give all files the same time. So an overwritten checkpoint gets a new fingerprint.

    Args:
        model: folder, or name on the hub; then the files must be in the local cache.
        revision: revision on the hub.
        before: Unix time of the engine's start.

    Returns:
        None if the files cannot be read, or if one changed after ``before``: the engine may have read either version.
    """
    try:
        files = [_identity(path, before) for path in sorted(_folder(model, revision).iterdir()) if path.is_file()]
    except (OSError, ValueError):
        return None
    return f"weights-{hashlib.sha256(repr(files).encode()).hexdigest()[:16]}" if files else None


def _folder(model: str, revision: str | None) -> Path:
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model, revision=revision, local_files_only=True))


def _identity(path: Path, before: float) -> tuple[str | int, ...]:
    target = path.resolve()
    if target.parent.name == "blobs":
        return path.name, target.name
    stat = target.stat()
    if stat.st_mtime > before:
        raise ValueError(f"{path} changed after the engine started")
    return path.name, stat.st_size, stat.st_mtime_ns, _sample(target, stat.st_size)


def _sample(path: Path, size: int) -> str:
    """Digest of ``SAMPLES`` evenly spaced pieces of a file, ``SAMPLE`` bytes each."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for i in range(SAMPLES):
            file.seek(i * size // SAMPLES)
            digest.update(file.read(SAMPLE))
    return digest.hexdigest()
