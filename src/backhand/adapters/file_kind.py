"""What a file really is, told by its first bytes."""

from __future__ import annotations

_MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "a git-lfs pointer (run `git lfs pull`, or download the file itself)"),
    (b"PK\x03\x04", "a zip archive, perhaps from torch.save"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"BZh", "a bzip2 archive"),
    (b"\xfd7zXZ\x00", "an xz archive"),
    (b"GGUF", "a GGUF file"),
    (b"\x89HDF", "an HDF5 file"),
    (b"%PDF", "a PDF document"),
    (b"\x89PNG", "a picture"),
    (b"\x93NUMPY", "a NumPy array"),
)


def kind_of(head: bytes) -> str | None:
    """The kind of file that begins with `head` (a few hundred bytes), if it is one of those often mistaken for another.

    Returns:
        a noun phrase for an error message, or None when nothing is recognised.
    """
    if not head:
        return "an empty file"
    if head[4:9] == b"\0\0\0\0{":
        # The length of a safetensors header and its first brace; the length may look like anything, 640 like a pickle.
        return None
    for magic, kind in _MAGIC:
        if head.startswith(magic):
            return kind
    if len(head) > 1 and head[0] == 0x80 and head[1] in range(2, 6):
        return "a Python pickle, which could run code when opened"
    if head.lstrip()[:14].lower().startswith((b"<!doctype html", b"<html", b"<head", b"<?xml")):
        return "an HTML page, perhaps an error or login page of the server it came from"
    return None
