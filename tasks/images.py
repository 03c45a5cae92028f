"""The images of a probing dataset: where their bytes lie, and the choices that are fixed by their content.

In: the images table (or the listing). Out: an ImageList, the bytes of single images, batches of model input.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache, partial
from math import prod
from typing import Any, cast

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from tasks.decoding import Written, from_processes, prefetch
from tasks.pixels import BadImage, Preprocess, decode
from tasks.store import Folder, fingerprint, hash64

fsspec.register_implementation("world", "tasks.world.files.WorldFileSystem")  # drawn scenes; imported when asked for
SPLITS = ("explain", "select", "validate")
ROWS = 65_536
"""Vectors of images that are summed at once."""
IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "bytes")


class ImageReader:
    """Bytes of images by row of the listing: a file, a range of a tar, or a row of a Parquet file."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self._parquet = lru_cache(maxsize=2)(self._row_group)
        self._starts = lru_cache(maxsize=256)(self._group_starts)

    def read(self, uri: str, offset: int | None, length: int | None, row: int | None) -> bytes:
        """Raises OSError where the file cannot be read, BadImage (unreadable) where only its row of one cannot."""
        if row is not None:
            return self._parquet_bytes(uri, row)
        fs, path = self._place(uri)
        if offset is None or length is None:
            return cast(bytes, fs.cat_file(path))
        if length == 0:  # on S3 an empty range is the whole file
            return b""
        return cast(bytes, fs.cat_file(path, start=offset, end=offset + length))

    def _place(self, uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
        fs, _ = fsspec.core.url_to_fs(uri.partition("::")[0], **self.options)  # '::' in a file name is no chain of URIs
        return fs, fs._strip_protocol(uri)

    def _parquet_bytes(self, uri: str, row: int) -> bytes:
        try:
            starts = self._starts(uri)
            group = int(np.searchsorted(starts, row, side="right")) - 1
            value = self._parquet(uri, group)[row - starts[group]].as_py()
        except (pa.ArrowException, OSError, ValueError, IndexError) as error:
            if isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None):
                raise  # of the file system; what Arrow says of a damaged page is an OSError too, without a number
            raise BadImage("unreadable") from None
        if isinstance(value, dict):
            value = value.get("bytes")
        return value or b""

    def _row_group(self, uri: str, group: int) -> pa.ChunkedArray:
        fs, path = self._place(uri)
        with fs.open(path, "rb") as file:
            parquet = pq.ParquetFile(file)
            column = image_column(parquet.schema_arrow, uri)
            return parquet.read_row_group(group, columns=[column], use_threads=False).column(0)  # see Store.native

    def _group_starts(self, uri: str) -> np.ndarray:
        fs, path = self._place(uri)
        with fs.open(path, "rb") as file:
            meta = pq.ParquetFile(file).metadata
            rows = [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]
        return np.concatenate([[0], np.cumsum(rows)[:-1]])


def image_column(schema: pa.Schema, uri: str) -> str:
    """Name of the column with image bytes (binary, or Hugging Face's struct with `bytes`). ValueError without one."""
    for name in sorted(schema.names, key=lambda n: (n not in IMAGE_COLUMNS, n)):
        dtype = schema.field(name).type
        if pa.types.is_struct(dtype) and dtype.get_field_index("bytes") >= 0:
            return name
        if pa.types.is_binary(dtype) or pa.types.is_large_binary(dtype):
            return name
    raise ValueError(f"probing.uri: {uri} has no column of image bytes; its columns are {', '.join(schema.names)}")


