"""The store and the tables: a part is there completely or not at all, on disk and on S3 alike; a stage's first-named
table comes last; the same table gives the same bytes; nothing secret and nothing of the wrong type is written.
"""

import contextlib
import json
import pickle
import re
import resource
import subprocess
import sys
import threading
import uuid
from itertools import pairwise

import boto3
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks import tables
from tasks.store import Folder, PartReport, Store, StoreSettings, encode, fingerprint, hash64, part_name
from tasks.tables import COLUMNS, SCHEMAS, check, make_table, matrix


@pytest.fixture(params=["local", "file", "memory", "s3"])
def root(request, tmp_path) -> str:
    """An empty place to store things."""
    if request.param == "s3":
        return f"{request.getfixturevalue('s3')}/{uuid.uuid4().hex}"
    return {"local": str(tmp_path), "file": f"file://{tmp_path}/", "memory": f"memory://{uuid.uuid4().hex}"}[
        request.param
    ]


def vectors(rows: int, seed: int = 0, start: int = 0) -> pa.Table:
    values = np.random.default_rng(seed).normal(size=(rows, 4)).astype(np.float16)
    return make_table("image_embeddings", {"image": np.arange(start, start + rows), "embedding": values})


def listing(rows: int) -> pa.Table:
    names = [f"{i}.jpg" for i in range(rows)]
    none = [None] * rows
    columns = {"image": range(rows), "image_id": names, "uri": [f"file:///photos/{n}" for n in names]}
    return make_table("listing", columns | {"offset": none, "length": none, "row": none, "label": ["a"] * rows})


def folder(root: str, *names: str, fingerprint: str = "0123456789abcdef") -> Folder:
    return Folder(StoreSettings(root=root), "probing", fingerprint, names or ("image_embeddings",))


# Bytes under names


def test_what_is_put_can_be_got(root):
    store = Store(StoreSettings(root=root))
    for name, data in {"a/b/c.bin": b"12345", "a/empty": b"", "top": bytes(range(256)) * 999}.items():
        store.put(name, data)
        assert store.get(name) == data
    store.put("a/b/c.bin", b"anew")
    assert store.get("a/b/c.bin") == b"anew"
    assert Store(StoreSettings(root=root)).get("a/empty") == b""


def test_json(root):
    store = Store(StoreSettings(root=root))
    assert store.get_json("runs/x/run.json") is None
    value = {"b": [1, None, 0.5], "a": {"text": "na\u00efve <b>\n"}}
    store.put_json("runs/x/run.json", value)
    assert store.get_json("runs/x/run.json") == value
    first = store.get("runs/x/run.json")
    store.put_json("runs/x/run.json", store.get_json("runs/x/run.json"))
    assert store.get("runs/x/run.json") == first


def test_names(root):
    store = Store(StoreSettings(root=root))
    assert store.names("stage/table") == []
    for name in ("part-00002", "part-00000", "part-00010"):
        store.put(f"stage/table/{name}", b"x")
    store.put("stage/table/.hidden", b"x")
    store.put("stage/tables/other", b"x")
    assert store.names("stage/table") == ["part-00000", "part-00002", "part-00010"]
    assert store.names("stage/tab") == []


def test_missing_names_are_missing_files(root):
    store = Store(StoreSettings(root=root))
    with pytest.raises(FileNotFoundError):
        store.get("no/such/name")
    with pytest.raises(FileNotFoundError):
        folder(root).read("image_embeddings", 3)


def test_names_put_by_another_process_are_seen(s3):
    prefix = uuid.uuid4().hex
    store, client = Store(StoreSettings(root=f"{s3}/{prefix}")), boto3.client("s3")
    store.put("table/a", b"1")
    assert store.names("table") == ["a"]
    client.put_object(Bucket=s3[5:], Key=f"{prefix}/table/b", Body=b"2")
    assert store.names("table") == ["a", "b"]
    assert store.get("table/b") == b"2"


