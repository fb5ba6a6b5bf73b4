"""What tells the weights of two engines apart before either was updated: their files."""

from __future__ import annotations

import hashlib
from pathlib import Path

SAMPLES, SAMPLE = 64, 4096  # of a file: how many, of how many bytes


def fingerprint(model: str, revision: str | None, before: float) -> str | None:
    """Identity of a model's files, the same on every host that holds the same ones.

    Names, sizes, modification times and samples of the content (container images give all files one
    time); for a file of the Hugging Face cache the name of its blob, which is a digest of its
    content. A checkpoint written over another is thus a different one.

    Args:
        model: folder, or name on the hub (then its files must be in the local cache).
        revision: on the hub.
        before: Unix time; None is returned if a file changed after it, as nobody can tell then
            whether the old or the new one was loaded.
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
        raise ValueError(f"{path} changed after the weights were read")
    return path.name, stat.st_size, stat.st_mtime_ns, _sample(target, stat.st_size)


def _sample(path: Path, size: int) -> str:
    """A digest of a file's content at ``SAMPLES`` places, evenly spread."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for i in range(SAMPLES):
            file.seek(i * size // SAMPLES)
            digest.update(file.read(SAMPLE))
    return digest.hexdigest()
