"""Word lists, as their files have them.

In: a path or URI of text, JSON or Parquet. Out: phrases with their family and source, empty and duplicate
ones included.
"""

import io
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

LEXICON = Path(__file__).parent / "lexicon.txt"
EXPECTED = "text with one concept per line, JSON [concept] or {class: [concept]}, or Parquet with a column concept"


class Raw(NamedTuple):
    """A phrase as it was found."""

    concept: str
    family: str | None = None
    sources: tuple[str, ...] = ()
    prompt_id: str | None = None
    """Set for the words of a language model, which are held to stricter rules."""
    is_class: bool = False
    """Class names are kept whatever they look like: evaluation needs the concept of each output."""


def other_words(path: str) -> list[Raw]:
    """Of vocabulary.against, where the shipped lexicon has a name."""
    return read_concepts(None if path == "lexicon" else path, "vocabulary.against")


def read_concepts(path: str | None, key: str = "vocabulary.path") -> list[Raw]:
    """Rows of a word list as they stand, empty and duplicate ones included; None is the shipped lexicon.

    Raises ValueError naming `key` where it cannot be read.
    """
    path = str(LEXICON) if path is None else path
    name = path.rstrip("/").rsplit("/", 1)[-1]
    try:
        fs, inner = fsspec.core.url_to_fs(path)
        data = fs.cat_file(inner)
        if name.endswith(".parquet"):
            return _parquet_rows(data, name)
        text = data.decode("utf-8-sig")
        return _json_rows(json.loads(text), name) if name.endswith(".json") else _text_rows(text, name)
    except (OSError, ImportError, ValueError, RecursionError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{key}={path}: {reason}; expected {EXPECTED}") from None


def _text_rows(text: str, name: str) -> list[Raw]:
    rows, family = [], None
    for line in io.StringIO(text, newline=None):
        if section := re.fullmatch(r"\[([a-z]+)\]", line.strip()):
            family = section[1]
        else:
            rows.append(Raw(line.rstrip("\n"), family, (name,)))
    return rows


def _json_rows(found: Any, name: str) -> list[Raw]:
    groups = found if isinstance(found, dict) else {name: found}
    groups = {source: [value] if isinstance(value, str) else value for source, value in groups.items()}
    if not all(isinstance(value, list) and all(isinstance(c, str) for c in value) for value in groups.values()):
        raise ValueError("not all concepts are strings")
    return [Raw(concept, None, (source,)) for source, concepts in groups.items() for concept in concepts]


def _parquet_rows(data: bytes, name: str) -> list[Raw]:
    file = pq.ParquetFile(pa.BufferReader(data))
    if "concept" not in file.schema_arrow.names:
        raise ValueError(f"its columns are {', '.join(file.schema_arrow.names)}")
    table = file.read([c for c in ("concept", "family") if c in file.schema_arrow.names])
    table = table.cast(pa.schema([(c, pa.string()) for c in table.column_names]))
    return [Raw(row["concept"] or "", row.get("family"), (name,)) for row in table.to_pylist()]
