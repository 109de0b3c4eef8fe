"""Which NVIDIA GPU is here, asked of the driver's own library: an engine is good for one kind of GPU only.

``libcuda.so.1`` comes with the driver, on a Jetson too, and nothing else of CUDA is needed to ask it.
"""

from __future__ import annotations

import ctypes
from typing import Any

import msgspec

_LIBRARY = "libcuda.so.1"
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # CUdevice_attribute
_NAME_BYTES = 128


class Gpu(msgspec.Struct, frozen=True, kw_only=True):
    """A GPU by the driver's words; ``compute_capability`` as ``8.7``."""

    name: str
    compute_capability: str


class NoGpu(msgspec.Struct, frozen=True, kw_only=True):
    """Why there is none."""

    reason: str


def find_gpu(ordinal: int = 0, library: Any = None) -> Gpu | NoGpu:
    """The GPU that CUDA numbers ``ordinal``. ``library``: an opened ``libcuda.so.1`` (default: this machine's)."""
    if library is None:
        try:
            library = ctypes.CDLL(_LIBRARY)
        except OSError as error:
            return NoGpu(reason=f"no NVIDIA driver: {error}")
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(_NAME_BYTES)
    for call, arguments in (
        ("cuInit", (0,)),
        ("cuDeviceGet", (ctypes.byref(device), ordinal)),
        ("cuDeviceGetName", (name, _NAME_BYTES, device)),
        ("cuDeviceGetAttribute", (ctypes.byref(major), _CAPABILITY_MAJOR, device)),
        ("cuDeviceGetAttribute", (ctypes.byref(minor), _CAPABILITY_MINOR, device)),
    ):
        if (code := getattr(library, call)(*arguments)) != 0:
            return NoGpu(reason=f"the NVIDIA driver has no GPU {ordinal} for us: {call} answers {code}")
    return Gpu(name=name.value.decode(errors="replace"), compute_capability=f"{major.value}.{minor.value}")
