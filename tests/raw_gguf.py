"""GGUF files taken apart and put together again, value by value: what the `gguf` package would refuse to write."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFReader

# enum gguf_type → how struct packs it
FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
U32, I32, F32, BOOL, TEXT, ARRAY, U64 = 4, 5, 6, 7, 8, 9, 10
_ALIGNMENT = 32


@dataclass
class RawTensor:
    dims: tuple[int, ...]  # fastest first, as the file has it
    kind: int  # enum ggml_type
    data: bytes


class RawModel:
    """Metadata and tensors of a file: change them at will, then `write`."""

    def __init__(self, source: Path) -> None:
        reader = GGUFReader(source)
        self.version = 3
        self.fields: dict[str, tuple[int, Any]] = {}
        for name, item in reader.fields.items():
            if not name.startswith("GGUF."):
                kind, value = int(item.types[0]), item.contents()
                self.fields[name] = (kind, (int(item.types[-1]), value) if kind == ARRAY else value)
        self.tensors = {
            t.name: RawTensor(tuple(int(n) for n in t.shape), int(t.tensor_type), t.data.tobytes())
            for t in reader.tensors
        }

    @property
    def architecture(self) -> str:
        return str(self.fields["general.architecture"][1])

    def set(self, key: str, value: Any, kind: int = U32) -> None:
        """Set a metadata value; '%' in `key` stands for the architecture."""
        self.fields[key.replace("%", self.architecture)] = (kind, value)

    def set_array(self, key: str, values: Sequence[Any], kind: int = U32) -> None:
        self.set(key, (kind, values), ARRAY)

    def drop(self, key: str) -> None:
        del self.fields[key.replace("%", self.architecture)]

    def write(self, path: Path) -> Path:
        head = [b"GGUF", struct.pack("<IQQ", self.version, len(self.tensors), len(self.fields))]
        for name, (kind, value) in self.fields.items():
            head += [_text(name), struct.pack("<I", kind), _value(kind, value)]
        data = b""
        for name, tensor in self.tensors.items():
            n = len(tensor.dims)
            head += [_text(name), struct.pack(f"<I{n}QIQ", n, *tensor.dims, tensor.kind, len(data))]
            data += tensor.data + bytes(-len(tensor.data) % _ALIGNMENT)
        header = b"".join(head)
        path.write_bytes(header + bytes(-len(header) % _ALIGNMENT) + data)
        return path


def _text(value: str | bytes) -> bytes:
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data)) + data


def _value(kind: int, value: Any) -> bytes:
    if kind == TEXT:
        return _text(value)
    if kind == ARRAY:
        inner, values = value
        return struct.pack("<IQ", inner, len(values)) + b"".join(_value(inner, v) for v in values)
    return struct.pack("<" + FORMATS[kind], value)
