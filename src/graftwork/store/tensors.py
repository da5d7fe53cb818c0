"""adapter.safetensors: writing it in one copy, and reading it, trusting nothing in it.

The format: 8 bytes n, little-endian; n bytes of JSON, name -> {dtype, shape, data_offsets}; the numbers, which the offsets
tile. The file is read once, into memory that stays: its tensors are views, and nothing is copied.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.errors import GraftError
from .atomic import TENSORS, hidden_tensors
from .digest import Digest
from .finite import finite

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "BOOL": torch.bool,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
# bytes: where torch's own allocator begins a tensor. Kernels round otherwise on numbers that lie elsewhere
ALIGNED = 64


def written(tensors: dict[str, Tensor]) -> bytes:
    """The file of these tensors, each contiguous and on the CPU, of a dtype in NAMES: what `safetensors.torch.save` gives, which
    takes several times as long for small tensors. The widest numbers come first, so that all are aligned."""
    header: dict[str, dict[str, Any]] = {}
    pieces: list[Any] = []
    end = 0
    for name in sorted(tensors, key=lambda name: (-tensors[name].itemsize, name)):
        t = tensors[name]
        header[name] = {"dtype": NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [end, end + t.nbytes]}
        pieces.append(t.view(-1).view(torch.uint8).numpy())
        end += t.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *pieces])


@contextmanager
def reading(folder: Path, digest: str, asked: str) -> Iterator[dict[str, Tensor]]:
    """The tensors whose bytes have this hash: read once, so that what is checked is what is used.

    The hash is taken while the block runs, which may look at the tensors but write into none. GraftError at its end, in the
    place of any other, where the bytes have another hash.
    """
    asked = f"{asked}: {TENSORS}"
    data = _file(folder, digest, asked)
    hashed = Digest(data)
    try:
        try:
            tensors, whole = _views(data, *_header(data))
        except ValueError as error:
            raise GraftError(asked, str(error), "restore the file") from error
        yield _checked(tensors, whole, asked)
    finally:
        if hashed.hex() != digest:
            raise GraftError(asked, _fault(data), "restore the file") from None


def _file(folder: Path, digest: str, asked: str) -> memoryview:
    """The bytes of the file; where a save was cut off between its renames, of that one of two which has this hash."""
    found = []
    for path in (folder / TENSORS, hidden_tensors(folder, digest)):
        try:
            found.append(_bytes(path))
        except FileNotFoundError:
            continue
        except OSError as error:
            raise GraftError(asked, f"{path.name}: {error.strerror}", "make it readable") from error
    if not found:
        raise GraftError(asked, "missing", "restore the file")
    return next((data for data in found[:-1] if Digest(data).hex() == digest), found[-1])


def _fault(data: memoryview) -> str:
    """What is wrong with bytes of another hash."""
    try:
        _header(data)
    except ValueError as error:
        return str(error)
    return "altered: its bytes are not those that adapter.json was written with"


def _bytes(path: Path) -> memoryview:
    """The whole file, in a buffer of its own and so that the numbers begin at an aligned address."""
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        buffer = bytearray(size + ALIGNED)
        numbers = 8 + int.from_bytes(file.read(8), "little")
        start = -(torch.frombuffer(buffer, dtype=torch.uint8).data_ptr() + numbers) % ALIGNED
        data = memoryview(buffer)[start : start + size]
        file.seek(0)
        done = 0
        while done < size and (count := file.readinto(data[done:])):
            done += count
    return data[:done]


def _header(data: memoryview) -> tuple[dict[str, Any], int]:
    """The header, and where the numbers begin. ValueError where the frame does not fit the file."""
    if len(data) < 8:
        raise ValueError(f"truncated: {len(data)} bytes")
    start = 8 + int.from_bytes(data[:8], "little")
    if start > len(data):
        raise ValueError(f"truncated: its header needs {start - 8:,} bytes, the file has {len(data):,}")
    try:
        header = json.loads(bytes(data[8:start]))
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        raise ValueError("damaged: its header cannot be read") from None
    size = len(data) - start
    if size != end:
        kind = "truncated" if size < end else "longer than its header says"
        raise ValueError(f"{kind}: {size:,} bytes of tensors, its header speaks of {end:,}")
    return header, start


def _views(data: memoryview, header: dict[str, Any], start: int) -> tuple[dict[str, Tensor], Tensor | None]:
    """The tensors, as views of the bytes, and all numbers as one tensor where they are of one kind.

    ValueError where they do not tile the bytes. Tensors of odd sizes leave the next one unaligned: it is copied, and so is
    every one where that concerns more than a tenth of the bytes, since each view keeps the whole buffer.
    """
    out, end = {}, 0
    try:
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            begin, stop = entry["data_offsets"]
            dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
            count = math.prod(shape)
            if (
                begin != end
                or count * dtype.itemsize != stop - begin
                or any(type(n) is not int or n < 0 for n in shape)
            ):
                raise ValueError(f"the place of {name!r}")
            end = stop
            flat = (
                torch.frombuffer(data, dtype=dtype, count=count, offset=start + begin)
                if count
                else torch.empty(0, dtype=dtype)
            )
            out[name] = flat.view(shape)
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"damaged: {error}") from error
    kinds = {value.dtype for value in out.values()}
    whole = torch.frombuffer(data, dtype=kinds.pop(), offset=start) if len(kinds) == 1 and end else None
    apart = {name for name, value in out.items() if value.data_ptr() % ALIGNED}
    if 10 * sum(out[name].nbytes for name in apart) > end:
        apart = set(out)
    return {name: value.clone() if name in apart else value for name, value in out.items()}, whole


def _checked(tensors: dict[str, Tensor], whole: Tensor | None, asked: str) -> dict[str, Tensor]:
    """The tensors. GraftError for one that holds a number which is not finite; looked for in one pass where that is possible."""
    if whole is None or not finite(whole):
        for name, value in tensors.items():
            if not finite(value):
                raise GraftError(f"{asked}: the tensor {name!r}", "a number that is not finite", "train it again")
    return tensors
