"""Which images there are, before any of them is read.

In: URIs of image folders, WebDataset tars or Parquet files, local or on any fsspec file system; a file of labels. Out:
the rows of the listing in stored order, and a hash that changes when a file does.
"""

import hashlib
import json
import os
import re
import tarfile
from collections import Counter
from typing import Any, BinaryIO, cast

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from tasks.images import image_column
from tasks.probing import EXTENSIONS, ProbingSettings

LABELS = "lines 'file label', or JSON {file: label}"
LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "cls")


def list_images(settings: ProbingSettings) -> tuple[list[dict], str]:
    """All images in stored order as rows of the listing, and a hash that changes when a file does.

    Raises ValueError naming probing.uri where a URI does not exist, holds no images, or mixes formats.
    """
    if not settings.uris or not all(settings.uris):
        raise ValueError(
            "probing.uri is missing: give a folder of images, WebDataset tars or Parquet files (or a list)"
        )
    labels = _labels(settings)
    rows: list[dict] = []
    stamps: list[Any] = [labels]
    for uri, name in zip(settings.uris, _short_names(settings.uris), strict=True):
        fs, root, files = _files(uri, settings)
        for info in files:  # with its whole path, which is what the listing holds
            stamps.append([name, fs.unstrip_protocol(info["name"]), info["size"], _stamp(info)])
        for row in _rows(fs, root, files, settings):
            row["image_id"] = f"{name}/{row['image_id']}" if name else row["image_id"]
            rows.append(row)
    if not rows:
        raise ValueError(f"probing.uri={settings.uri}: no images found; allowed endings: {_endings()}")
    twice = [image_id for image_id, n in Counter(row["image_id"] for row in rows).items() if n > 1]
    if twice:
        raise ValueError(f"probing.uri={settings.uri}: {twice[0]} is there twice")
    if labels and labels.keys().isdisjoint(row["image_id"].rsplit("/", 1)[-1] for row in rows):
        none = f"none of its {len(labels)} entries is of an image there, such as {min(labels)!r}"
        raise ValueError(f"probing.labels={settings.labels}: {none}; expected {LABELS}")
    for number, row in enumerate(rows):
        row["image"] = number
        row["label"] = labels.get(row["image_id"].rsplit("/", 1)[-1], row["label"])
    return rows, hashlib.sha256(json.dumps(stamps).encode()).hexdigest()


def _files(uri: str, settings: ProbingSettings) -> tuple[fsspec.AbstractFileSystem, str, list[dict]]:
    """File system, dataset root and the files of the one format found there, sorted by name."""
    if "::" in uri:
        raise ValueError(f"probing.uri={uri}: chained URIs (::) are not supported")
    try:
        fs, path = fsspec.core.url_to_fs(uri, **settings.options)
        fs.invalidate_cache()
        path = path.rstrip("/")
        wildcard = re.search(r"[*?\[]", path)
        if wildcard and not fs.exists(path):
            root, found = path[: wildcard.start()].rsplit("/", 1)[0], fs.glob(path, detail=True)
        elif fs.isfile(path):
            root, found = path.rsplit("/", 1)[0], {path: fs.info(path)}
        else:
            root, found = path, _find(fs, path)
    except Exception as error:  # every file system has errors of its own, such as missing credentials
        raise ValueError(f"probing.uri={uri}: cannot be listed: {' '.join(str(error).split())}") from None
    kinds = {kind: [i for n, i in found.items() if _ends(n[len(root) :], ends)] for kind, ends in EXTENSIONS.items()}
    kinds = {kind: infos for kind, infos in kinds.items() if infos and settings.format in ("auto", kind)}
    if not kinds:
        kind = "" if settings.format == "auto" else f" of format {settings.format}"
        there = "nothing there" if not found else f"none of its {len(found)} files has one of the endings {_endings()}"
        raise ValueError(f"probing.uri={uri}: no images{kind}: {there}")
    if len(kinds) > 1:
        raise ValueError(f"probing.uri={uri} holds {' and '.join(kinds)}: choose one with probing.format=")
    return fs, root, sorted(next(iter(kinds.values())), key=lambda info: info["name"])


def _find(fs: fsspec.AbstractFileSystem, path: str) -> dict[str, dict]:
    """Every file below a folder by its path; on a disk also in folders that are links, which fsspec leaves out."""
    if not isinstance(fs, LocalFileSystem):
        return cast(dict[str, dict], fs.find(path, detail=True))
    found, seen = [], set()
    for folder, _, names in os.walk(path, followlinks=True):
        place = os.path.realpath(folder)
        if place in seen:
            raise ValueError(f"{folder} is a link to {place}, which is there already")
        seen.add(place)
        found += [f"{folder}/{name}" for name in names]
    return {name: fs.info(name) for name in found}