def test_parts_put_by_another_process_can_be_read(s3):
    prefix, client = uuid.uuid4().hex, boto3.client("s3")
    out = folder(f"{s3}/{prefix}")
    out.write(0, {"image_embeddings": vectors(3)})
    assert out.done() == {0}  # the listing may now be remembered
    for part, rows in ((1, 5), (0, 900)):
        key = f"{prefix}/{part_name(out.name, 'image_embeddings', part)}"
        client.put_object(Bucket=s3[5:], Key=key, Body=encode(vectors(rows)))
        assert out.read("image_embeddings", part).equals(vectors(rows))
        assert out.read("image_embeddings", part, group=0).num_rows == rows


def test_no_part_of_a_file_is_ever_visible(tmp_path):
    """A reader that lists all the time sees complete files only, also while they are overwritten."""
    store, stop = Store(StoreSettings(root=str(tmp_path))), threading.Event()
    size, wrong, looks = 1_000_000, [], 0

    def look() -> None:
        nonlocal looks
        reader = Store(StoreSettings(root=str(tmp_path)))
        while not stop.is_set():
            for name in reader.names("table"):
                data = reader.get(f"table/{name}")
                if len(data) != size or data.strip(data[:1]):
                    wrong.append((name, len(data)))
                looks += 1

    thread = threading.Thread(target=look)
    thread.start()
    for i in range(60):
        store.put(f"table/part-{i % 4}", bytes([i]) * size)
    stop.set()
    thread.join()
    assert not wrong
    assert looks
    assert store.names("table") == ["part-0", "part-1", "part-2", "part-3"]
    assert len(list((tmp_path / "table").iterdir())) == 4


