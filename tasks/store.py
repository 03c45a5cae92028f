"""Parquet objects on local disk or object storage.

In: tables and the folder of a stage. Out: one object per part,
`<root>/<stage>/<fingerprint>/<table>/part-NNNNN.parquet`, encoded in memory and put once, so an object that is there is
complete. The first-named table of a stage is put last: its part says that the shard is done.
"""

import hashlib
import io
import json
import mimetypes
import os
import re
import resource
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from tasks import tables
from tasks.decoding import prefetch

_SECRETS = r"access_?key|api_?key|secret|passw(or)?d|pwd|credential|connection_string|authorization|cookie"
SECRET = rf".*({_SECRETS}|token).*|.*key|auth|(.*_)?sas"
"""Names of file system options that are not allowed."""
SECRET_ARGUMENT = rf".*({_SECRETS}|(access|api|auth|hf)_?token).*|auth|token"
"""Names of other arguments that are not: models have class_token, and keys of their own."""


@dataclass
class StoreSettings:
    root: str = "axonym-data"
    """Folder or fsspec URI (s3://bucket/prefix) under which everything is written."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the fsspec file system. Keys and endpoints come from the environment, never from here."""

    def __post_init__(self) -> None:
        if not self.root:
            raise ValueError("store.root is empty: give a folder or a URI such as s3://bucket/prefix")
        refuse_secrets("store.options", self.options)


def refuse_secrets(name: str, value: Any, secret: str = SECRET) -> None:
    """ValueError where a key, at any depth, is a secret by its name, or a URI holds a password: all of it is written
    into the manifest."""
    instead = "secrets come from the environment (AWS_SECRET_ACCESS_KEY, ...)"
    if isinstance(value, str) and re.search(r"://[^/@\s]*:[^/@\s]+@", value):
        raise ValueError(f"{name}: a URI with a password; {instead}")
    pairs = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, inner in pairs:
        if re.fullmatch(secret, str(key), re.IGNORECASE):
            raise ValueError(f"{name}.{key}: {instead}")
        refuse_secrets(f"{name}.{key}", inner, secret)


class Store:
    """Bytes under a root; `put` is atomic on every backend.

    On local disk a name appears by rename; object storage shows an object only when its upload has completed.
    """

    def __init__(self, settings: StoreSettings) -> None:
        """Raises ValueError naming store.root where its kind of file system is not known or not installed."""
        try:
            self.fs, self.root = fsspec.core.url_to_fs(settings.root, **settings.options)
        except (ImportError, TypeError, ValueError) as error:
            raise ValueError(f"store.root={settings.root}: {' '.join(str(error).split())}") from None
        self.root = self.root.rstrip("/")
        self.local = "file" in (self.fs.protocol if isinstance(self.fs.protocol, tuple) else (self.fs.protocol,))

    def path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def put(self, name: str, data: bytes) -> None:
        path = self.path(name)
        if not self.local:
            kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
            on_s3 = "s3" in self.fs.protocol  # other file systems have no such argument
            self.fs.pipe_file(path, data, **({"ContentType": kind} if on_s3 else {}))  # a browser opens pages by it
            return
        os.makedirs(os.path.dirname(path), exist_ok=True)
        hidden = f"{os.path.dirname(path)}/.{uuid.uuid4().hex}.tmp"
        with open(hidden, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(hidden, path)

    def check(self) -> None:
        """Raises ValueError naming store.root where nothing can be written."""
        try:
            self.put("runs/.writable", b"")
            self.fs.rm_file(self.path("runs/.writable"))
        except Exception as error:  # every file system has errors of its own, such as missing credentials
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"store.root={self.fs.unstrip_protocol(self.root)}: cannot be written: {reason}") from None

    def get(self, name: str) -> bytes:
        return self.fs.cat_file(self.path(name))

    def native(self, name: str) -> pa.NativeFile:
        """The file for Arrow, whose threads may outlive a read: where they hold a Python file when the interpreter
        ends, the process aborts (apache/arrow#34314)."""
        return pa.OSFile(self.path(name)) if self.local else pa.BufferReader(self.get(name))

    def get_json(self, name: str) -> dict | None:
        """The JSON object of that name, None where there is none."""
        try:
            return json.loads(self.get(name))
        except FileNotFoundError:
            return None

    def put_json(self, name: str, value: dict) -> None:
        self.put(name, (json.dumps(value, indent=1) + "\n").encode())

    def names(self, folder: str) -> list[str]:
        """File names directly inside a folder, sorted; empty where there is no folder."""
        self.fs.invalidate_cache()
        try:
            found = self.fs.ls(self.path(folder), detail=False)
        except FileNotFoundError:
            return []
        return sorted(n for n in (path.rstrip("/").rsplit("/", 1)[-1] for path in found) if n and not n.startswith("."))


