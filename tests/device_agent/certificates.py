"""Certificates for tests, made by the openssl command where they are needed: they last two days."""

from __future__ import annotations

import subprocess
from pathlib import Path

NAMES = "subjectAltName=DNS:localhost,IP:127.0.0.1"
KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")


def openssl(folder: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)


def self_signed(folder: Path, name: str = "door") -> None:
    """``name.pem``, which signs itself, and ``name.key``."""
    written = ("-keyout", f"{name}.key", "-out", f"{name}.pem")
    openssl(folder, "req", "-x509", *KEY, "-days", "2", "-subj", f"/CN={name}", "-addext", NAMES, *written)


def authority(folder: Path, *signed: str) -> None:
    """``ca.pem`` with ``ca.key``, and of each of these names a ``.pem`` that it signed, with its ``.key``."""
    openssl(
        folder, "req", *KEY, "-subj", "/CN=test authority", "-x509", "-days", "2", "-keyout", "ca.key", "-out", "ca.pem"
    )
    (folder / "names").write_text(NAMES)
    for name in signed:
        openssl(folder, "req", *KEY, "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.csr")
        sign = ("x509", "-req", "-days", "2", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial")
        openssl(folder, *sign, "-in", f"{name}.csr", "-out", f"{name}.pem", "-extfile", "names")
