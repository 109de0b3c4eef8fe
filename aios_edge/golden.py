"""Golden samples: held-out inputs and what the models answered to them, so a device can check itself.

``golden.npz`` holds, for N samples: ``raw`` (the natural inputs as one JSON list in UTF-8 bytes; each entry a
string, or a list of two for pairs), ``input.<tensor>`` [N, …] padded to the longest sample, ``length`` [N] (true
length of each sample along axis 1), ``fp32.<output>`` and ``shipped.<output>`` [N, …], ``contract_sha256``, the digest
of contract.json, and ``manifest_sha256``, that of the manifest without its list of files. The last two tie contract,
manifest and samples together: altering any of them alone is found even when the manifest was hashed anew.

Outputs were recorded one sample at a time, trimmed to its own length, because dynamic quantization makes an
answer depend on what it was batched with.
"""

from __future__ import annotations

import ast
import io
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from aios_edge.errors import BundleRefused

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

RawInput = str | tuple[str, str]

#: Fewer samples let a device that answers wrongly now and then pass.
MIN_SAMPLES = 64
#: Arrays of golden.npz together, unpacked; a compressed file can claim any size, so it is asked before reading.
MAX_GOLDEN_BYTES = 256_000_000


@dataclass(frozen=True, kw_only=True)
class Golden:
    """The content of golden.npz; see the module's docstring for shapes."""

    raw: tuple[RawInput, ...]
    inputs: dict[str, NDArray[np.generic]]
    length: NDArray[np.int64]
    fp32: dict[str, NDArray[np.float32]]
    shipped: dict[str, NDArray[np.float32]]
    contract_sha256: str
    manifest_sha256: str

    def sample(self, index: int) -> dict[str, NDArray[np.generic]]:
        """Input tensors of one sample, batch axis kept, trimmed to its own length."""
        end = int(self.length[index])
        return {name: array[index : index + 1, :end] for name, array in self.inputs.items()}


def encode_golden(golden: Golden) -> bytes:
    """The bytes of golden.npz; reproducible: sorted arrays, and numpy writes a fixed time stamp."""
    import numpy as np

    arrays: dict[str, NDArray[np.generic]] = {
        "raw": np.frombuffer(msgspec.json.encode(golden.raw), dtype=np.uint8),
        "length": golden.length,
        "contract_sha256": np.frombuffer(golden.contract_sha256.encode(), dtype=np.uint8),
        "manifest_sha256": np.frombuffer(golden.manifest_sha256.encode(), dtype=np.uint8),
    }
    arrays |= {f"input.{name}": array for name, array in golden.inputs.items()}
    arrays |= {f"fp32.{name}": array for name, array in golden.fp32.items()}
    arrays |= {f"shipped.{name}": array for name, array in golden.shipped.items()}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **dict(sorted(arrays.items())))
    return buffer.getvalue()


@dataclass(frozen=True, kw_only=True)
class Seal:
    """What ties golden samples to contract and manifest: their sha256, and how many samples there are.

    ``manifest_sha256`` is None in samples that were written before manifests were sealed.
    """

    contract_sha256: str
    manifest_sha256: str | None
    count: int


def read_seal(path: Path) -> Seal:
    """Read only the seal of golden.npz, without numpy; raises :class:`BundleRefused` (``golden``) if it is not one."""
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > MAX_GOLDEN_BYTES:
                raise ValueError(f"more than {MAX_GOLDEN_BYTES} bytes unpacked")
            contract = _npy(archive.read("contract_sha256.npy"))[1].decode("ascii")
            sealed = "manifest_sha256.npy" in archive.namelist()
            manifest = _npy(archive.read("manifest_sha256.npy"))[1].decode("ascii") if sealed else None
            shape = _npy(archive.read("length.npy"))[0]
        return Seal(contract_sha256=contract, manifest_sha256=manifest, count=shape[0])
    except Exception as error:  # zipfile, zlib and the header raise many kinds for a damaged archive
        raise BundleRefused("golden", f"can't be read as golden samples ({error})", where=str(path)) from error


def _npy(data: bytes) -> tuple[tuple[int, ...], bytes]:
    """Shape and raw bytes of a .npy file (format 1.0: magic, version, u16 header length, a literal dict)."""
    if data[:8] != b"\x93NUMPY\x01\x00":
        raise ValueError("not a .npy array of format 1.0")
    end = 10 + int.from_bytes(data[8:10], "little")
    header = ast.literal_eval(data[10:end].decode("latin-1"))
    return header["shape"], data[end:]


def read_golden(path: Path) -> Golden:
    """Read golden.npz without ever unpickling; raises :class:`BundleRefused` (``golden``) if it is not one."""
    import numpy as np

    read_seal(path)  # refuses what is too large to unpack
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        raw = msgspec.json.decode(arrays.pop("raw").tobytes(), type=tuple[str | tuple[str, str], ...])
        contract_sha256 = arrays.pop("contract_sha256").tobytes().decode("ascii")
        manifest_sha256 = arrays.pop("manifest_sha256").tobytes().decode("ascii")
        length = arrays.pop("length").astype(np.int64)
    except Exception as error:  # numpy and zipfile raise many kinds for a damaged archive
        raise BundleRefused("golden", f"can't be read as golden samples ({error})", where=str(path)) from error

    def group(prefix: str) -> dict[str, NDArray[np.generic]]:
        return {name[len(prefix) :]: array for name, array in arrays.items() if name.startswith(prefix)}

    golden = Golden(
        raw=raw,
        inputs=group("input."),
        length=length,
        fp32=group("fp32."),  # type: ignore[arg-type]
        shipped=group("shipped."),  # type: ignore[arg-type]
        contract_sha256=contract_sha256,
        manifest_sha256=manifest_sha256,
    )
    counts = {len(golden.raw), len(length), *(len(array) for array in arrays.values())}
    if counts != {len(golden.raw)} or not golden.inputs or not golden.shipped:
        raise BundleRefused("golden", "its arrays don't agree on the number of samples", where=str(path))
    return golden