@dataclass
class ImageList:
    """All images of a probing dataset, in stored order; arrays are indexed by image number.

    Travels to workers without its table, which is read from the store where it is first needed.
    """

    folder: Folder
    shard_size: int
    batch_size: int
    pooled_max: int
    options: dict[str, Any]
    """fsspec options of the dataset's URIs."""

    def __getstate__(self) -> dict:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @cached_property
    def table(self) -> pa.Table:
        table = self.folder.read_all("images")
        assert np.array_equal(table["image"].to_numpy(), np.arange(len(table))), "images are not in stored order"
        return table

    def __len__(self) -> int:
        return self.table.num_rows

    def column(self, name: str) -> np.ndarray:
        return self.table[name].to_numpy(zero_copy_only=False)

    @cached_property
    def ids(self) -> np.ndarray:
        return self.column("image_id")

    @cached_property
    def ok(self) -> np.ndarray:
        return self.column("status") == "ok"

    @cached_property
    def split(self) -> np.ndarray:
        """Split of each readable image, '' for the others."""
        return np.where(self.ok, self.column("split"), "")

    @cached_property
    def explain(self) -> np.ndarray:
        """bool, readable images of the explain split."""
        return self.split == "explain"

    def explain_slices(self) -> list[np.ndarray]:
        """int64 [n], numbers of the explain images, ROWS at once: all vectors in float64 would be gigabytes."""
        numbers = np.flatnonzero(self.explain)
        return [numbers[start : start + ROWS] for start in range(0, len(numbers), ROWS)]

    def mean_vector(self, images_ND: np.ndarray) -> np.ndarray:
        """float64 [D], mean of the explain images' vectors; zero without any."""
        total_D = np.zeros(images_ND.shape[1])
        for rows in self.explain_slices():
            total_D += images_ND[rows].sum(0, dtype=np.float64)
        return total_D / max(self.explain.sum(), 1)

    @cached_property
    def order(self) -> np.ndarray:
        """int64, rank of each image by the hash of its id: breaks ties without favouring the first of a folder."""
        hashes = np.array([hash64(i) for i in self.ids], np.int64)
        return np.argsort(np.lexsort((np.arange(len(self)), hashes)))

    @cached_property
    def _hash(self) -> np.ndarray:
        return np.array([hash64("sample:" + c) for c in self.column("content")], np.int64)

    @cached_property
    def stored(self) -> np.ndarray:
        """bool, whether pooled activations are kept: at most `pooled_max` images of each split, chosen by content."""
        keep = np.zeros(len(self), bool)
        for split in SPLITS:
            members = np.flatnonzero(self.split == split)
            keep[members[np.argsort(self._hash[members], kind="stable")[: self.pooled_max]]] = True
        return keep

    @cached_property
    def sampled(self) -> np.ndarray:
        """bool, a sixteenth of the explain images (at least one): their positions enter the position histograms."""
        chosen = self.explain & (self._hash % 16 == 0)
        if not chosen.any() and self.explain.any():
            members = np.flatnonzero(self.explain)
            chosen[members[np.argmin(self._hash[members])]] = True
        return chosen

    @cached_property
    def partner(self) -> np.ndarray:
        """int64, another readable image for each, in the order of their hashes; an unreadable one is its own."""
        partner, known = np.arange(len(self)), np.flatnonzero(self.ok)
        known = known[np.argsort(self._hash[known], kind="stable")]
        partner[known] = np.roll(known, 1)
        return partner

    @cached_property
    def reader(self) -> ImageReader:
        return ImageReader(self.options)

    @property
    def num_shards(self) -> int:
        return -(-len(self) // self.shard_size)

    def shard(self, part: int) -> range:
        return range(part * self.shard_size, min((part + 1) * self.shard_size, len(self)))

    def digest(self) -> str:
        """Identity of the data, the same wherever the files lie: what later stages are fingerprinted by."""
        rows = [self.table[c].to_pylist() for c in ("image_id", "content", "split", "status")]
        return fingerprint({"images": rows, "shard_size": self.shard_size, "batch_size": self.batch_size})

    def open(self, image: int, reader: ImageReader) -> Image.Image:
        """Decoded image. Raises BadImage (its reason and id) where its file has changed since the probing stage."""
        row = {c: self.table[c][image].as_py() for c in ("uri", "offset", "length", "row")}
        try:
            return decode(reader.read(**row))
        except BadImage as reason:
            raise BadImage(f"{reason}: {self.ids[image]}") from None
        except OSError as error:
            raise BadImage(f"unreadable: {self.ids[image]}: {error}") from None

    def batches(self, groups: list[np.ndarray], preprocess: Preprocess) -> Iterator[torch.Tensor]:
        """uint8 [batch_size, H, W, 3] per group of image numbers, decoded ahead; missing and unreadable rows stay 0.

        Beside a GPU in processes, because threads would share one lock with the loop that feeds it; the batches then
        lie in pinned memory, from which they are copied while it computes.

        An image that was readable in the probing stage and no longer is raises BadImage: the data has changed.
        """
        shape = (self.batch_size, *preprocess.size, 3)
        if torch.cuda.is_available():
            load = partial(decoded_there, self, preprocess, shape)
            for pixels_BHWC in from_processes(load, groups, prod(shape)):
                yield torch.from_numpy(pixels_BHWC).pin_memory()
        else:
            load = partial(self.decoded, preprocess, shape)
            yield from map(torch.from_numpy, prefetch(load, groups, ahead=2))

    def decoded(
        self, preprocess: Preprocess, shape: tuple[int, ...], group: np.ndarray, memory: np.ndarray | None = None
    ) -> np.ndarray:
        """One of the batches, in this memory where some is given."""
        batch = np.empty(shape, np.uint8) if memory is None else memory.reshape(shape)
        batch[:] = 0
        for slot in np.flatnonzero(self.ok[group]):
            batch[slot] = preprocess.pixels(self.open(int(group[slot]), self.reader))
        return batch

    def shard_batches(self, part: int) -> list[np.ndarray]:
        """Image numbers of the shard's batches, cut on the global number."""
        images = np.array(self.shard(part))
        return [images[i : i + self.batch_size] for i in range(0, len(images), self.batch_size)]


def covering(start: int, stop: int, size: int) -> range:
    """Starts of the batches, cut at multiples of `size`, that hold what is numbered start to stop; none for nothing."""
    return range(start // size * size, stop, size) if start < stop else range(0)


KNOWN: dict[str, ImageList] = {}
"""In a process that decodes: lists by their folder, with the tables that they have read."""


def _known(images: ImageList) -> ImageList:
    """The same list: each call brings it without its table."""
    return KNOWN.setdefault(images.folder.store.path(images.folder.name), images)


def decoded_there(
    images: ImageList, preprocess: Preprocess, shape: tuple[int, ...], group: np.ndarray, memory: np.ndarray
) -> Written:
    """ImageList.decoded in another process."""
    return _known(images).decoded(preprocess, shape, group, memory).shape


def opened_there(images: ImageList, image: int, memory: np.ndarray) -> Written:
    """ImageList.open in another process, uint8 [H, W, 3]."""
    known = _known(images)
    photo = np.asarray(known.open(image, known.reader))
    if photo.size > len(memory):
        return photo
    memory[: photo.size] = photo.reshape(-1)
    return photo.shape
