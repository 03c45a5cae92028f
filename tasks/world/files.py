"""Drawn scenes as files: the probing dataset world://<seed>/<count>.

In: a URI. Out: a read-only fsspec folder of <count> PNG files, scene-00000.png and so on, each drawn when it is read.
"""

import io
import re
import struct
import zlib
from functools import lru_cache
from typing import Any

import numpy as np
from fsspec import AbstractFileSystem

from tasks.world.drawing import draw
from tasks.world.scenes import SIZE, sample

VERSION = 1
"""Goes up when a scene of the same seed and number looks different; tests/test_world_files.py fails when one does."""
MOST_SCENES = 100_000


def scenes_of(uri: str) -> tuple[str, int]:
    """Seed and count of a folder or of a file in it. Raises ValueError for anything else."""
    found = re.fullmatch(r"(?:world://)?([\w.-]+)/([0-9]{1,6})(?:/.*)?", uri)
    if not found or not 1 <= int(found[2]) <= MOST_SCENES:
        raise ValueError(f"expected world://<seed>/<count>, count from 1 to {MOST_SCENES}")
    return found[1], int(found[2])


def number_of(name: str) -> int:
    """Number of the scene that a file name, path or image_id stands for. Raises ValueError for other names."""
    found = re.fullmatch(r"(?:.*/)?scene-([0-9]{5})\.png", name)
    if not found:
        raise ValueError(f"{name}: expected scene-<five digits>.png")
    return int(found[1])


@lru_cache(maxsize=4096)
def encoded(seed: str, number: int) -> bytes:
    return _png(draw(sample(seed, number)).pixels)


def _png(pixels: np.ndarray) -> bytes:
    """An uncompressed PNG: the split of an image hangs on these bytes, and compressed they differ between zlibs."""
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    stored = struct.pack("<BHH", 1, len(rows), len(rows) ^ 0xFFFF) + rows
    header = struct.pack(">IIBBBBB", SIZE, SIZE, 8, 2, 0, 0, 0)
    data = b"\x78\x01" + stored + struct.pack(">I", zlib.adler32(rows))
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


FILE_SIZE = len(_png(np.zeros((SIZE, SIZE, 3), np.uint8)))
"""Bytes of every file."""


class WorldFileSystem(AbstractFileSystem):
    protocol = "world"

    def info(self, path: str, **kwargs: Any) -> dict:
        path = str(self._strip_protocol(path))
        seed, count = scenes_of(path)
        if path.count("/") == 1:
            return {"name": path, "size": 0, "type": "directory"}
        if not re.fullmatch(r"[^/]+/[0-9]+/scene-[0-9]{5}\.png", path) or number_of(path) >= count:
            raise FileNotFoundError(path)
        return {"name": path, "size": FILE_SIZE, "type": "file", "ETag": f"{seed}/{number_of(path)}/{VERSION}"}

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list:
        found = self.info(path)
        if found["type"] == "directory":
            count = scenes_of(found["name"])[1]
            rows = [self.info(f"{found['name']}/scene-{number:05d}.png") for number in range(count)]
        else:
            rows = [found]
        return rows if detail else [row["name"] for row in rows]

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        found = self.info(path)
        if found["type"] == "directory":
            raise IsADirectoryError(path)
        return encoded(scenes_of(found["name"])[0], number_of(found["name"]))[start:end]

    def _open(self, path: str, mode: str = "rb", *args: Any, **kwargs: Any) -> Any:
        if mode != "rb":
            raise OSError(f"world://{path}: drawn scenes can only be read")
        return io.BytesIO(self.cat_file(path))