def _ends(name: str, endings: tuple[str, ...]) -> bool:
    """Whether a name below the dataset's root has one of the endings and is not hidden, nor in a hidden folder."""
    return name.lower().endswith(endings) and not re.search(r"(^|/)\.[^./]", name)


def _endings() -> str:
    return " ".join(e for ends in EXTENSIONS.values() for e in ends)


def _stamp(info: dict) -> str:
    names = ("ETag", "etag", "mtime", "LastModified", "last_modified", "created")
    return str(next((info[name] for name in names if info.get(name)), ""))


def _short_names(uris: list[str]) -> list[str]:
    """Shortest distinct ending of each URI; '' for a single one."""
    if len(uris) == 1:
        return [""]
    paths = [uri.rstrip("/").split("://")[-1].split("/") for uri in uris]
    names: list[str] = []
    for depth in range(1, max(map(len, paths)) + 1):
        names = ["/".join(p[-depth:]) for p in paths]
        if len(set(names)) == len(names):
            return names
    twice = next(name for name, n in Counter(names).items() if n > 1)
    raise ValueError(f"probing.uri lists {twice} twice")


def _rows(fs: fsspec.AbstractFileSystem, root: str, files: list[dict], settings: ProbingSettings) -> list[dict]:
    rows = []
    for info in files:
        path = info["name"]
        place = {"uri": fs.unstrip_protocol(path), "offset": None, "length": None, "row": None, "label": None}
        relative = path[len(root) :].lstrip("/")
        if _ends(relative, EXTENSIONS["webdataset"]):
            rows += [place | member for member in _tar_members(fs, path, relative)]
        elif _ends(relative, EXTENSIONS["parquet"]):
            found = _parquet_rows(fs, path)
            rows += [place | {"image_id": f"{relative}/{row}", "row": row, "label": label} for row, label in found]
        else:
            folder = relative.split("/")[-2] if "/" in relative else None
            rows.append(place | {"image_id": relative, "label": folder})
    return rows


def _tar_members(fs: fsspec.AbstractFileSystem, path: str, relative: str) -> list[dict]:
    members, classes = [], {}
    try:
        with cast(BinaryIO, fs.open(path, "rb")) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                key, _, ending = member.name.rpartition(".")
                if ending == "cls" and member.isfile() and (content := tar.extractfile(member)):
                    classes[key] = content.read(100).decode(errors="replace").strip()
                if member.isfile() and _ends(member.name, EXTENSIONS["folder"]):
                    place = {"offset": member.offset_data, "length": member.size}
                    members.append(place | {"image_id": f"{relative}/{member.name}", "key": key})
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE).strip(b"\0"):  # tarfile takes a damaged header for the end
                raise tarfile.ReadError(f"damaged header at byte {tar.offset}")
    except (tarfile.TarError, OSError) as error:
        raise ValueError(f"probing.uri: {path} is not a readable uncompressed tar: {error}") from None
    return [m | {"label": classes.get(m.pop("key"))} for m in members]


def _parquet_rows(fs: fsspec.AbstractFileSystem, path: str) -> list[tuple[int, str | None]]:
    try:
        with fs.open(path, "rb") as file:
            parquet = pq.ParquetFile(file)
            image_column(parquet.schema_arrow, path)
            column = next((c for c in LABEL_COLUMNS if c in parquet.schema_arrow.names), None)
            if column is None:
                return [(row, None) for row in range(parquet.metadata.num_rows)]
            labels = parquet.read(columns=[column], use_threads=False)[column].to_pylist()
            info = json.loads((parquet.schema_arrow.metadata or {}).get(b"huggingface", b"{}"))
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"probing.uri: {path} is not a readable Parquet file: {error}") from None
    feature = info.get("info", {}).get("features", {}).get(column)
    names = feature.get("names") if isinstance(feature, dict) else None
    if names:  # Hugging Face marks images without a label by -1
        labels = [names[n] if isinstance(n, int) and 0 <= n < len(names) else None for n in labels]
    return [(row, None if label is None else str(label)) for row, label in enumerate(labels)]


def _labels(settings: ProbingSettings) -> dict[str, str]:
    if settings.labels is None:
        return {}
    try:
        with cast(fsspec.core.OpenFile, fsspec.open(settings.labels, "rt", **settings.options)) as file:
            text = file.read()
        if settings.labels.endswith(".json"):
            return {name: str(label) for name, label in json.loads(text).items()}
        return dict(_label(line.strip()) for line in text.splitlines() if line.strip())
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"probing.labels={settings.labels}: expected {LABELS}: {error}") from None


def _label(line: str) -> tuple[str, str]:
    """The file, up to its ending, and the label; both may hold spaces."""
    ended = re.match(rf"(.*?(?:{'|'.join(map(re.escape, EXTENSIONS['folder']))}))\s+(.+)", line, re.IGNORECASE)
    name, label = ended.groups() if ended else line.split(None, 1)
    return name, label
