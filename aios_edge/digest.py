"""Digests of files and of JSON documents."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec


def sha256_file(path: Path) -> str:
    """sha256 of a file's content, in hex, read in bounded memory."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sha256_bytes(data: bytes) -> str:
    """sha256 of bytes, in hex."""
    return hashlib.sha256(data).hexdigest()


def canonical_json(document: object) -> bytes:
    """The one byte form of a JSON-able value: keys sorted, no white space, UTF-8."""
    return msgspec.json.encode(msgspec.to_builtins(document), order="sorted")