@dataclass
class Folder:
    """The tables that one stage with one fingerprint has written. Small, picklable; connects on first use."""

    settings: StoreSettings
    stage: str
    fingerprint: str
    tables: tuple[str, ...]
    """What the stage writes; the first one is put last."""

    @cached_property
    def store(self) -> Store:
        return Store(self.settings)

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k != "store"}

    @property
    def name(self) -> str:
        return f"{self.stage}/{self.fingerprint}"

    def done(self) -> set[int]:
        """Numbers of the finished parts."""
        names = self.store.names(f"{self.name}/{self.tables[0]}")
        return {int(found[1]) for n in names if (found := re.fullmatch(r"part-(\d{5,})\.parquet", n))}

    def write(
        self, part: int, written: dict[str, pa.Table], groups: dict[str, list[int]] | None = None, threads: int = 0
    ) -> None:
        """Put all tables of one part, the first-named last. `groups` gives the row-group lengths of a table; in
        threads tables are encoded beside each other, and held longer."""
        assert set(written) == set(self.tables), f"{self.stage} writes {self.tables}, got {sorted(written)}"

        def encoded(table: str) -> bytes:
            return encode(tables.check(table, written[table]), (groups or {}).get(table))

        order = self.tables[::-1]
        for table, data in zip(order, prefetch(encoded, order, threads, threads), strict=True):
            self.store.put(part_name(self.name, table, part), data)

    def read(
        self,
        table: str,
        part: int,
        *,
        columns: list[str] | None = None,
        group: int | None = None,
        filters: list | None = None,
    ) -> pa.Table:
        """One part of a table; `group` reads one row group of it alone."""
        name = part_name(self.name, table, part)
        self.store.fs.invalidate_cache()  # another process may have written since
        if group is None:
            found = pq.read_table(self.store.native(name), columns=columns, filters=filters)
        elif self.store.local:
            found = pq.ParquetFile(self.store.native(name)).read_row_group(group, columns=columns)
        else:  # not all of a large object; its Python file stays in this thread
            with self.store.fs.open(self.store.path(name), "rb") as file:
                found = pq.ParquetFile(file).read_row_group(group, columns=columns, use_threads=False)
        return tables.check(table, found, columns)

    def read_all(self, table: str, **how) -> pa.Table:
        """All parts of a table, in part order."""
        return pa.concat_tables([self.read(table, part, **how) for part in sorted(self.done())])


def part_name(folder: str, table: str, part: int) -> str:
    return f"{folder}/{table}/part-{part:05d}.parquet"


def encode(table: pa.Table, groups: list[int] | None = None) -> bytes:
    """Parquet bytes; `groups` are the lengths of the row groups (default: one).

    Vectors and activations hardly repeat: their first, second, ... bytes lie together instead of in a dictionary, which
    makes stats 1.3 times smaller and twice as fast to write.
    """
    buffer = io.BytesIO()
    lists = [field for field in table.schema if pa.types.is_list(field.type)]
    apart = [f"{field.name}.list.element" for field in lists if pa.types.is_floating(field.type.value_type)]
    leaves = [f"{field.name}.list.element" if field in lists else field.name for field in table.schema]
    how: dict[str, Any] = {"use_byte_stream_split": apart, "use_dictionary": [x for x in leaves if x not in apart]}
    groups = [table.num_rows] if groups is None else groups
    assert sum(groups) == table.num_rows, "row groups do not cover the table"
    with pq.ParquetWriter(buffer, table.schema, compression="zstd", **how) as writer:
        start = 0
        for rows in groups:
            writer.write_table(table.slice(start, rows), row_group_size=max(rows, 1))
            start += rows
    return buffer.getvalue()


def fingerprint(payload: dict) -> str:
    """16 hex digits of the SHA-256 of a JSON-able value."""
    return hashlib.sha256(json.dumps(payload, sort_keys=True, default=str).encode()).hexdigest()[:16]


def hash64(text: str) -> int:
    """63-bit hash of a text, the same on every machine; the source of every random-looking choice."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


@dataclass
class PartReport:
    """What a worker says after one part: small, so that nothing large travels between processes."""

    part: int
    rows: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    peak_mib: int = 0
    """Largest resident memory of the worker's process so far."""
    error: str | None = None
    refused: bool = False
    """Whether the error is a plain ValueError, the user's to mend; libraries' own kinds of it are failures."""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time spent inside to `seconds[name]`: read, compute or write."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def peak_mib() -> int:
    """Peak of the resident memory since it was last counted anew; since the process began where Linux does not tell."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) // 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