@contextlib.contextmanager
def full_disk(size: int):
    """Files cannot grow beyond `size` bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_failed_put_leaves_the_old_file(tmp_path):
    store = Store(StoreSettings(root=str(tmp_path)))
    store.put("table/old", b"old")
    for name in ("table/old", "table/new"):
        with full_disk(1000), pytest.raises(OSError, match="large"):
            store.put(name, bytes(5000))
    assert store.names("table") == ["old"]
    assert store.get("table/old") == b"old"
    store.put("table/new", bytes(5000))
    assert store.names("table") == ["new", "old"]


def test_a_killed_put_leaves_nothing_visible(tmp_path):
    code = (
        "import os, signal, sys, threading, time\n"
        "from tasks.store import Store, StoreSettings\n"
        "store = Store(StoreSettings(root=sys.argv[1]))\n"
        "os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)\n"
        "store.put('table/part', bytes(100_000))\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == -9
    store = Store(StoreSettings(root=str(tmp_path)))
    assert store.names("table") == []
    store.put("table/part", b"x")
    assert store.names("table") == ["part"]


# Parts of tables


def test_parts_come_back(root):
    out = folder(root, "image_embeddings", "listing")
    assert out.done() == set()
    for part in (2, 0, 11):
        out.write(part, {"image_embeddings": vectors(7, part, 100 * part), "listing": listing(part)})
    assert out.done() == {0, 2, 11}
    assert out.read("image_embeddings", 2).equals(vectors(7, 2, 200))
    assert out.read("listing", 0).num_rows == 0
    together = pa.concat_tables([vectors(7, p, 100 * p) for p in (0, 2, 11)])
    assert out.read_all("image_embeddings").equals(together)
    assert out.read_all("listing").num_rows == 13
    assert out.store.names(f"{out.name}/listing") == ["part-00000.parquet", "part-00002.parquet", "part-00011.parquet"]
    assert folder(root, fingerprint="another").done() == set()


def test_parts_are_numbered_without_end(root):
    out = folder(root)
    out.write(123_456, {"image_embeddings": vectors(1)})
    assert out.done() == {123_456}


def test_strange_names_are_no_parts(root):
    out = folder(root)
    for name in (
        "part-1.parquet",
        "part-00001.parquet.tmp",
        "part-0000x.parquet",
        "xpart-00001.parquet",
        "part-00001.csv",
    ):
        out.store.put(f"{out.name}/image_embeddings/{name}", b"x")
    assert out.done() == set()


def test_a_part_written_again_is_the_same_object(root):
    out = folder(root)
    out.write(0, {"image_embeddings": vectors(50)})
    first = out.store.get(part_name(out.name, "image_embeddings", 0))
    out.write(0, {"image_embeddings": vectors(50)})
    assert out.store.get(part_name(out.name, "image_embeddings", 0)) == first
    assert out.done() == {0}


def test_the_bytes_are_the_same_on_disk_and_on_s3(s3, tmp_path):
    for root in (str(tmp_path), s3):
        folder(root).write(0, {"image_embeddings": vectors(500)}, {"image_embeddings": [200, 300]})
    name = part_name(folder(s3).name, "image_embeddings", 0)
    on_disk, on_s3 = (Store(StoreSettings(root=root)).get(name) for root in (str(tmp_path), s3))
    assert on_disk == on_s3


@pytest.mark.parametrize("failing", ["first", "last"])
def test_the_first_named_table_comes_last(root, failing):
    """A write that fails at one of two tables never leaves a part that looks done."""
    names = ("image_embeddings", "listing")
    good = {"image_embeddings": vectors(3), "listing": listing(3)}
    bad = {"first": "image_embeddings", "last": "listing"}[failing]
    out = folder(root, *names)
    with pytest.raises(AssertionError, match=bad):
        out.write(0, good | {bad: good[bad].rename_columns([f"x{i}" for i in range(good[bad].num_columns)])})
    assert out.done() == set()
    assert out.store.names(f"{out.name}/image_embeddings") == []
    out.write(0, good)
    assert out.done() == {0}


@pytest.mark.parametrize("blocked", ["image_embeddings", "listing"])
def test_a_failure_of_the_disk_between_two_tables(tmp_path, blocked):
    out = folder(str(tmp_path), "image_embeddings", "listing")
    (tmp_path / out.name).mkdir(parents=True)
    (tmp_path / out.name / blocked).write_text("a file where the folder of the table should be")
    with pytest.raises(OSError, match=blocked):
        out.write(0, {"image_embeddings": vectors(3), "listing": listing(3)})
    assert out.done() == set()
    there = (tmp_path / out.name / "listing" / "part-00000.parquet").exists()
    assert there == (blocked == "image_embeddings")
    assert not (tmp_path / out.name / "image_embeddings" / "part-00000.parquet").exists()
    (tmp_path / out.name / blocked).unlink()
    out.write(0, {"image_embeddings": vectors(3), "listing": listing(3)})
    assert out.done() == {0}


def test_every_table_must_be_written(root):
    out = folder(root, "image_embeddings", "listing")
    for written in ({"image_embeddings": vectors(1)}, {"image_embeddings": vectors(1), "crops": listing(1)}):
        with pytest.raises(AssertionError, match="probing writes"):
            out.write(0, written)
    assert out.done() == set()


def test_one_row_group_at_a_time(root):
    out, table, lengths = folder(root), vectors(60), [10, 0, 25, 1, 24]
    out.write(0, {"image_embeddings": table}, {"image_embeddings": lengths})
    start = 0
    for group, rows in enumerate(lengths):
        assert out.read("image_embeddings", 0, group=group).equals(table.slice(start, rows))
        start += rows
    assert out.read("image_embeddings", 0).equals(table)


def test_columns_come_in_the_order_asked_for(root):
    out = folder(root, "listing")
    out.write(0, {"listing": listing(9)}, {"listing": [4, 5]})
    for columns in (["label", "image"], ["image", "label"], ["uri"]):
        expected = listing(9).select(columns)
        assert out.read("listing", 0, columns=columns).equals(expected)
        assert out.read("listing", 0, columns=columns, group=1).equals(expected.slice(4))
        assert out.read_all("listing", columns=columns).equals(expected)


def test_filters(root):
    out = folder(root, "listing")
    out.write(0, {"listing": listing(9)}, {"listing": [4, 5]})
    found = out.read("listing", 0, columns=["image_id"], filters=[("image", ">=", 3), ("image", "<", 6)])
    assert found["image_id"].to_pylist() == ["3.jpg", "4.jpg", "5.jpg"]


def test_a_table_of_another_shape_is_not_read(root):
    out = folder(root)
    out.store.put(part_name(out.name, "image_embeddings", 0), encode(pa.table({"image": [1, 2]})))
    with pytest.raises(AssertionError, match="image_embeddings"):
        out.read("image_embeddings", 0)


def test_a_folder_travels_between_processes(root):
    out = folder(root)
    out.write(0, {"image_embeddings": vectors(4)})
    copy = pickle.loads(pickle.dumps(out))
    assert copy == out
    assert "store" not in vars(copy)
    assert copy.read("image_embeddings", 0).equals(vectors(4))


# Bytes of a table


@settings(max_examples=40)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.lists(st.integers(1, 199), max_size=4))
def test_encoding_is_deterministic_and_cuts_the_row_groups(lengths, cuts):
    table = vectors(sum(lengths))
    data = encode(table, lengths)
    edges = sorted({0, table.num_rows, *(c for c in cuts if c < table.num_rows)})
    pieces = [table.slice(a, b - a) for a, b in pairwise(edges)]
    assert encode(pa.concat_tables(pieces) if pieces else table, lengths) == data
    parquet = pq.ParquetFile(pa.BufferReader(data))
    assert [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)] == lengths
    assert parquet.read().equals(table)


def test_encoding_a_slice_is_encoding_its_rows():
    assert encode(vectors(100).slice(30, 20)) == encode(vectors(100).take(list(range(30, 50))))


def test_row_groups_must_cover_the_table():
    with pytest.raises(AssertionError, match="cover"):
        encode(vectors(10), [4, 5])


def test_fingerprint():
    assert fingerprint({"a": 1, "b": {"c": [1, 2], "d": None}}) == fingerprint({"b": {"d": None, "c": [1, 2]}, "a": 1})
    changed = [{"a": 1}, {"a": 2}, {"a": "1"}, {"b": 1}, {"a": [1, 2]}, {"a": [2, 1]}, {}]
    found = {fingerprint(value) for value in changed}
    assert len(found) == len(changed)
    assert all(len(f) == 16 and set(f) <= set("0123456789abcdef") for f in found)
    assert fingerprint({"a": 1}) == "f9d86028c6e0d64e"


@given(st.text())
def test_hash64_is_63_bits(text):
    assert 0 <= hash64(text) < 2**63
    assert np.int64(hash64(text)) == hash64(text)


def test_hash64_is_the_same_everywhere():
    assert hash64("a/1.jpg") == int.from_bytes(bytes.fromhex("005946bf35099759"), "big")
    assert len({hash64(str(i)) for i in range(10_000)}) == 10_000


# Settings


@pytest.mark.parametrize(
    "options",
    [
        {"key": "x"},
        {"secret": "x"},
        *({name: "x"} for name in ("Authorization", "auth", "cookie", "pwd", "sas", "blob_sas")),
        {"headers": [{"Cookie": "x"}]},
        {"token": "x"},
        {"db_password": "x"},
        {"SECRET": "x"},
        {"account_key": "x"},
        {"sas_token": "x"},
        {"connection_string": "x"},
        {"client_kwargs": {"aws_secret_access_key": "x"}},
        {"client_kwargs": {"aws_access_key_id": "x"}},
        {"a": {"b": {"aws_session_token": "x"}}},
    ],
)
def test_secrets_are_refused(options):
    with pytest.raises(ValueError, match=r"^store\.options\.[\w.]+: secrets come from the environment") as caught:
        StoreSettings(root="s3://bucket", options=options)
    names = re.findall(r'"(\w+)":', json.dumps(options))
    assert all(name in str(caught.value) for name in names)


def test_harmless_options_are_passed_on(tmp_path):
    options = {"auto_mkdir": True, "use_listings_cache": False, "nested": {"region_name": "us-east-1"}}
    assert StoreSettings(root=str(tmp_path), options=options).options == options
    kms = {"s3_additional_kwargs": {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": "alias/x"}, "anon": True}
    assert StoreSettings(root="s3://bucket", options=kms).options == kms
    store = Store(StoreSettings(root=str(tmp_path), options={"auto_mkdir": True}))
    assert store.fs.auto_mkdir


def test_a_root_is_needed():
    with pytest.raises(ValueError, match=r"store\.root"):
        StoreSettings(root="")


def test_the_root_is_where_things_lie(root):
    store = Store(StoreSettings(root=root))
    store.put("stage/fp/table/part-00000.parquet", b"x")
    fs, path = fsspec.core.url_to_fs(root)
    assert fs.cat_file(f"{path.rstrip('/')}/stage/fp/table/part-00000.parquet") == b"x"


def test_report_adds_up_the_time_of_its_phases():
    report = PartReport(3)
    for _ in range(3):
        with report.phase("read"):
            pass
    first = report.seconds["read"]
    with pytest.raises(KeyError), report.phase("read"):
        raise KeyError
    assert report.seconds["read"] > first > 0
    assert list(report.seconds) == ["read"]
    assert pickle.loads(pickle.dumps(report)) == report


# Tables


def test_every_column_has_a_sentence():
    for name, columns in COLUMNS.items():
        assert SCHEMAS[name].names == list(columns)
        for column, (dtype, sentence) in columns.items():
            assert SCHEMAS[name].field(column).type == dtype
            assert len(sentence) > 5, (name, column)


def test_one_name_has_one_type():
    """Keys that travel can be joined."""
    for key in ("image", "image_id", "layer", "unit", "concept_id", "crop_id", "tail", "rank", "x0", "x1"):
        types = {schema.field(key).type for schema in SCHEMAS.values() if key in schema.names}
        assert len({t.value_type if pa.types.is_list(t) else t for t in types}) == 1, key


def test_tables_have_all_columns_and_no_other():
    good = {"image": [1], "embedding": [[0.5]]}
    assert make_table("image_embeddings", dict(reversed(good.items()))).column_names == ["image", "embedding"]
    for bad in ({"image": [1]}, good | {"more": [1]}, {}):
        with pytest.raises(AssertionError, match="image_embeddings"):
            make_table("image_embeddings", bad)


def test_check():
    table = vectors(3)
    assert check("image_embeddings", table) is table
    marked = table.replace_schema_metadata({"a": "b"})
    assert check("image_embeddings", marked) is marked
    assert check("image_embeddings", table.select(["embedding"]), ["embedding"]).num_rows == 3
    wrong = table.set_column(0, "image", table["image"].cast(pa.int64()))
    for bad, columns in ((wrong, None), (table.select(["image"]), None), (table, ["image"]), (listing(3), None)):
        with pytest.raises(AssertionError, match="image_embeddings"):
            check("image_embeddings", bad, columns)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(5, 3), (1, 1), (0, 3), (4, 0)])
def test_list_columns_are_matrices(dtype, shape):
    values = np.random.default_rng(0).normal(size=shape).astype(dtype)
    table = make_table("image_embeddings", {"image": range(shape[0]), "embedding": values})
    assert check("image_embeddings", table) is table
    found = matrix(table["embedding"], shape[1])
    assert found.shape == shape
    assert found.dtype == np.float16
    assert np.array_equal(found, values.astype(np.float16))


def test_matrix_of_a_transposed_array_a_slice_and_chunks():
    values = np.arange(60, dtype=np.float16).reshape(5, 12).T
    column = make_table("image_embeddings", {"image": range(12), "embedding": values})["embedding"]
    assert np.array_equal(matrix(column), values)
    assert np.array_equal(matrix(column.slice(3, 4)), values[3:7])
    assert np.array_equal(
        matrix(pa.chunked_array([column.slice(7).chunk(0), column.slice(2, 3).chunk(0)])),
        values[[7, 8, 9, 10, 11, 2, 3, 4]],
    )
    assert matrix(column.slice(0, 0), 5).shape == (0, 5)
    assert matrix(column.chunk(0)).shape == (12, 5)


def test_nulls_are_kept():
    found = listing(3)["offset"]
    assert found.null_count == 3
    assert tables.check("listing", listing(3))["row"].to_pylist() == [None] * 3
