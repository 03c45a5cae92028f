"""Probing datasets: the same images have the same ids, bytes, splits and digest wherever they lie, on disk or on S3;
tars and Parquet files give exactly the stored bytes; what cannot be used is named or counted; every choice made later
(order, splits, stored, sampled, batches) is fixed by content, whatever the shards.
"""

import io
import json
import pickle
import random
import shutil
import tarfile
import tracemalloc
import uuid
from functools import partial
from pathlib import Path

import boto3
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tasks.decoding import AHEAD, from_processes
from tasks.images import SPLITS, ImageList, ImageReader, decoded_there, image_column
from tasks.listing import list_images
from tasks.pixels import BadImage, Preprocess, decode
from tasks.probing import ProbingJob, ProbingSettings, ProbingWorker, split_of
from tasks.store import Folder, StoreSettings
from tasks.tables import make_table


@pytest.fixture(params=["local", "file", "memory", "s3"])
def place(request, tmp_path) -> str:
    """URI of an empty folder."""
    if request.param == "s3":
        return f"{request.getfixturevalue('s3')}/{uuid.uuid4().hex}"
    folder = {"local": tmp_path / "data", "file": f"file://{tmp_path}/data", "memory": f"memory://{uuid.uuid4().hex}"}
    return str(folder[request.param])


def jpeg(seed: int, width: int = 20, height: int = 16) -> bytes:
    buffer = io.BytesIO()
    colour = tuple(int(v) for v in np.random.default_rng(seed).integers(0, 256, 3))
    image = Image.new("RGB", (width, height), colour)
    image.putpixel((seed % width, seed % height), (255, 255, 255))
    image.save(buffer, "JPEG")
    return buffer.getvalue()


def write(place: str, files: dict[str, bytes]) -> str:
    fs, root = fsspec.core.url_to_fs(place)
    for name, data in files.items():
        fs.makedirs(f"{root}/{name}".rsplit("/", 1)[0], exist_ok=True)
        fs.pipe_file(f"{root}/{name}", data)
    return place


def listed(uri, **options) -> list[dict]:
    return list_images(ProbingSettings(uri=uri, **options))[0]


def ids(uri, **options) -> list[str]:
    return [row["image_id"] for row in listed(uri, **options)]


def contents(rows: list[dict]) -> list[bytes]:
    reader = ImageReader({})
    return [reader.read(row["uri"], row["offset"], row["length"], row["row"]) for row in rows]


def tar(members: dict[str, bytes | None], kind: int = tarfile.PAX_FORMAT, mode: str = "w") -> bytes:
    """Bytes of a tar; None is a folder."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode, format=kind) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.type, info.size = (tarfile.DIRTYPE, 0) if data is None else (tarfile.REGTYPE, len(data))
            archive.addfile(info, io.BytesIO(data or b""))
    return buffer.getvalue()


def parquet(columns: dict, rows: int = 3, features: dict | None = None) -> bytes:
    """Bytes of a Parquet file with `rows` rows in a group, as Hugging Face writes it where features are given."""
    table, buffer = pa.table(columns), io.BytesIO()
    if features:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, buffer, row_group_size=rows)
    return buffer.getvalue()


def hugging_face(images: list[bytes], labels: list | None = None, names: tuple = ("cat", "dog", "eel")) -> bytes:
    image = pa.array([{"bytes": b, "path": f"{i}.jpg"} for i, b in enumerate(images)])
    columns = {"image": image} | ({"label": pa.array(labels, pa.int64())} if labels else {})
    features = {"image": {"_type": "Image"}, "label": {"names": list(names), "_type": "ClassLabel"}}
    return parquet(columns, features=features)


def probe(tmp_path: Path, uri, **options) -> tuple[ImageList, list]:
    """The whole stage, shard by shard."""
    chosen = ProbingSettings(uri=uri, **({"shard_size": 4, "batch_size": 2} | options))
    store = StoreSettings(root=str(tmp_path / uuid.uuid4().hex))
    listing, out = Folder(store, "listing", "0", ("listing",)), Folder(store, "probing", "0", ("images",))
    rows, _ = list_images(chosen)
    listing.write(0, {"listing": make_table("listing", {k: [r[k] for r in rows] for k in rows[0]})})
    worker = ProbingWorker(ProbingJob(out, listing, chosen))
    reports = [worker.run(part) for part in range(-(-len(rows) // chosen.shard_size))]
    images = ImageList(out, chosen.shard_size, chosen.batch_size, chosen.pooled_max, chosen.options)
    assert sum(report.rows["images"] for report in reports) == len(images) == len(rows)
    return images, reports


# Folders


TREE = {
    "b/2.jpg": jpeg(2),
    "a/1.jpg": jpeg(1),
    "a/deep/er/3.JPEG": jpeg(3),
    "a/10.png": jpeg(10),
    "top.webp": jpeg(4),
    "a/notes.txt": b"no image",
    "a/.hidden.jpg": jpeg(5),
    "a/._1.jpg": b"resource fork",
    ".thumbnails/1.jpg": jpeg(6),
    "b/.cache/2.jpg": jpeg(7),
    "labels.csv": b"a,b",
}
TREE_IDS = ["a/1.jpg", "a/10.png", "a/deep/er/3.JPEG", "b/2.jpg", "top.webp"]
TREE_LABELS = ["a", "a", "er", "b", None]


def test_folder(place):
    rows = listed(write(place, TREE))
    assert [row["image_id"] for row in rows] == TREE_IDS
    assert [row["label"] for row in rows] == TREE_LABELS
    assert [row["image"] for row in rows] == [0, 1, 2, 3, 4]
    assert contents(rows) == [TREE[name] for name in TREE_IDS]
    assert make_table("listing", {k: [r[k] for r in rows] for k in rows[0]}).num_rows == 5


def test_flat_folder_without_labels(place):
    rows = listed(write(place, {f"{i}.jpg": jpeg(i) for i in range(3)}))
    assert [(row["image_id"], row["label"]) for row in rows] == [(f"{i}.jpg", None) for i in range(3)]


def test_a_trailing_slash_changes_nothing(place):
    write(place, TREE)
    assert ids(f"{place}/") == TREE_IDS


def test_a_folder_inside_a_hidden_folder(tmp_path):
    assert ids(write(f"{tmp_path}/.data/set", TREE)) == TREE_IDS


def test_one_file(place):
    write(place, TREE)
    assert ids(f"{place}/a/1.jpg") == ["1.jpg"]
    assert contents(listed(f"{place}/a/1.jpg")) == [TREE["a/1.jpg"]]


def test_glob(place):
    write(place, TREE)
    assert ids(f"{place}/a/*.jpg") == ["1.jpg"]
    assert ids(f"{place}/*/*.jpg") == ["a/1.jpg", "b/2.jpg"]
    rows = listed(f"{place}/**/1*")
    assert [row["image_id"] for row in rows] == ["a/1.jpg", "a/10.png"]
    assert contents(rows) == [TREE["a/1.jpg"], TREE["a/10.png"]]


ODD_NAMES = [
    "a b.jpg",
    "a#b.jpg",
    "a%20b.jpg",
    "[x].jpg",
    "what?.jpg",
    "st*r.jpg",
    "a::b.jpg",
    "K\u00e4se.jpg",
    "q'\"&<i>.jpg",
]


def test_odd_file_names(place):
    files = {name: jpeg(i) for i, name in enumerate(ODD_NAMES)}
    rows = listed(write(f"{place}/set [2020] *", files))
    assert [row["image_id"] for row in rows] == sorted(ODD_NAMES)
    assert contents(rows) == [files[name] for name in sorted(ODD_NAMES)]


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_odd_names_of_files_of_files(tmp_path, kind):
    data = hugging_face([jpeg(1)]) if kind == "parquet" else tar({"a::b [1].jpg": jpeg(1)})
    assert contents(listed(write(f"{tmp_path}/a", {f"x::y#[1].{kind}": data}))) == [jpeg(1)]


# Several URIs


def test_several_folders_with_clashing_names(place):
    for folder in ("x/train", "x/val", "y/train"):
        write(f"{place}/{folder}", {"cat/1.jpg": jpeg(len(folder)), "1.jpg": jpeg(2)})
    assert ids([f"{place}/x/train", f"{place}/x/val"]) == [
        f"{s}/{f}" for s in ("train", "val") for f in ("1.jpg", "cat/1.jpg")
    ]
    three = [f"{place}/x/train", f"{place}/x/val/", f"{place}/y/train"]
    found = ids(three)
    assert found == [f"{s}/{f}" for s in ("x/train", "x/val", "y/train") for f in ("1.jpg", "cat/1.jpg")]
    assert len(set(found)) == len(found)
    assert set(ids(three[::-1])) == set(found)
    rows = {row["image_id"]: row for row in listed(three)}
    assert rows["x/val/cat/1.jpg"]["label"] == "cat"
    assert contents([rows["x/val/cat/1.jpg"]]) == [jpeg(5)]


def test_several_kinds_at_once(place):
    write(f"{place}/p", {"1.jpg": jpeg(1)})
    write(place, {"q.tar": tar({"1.jpg": jpeg(2)}), "r.parquet": hugging_face([jpeg(3)])})
    rows = listed([f"{place}/p", f"{place}/q.tar", f"{place}/r.parquet"])
    assert len({row["image_id"] for row in rows}) == 3
    assert contents(rows) == [jpeg(1), jpeg(2), jpeg(3)]


def test_a_uri_twice_is_refused(tmp_path):
    folder = write(f"{tmp_path}/a", {"1.jpg": jpeg(1)})
    for twice in ([folder, folder], [folder, f"{folder}/"], [folder, f"file://{folder}"]):
        assert "twice" in message(twice)


def test_overlapping_relative_uris_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(f"{tmp_path}/x", {"1.jpg": jpeg(1), "x/1.jpg": jpeg(1)})
    assert "x/x/1.jpg" in message(["x", "x/x"])


# Tars


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_webdataset(place, kind):
    long = "d/" * 30 + "e" * 60
    members = {
        "0001.jpg": jpeg(1, 60, 60),
        "0001.cls": b"7\n",
        "0001.json": b"{}",
        "things.cls": None,
        "things.cls/0002.png": jpeg(2),
        "sub/0003.cls": b"tabby cat",
        "sub/0003.webp": jpeg(3),
        ".hidden.jpg": jpeg(4),
        f"{long}.jpg": jpeg(5),
        "sub/0004.jpg": b"",
        "read.me": b"x" * 5000,
    }
    write(place, {"train/shard-1.tar": tar(members, kind), "shard-0.tar": tar({"0001.jpg": jpeg(6)}), "index.txt": b""})
    rows = listed(place)
    names = ["0001.jpg", "things.cls/0002.png", "sub/0003.webp", f"{long}.jpg", "sub/0004.jpg"]
    assert [row["image_id"] for row in rows] == ["shard-0.tar/0001.jpg", *(f"train/shard-1.tar/{n}" for n in names)]
    assert [row["label"] for row in rows] == [None, "7", None, "tabby cat", None, None]
    assert contents(rows) == [jpeg(6), *(members[n] for n in names)]


def test_one_tar_is_the_same_as_its_folder(place):
    write(place, {"a.tar": tar({"x/1.jpg": jpeg(1)})})
    assert ids(f"{place}/a.tar") == ids(place) == ids(f"{place}/*.tar") == ["a.tar/x/1.jpg"]


@settings(max_examples=25)
@given(
    st.dictionaries(
        st.from_regex(r"[a-z]{1,9}\.(jpg|png|txt|cls)", fullmatch=True), st.binary(max_size=1500), max_size=9
    )
)
def test_tar_members_are_read_exactly(members):
    uri = f"memory://{uuid.uuid4().hex}"
    write(uri, {"a.tar": tar({"first.jpg": b"first"} | members)})
    images = {n: d for n, d in ({"first.jpg": b"first"} | members).items() if n.endswith(("jpg", "png"))}
    rows = listed(uri)
    assert [row["image_id"] for row in rows] == [f"a.tar/{n}" for n in images]
    assert contents(rows) == list(images.values())


# Parquet


def test_hugging_face_parquet(place):
    images = [jpeg(i, 20 + i, 16) for i in range(11)]
    labels = [i % 3 for i in range(10)] + [-1]
    files = {
        "data/train-0.parquet": hugging_face(images, labels),
        "data/train-1.parquet": hugging_face(images[:4][::-1]),
    }
    rows = listed(write(place, files))
    found = [f"data/train-0.parquet/{i}" for i in range(11)] + [f"data/train-1.parquet/{i}" for i in range(4)]
    assert [row["image_id"] for row in rows] == found
    assert [row["row"] for row in rows] == [*range(11), *range(4)]
    names = ["cat", "dog", "eel"]
    assert [row["label"] for row in rows] == [*(names[i % 3] for i in range(10)), None, None, None, None, None]
    assert contents(rows) == images + images[:4][::-1]
    mixed = random.Random(0).sample(range(15), 15)
    assert contents([rows[i] for i in mixed]) == [(images + images[:4][::-1])[i] for i in mixed]


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_plain_binary_column(place, kind):
    images = [jpeg(i) for i in range(7)]
    columns = {"label": ["x", "y", None] * 2 + ["z"], "id": range(7), "img": pa.array(images, kind)}
    rows = listed(write(place, {"a.parquet": parquet(columns, 2)}))
    assert [row["label"] for row in rows] == ["x", "y", None, "x", "y", None, "z"]
    assert contents(rows) == images


def test_integer_labels_without_names(tmp_path):
    columns = {"fine_label": [3, 5, None], "image": [jpeg(i) for i in range(3)]}
    assert [r["label"] for r in listed(write(f"{tmp_path}/a", {"a.parquet": parquet(columns)}))] == ["3", "5", None]


def test_several_labels_of_an_image(tmp_path):
    columns = {"labels": [[0, 1], [1]], "image": [jpeg(i) for i in range(2)]}
    features = {"labels": [{"names": ["a", "b"], "_type": "ClassLabel"}]}
    rows = listed(write(f"{tmp_path}/a", {"a.parquet": parquet(columns, features=features)}))
    assert contents(rows) == [jpeg(0), jpeg(1)]


def test_image_column():
    struct = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    for expected, schema in {
        "image": {"another": pa.binary(), "image": struct},
        "jpg": {"json": pa.binary(), "jpg": pa.binary()},
        "picture": {"id": pa.int64(), "image": pa.string(), "picture": struct},
    }.items():
        assert image_column(pa.schema(list(schema.items())), "a.parquet") == expected


def test_empty_row_groups(tmp_path):
    buffer, table = io.BytesIO(), pa.table({"image": [jpeg(i) for i in range(4)]})
    with pq.ParquetWriter(buffer, table.schema) as writer:
        for start, rows in ((0, 0), (0, 1), (1, 0), (1, 3), (4, 0)):
            writer.write_table(table.slice(start, rows))
    assert pq.ParquetFile(buffer).num_row_groups == 5
    assert contents(listed(write(f"{tmp_path}/a", {"a.parquet": buffer.getvalue()}))) == [jpeg(i) for i in range(4)]


def test_nested_options_of_the_file_system(s3):
    uri = write(f"{s3}/{uuid.uuid4().hex}", {"a.parquet": hugging_face([jpeg(i) for i in range(5)])})
    options = {"client_kwargs": {"region_name": "us-east-1"}, "config_kwargs": {"retries": {"max_attempts": 1}}}
    rows = listed(uri, options=options)
    assert [ImageReader(options).read(r["uri"], None, None, r["row"]) for r in rows] == [jpeg(i) for i in range(5)]


# Labels from a file


@pytest.mark.parametrize("kind", ["txt", "json"])
def test_labels_file(place, kind):
    text = {
        "txt": "1.jpg n01440764\n\nmy cat.jpg\told cat\n",
        "json": json.dumps({"1.jpg": "n01440764", "my cat.jpg": "old cat"}),
    }
    write(place, {"1.jpg": jpeg(1), "2.jpg": jpeg(2), "my cat.jpg": jpeg(3), f"labels.{kind}": text[kind].encode()})
    assert [r["label"] for r in listed(place, labels=f"{place}/labels.{kind}")] == ["n01440764", None, "old cat"]


def test_other_labels_are_another_listing(tmp_path):
    write(f"{tmp_path}/a", {"1.jpg": jpeg(1)})
    stamps = []
    for label in ("golden retriever", "dog", "dog"):
        (tmp_path / "labels.txt").write_text(f"1.jpg {label}\nelsewhere.JPEG tench\n")
        rows, stamp = list_images(ProbingSettings(f"{tmp_path}/a", labels=f"{tmp_path}/labels.txt"))
        assert rows[0]["label"] == label
        stamps.append(stamp)
    assert stamps[0] != stamps[1] == stamps[2]
    (tmp_path / "labels.txt").write_text("one.jpg dog\n")
    with pytest.raises(ValueError, match=r"^probing\.labels=.*none of its 1 entries is of an image there"):
        listed(f"{tmp_path}/a", labels=f"{tmp_path}/labels.txt")


def test_folders_that_are_links_are_followed(tmp_path):
    write(f"{tmp_path}/data", {"cat/1.jpg": jpeg(1), "2.jpg": jpeg(2)})
    (tmp_path / "set").mkdir()
    (tmp_path / "set/tabby").symlink_to(tmp_path / "data/cat")
    (tmp_path / "set/two.jpg").symlink_to(tmp_path / "data/2.jpg")
    found = listed(f"{tmp_path}/set")
    assert [(r["image_id"], r["label"]) for r in found] == [("tabby/1.jpg", "tabby"), ("two.jpg", None)]
    assert [ImageReader({}).read(r["uri"], None, None, None) for r in found] == [jpeg(1), jpeg(2)]
    (tmp_path / "data/cat/all").symlink_to(tmp_path / "data/cat")
    with pytest.raises(ValueError, match=r"^probing\.uri=.*tabby/all is a link to"):
        listed(f"{tmp_path}/set")


def test_a_folder_that_moves_is_listed_anew(tmp_path, monkeypatch):
    """The listing holds whole paths, also where the user gave none."""
    monkeypatch.chdir(tmp_path)
    write(f"{tmp_path}/one/photos", {"1.jpg": jpeg(1)})
    stamps = []
    for place in ("one", "two"):
        monkeypatch.chdir(tmp_path / place)
        stamps.append(list_images(ProbingSettings("photos"))[1])
        if place == "one":
            (tmp_path / "one").rename(tmp_path / "two")
    assert stamps[0] != stamps[1]


@pytest.mark.parametrize(
    ("name", "text"), [("l.txt", "1.jpg\n"), ("l.json", "[1"), ("l.json", "[1, 2]"), ("l.txt", None)]
)
def test_bad_labels_file(tmp_path, name, text):
    write(f"{tmp_path}/a", {"1.jpg": jpeg(1)} | ({name: text.encode()} if text else {}))
    with pytest.raises(ValueError, match=r"^probing\.labels=.*expected lines") as caught:
        listed(f"{tmp_path}/a", labels=f"{tmp_path}/a/{name}")
    assert "\n" not in str(caught.value)


# What is refused, and how


def message(uri, **options) -> str:
    with pytest.raises(ValueError, match=r"probing\.uri") as caught:
        list_images(ProbingSettings(uri=uri, **options))
    assert type(caught.value) is ValueError
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("uri", [None, "", [], [""]])
def test_no_uri(uri):
    assert "missing" in message(uri)


def test_missing_folder(place):
    write(place, TREE)
    for uri in (f"{place}/nothing", f"{place}/a/none.jpg", f"{place}/none/*.jpg"):
        assert f"probing.uri={uri}: " in message(uri)
        assert f"probing.uri={uri}: " in message([f"{place}/a", uri])


def test_missing_bucket(s3):
    assert "probing.uri=s3://no-such-bucket-here/a: " in message("s3://no-such-bucket-here/a")


def test_empty_folder(tmp_path):
    assert f"probing.uri={tmp_path}: " in message(str(tmp_path))


def test_folder_without_images(place):
    found = message(write(place, {"a.txt": b"x", "b/c.csv": b"y", ".d.jpg": jpeg(1)}))
    assert f"probing.uri={place}: " in found
    assert ".jpg" in found


@pytest.mark.parametrize("uri", ["s4://bucket/x", "zip://a.jpg::b.zip", "simplecache::s3://bucket/a"])
def test_unusable_uri(uri):
    assert f"probing.uri={uri}: " in message(uri)


def test_no_credentials(s3, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    options = {"client_kwargs": {"region_name": "eu-west-1"}}  # a connection of its own
    assert f"probing.uri={s3}/a: " in message(f"{s3}/a", options=options)


def test_mixed_formats(place):
    write(place, {"1.jpg": jpeg(1), "a.tar": tar({"2.jpg": jpeg(2)}), "b.parquet": hugging_face([jpeg(3)])})
    found = message(place)
    assert f"probing.uri={place} " in found
    assert "probing.format" in found
    assert ids(place, format="folder") == ["1.jpg"]
    assert ids(place, format="webdataset") == ["a.tar/2.jpg"]
    assert ids(place, format="parquet") == ["b.parquet/0"]


def test_wrong_format(place):
    write(place, TREE)
    found = message(place, format="parquet")
    assert f"probing.uri={place}: " in found
    assert "parquet" in found


BAD_TARS = {
    "text": b"this is no tar" * 99,
    "empty": b"",
    "gzip": tar({"1.jpg": jpeg(1)}, mode="w:gz"),
    "cut": tar({"1.jpg": jpeg(1), "2.jpg": bytes(9000)})[:-12_000],
    "damaged": tar({"1.jpg": bytes(600), "2.jpg": bytes(600), "3.jpg": bytes(600)}).replace(b"2.jpg", b"\xff.jpg"),
}


@pytest.mark.parametrize("kind", BAD_TARS)
def test_bad_tar(place, kind):
    found = message(write(place, {"good.tar": tar({"1.jpg": jpeg(1)}), "x/bad.tar": BAD_TARS[kind]}))
    assert "x/bad.tar" in found
    assert place.split("://")[-1].strip("/") in found


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz"])
def test_compressed_tar(place, name):
    write(place, {name: tar({"1.jpg": jpeg(1)}, mode="w:gz")})
    for uri in (place, f"{place}/{name}"):
        found = message(uri)
        assert f"probing.uri={uri}: " in found
        assert ".tar" in found


def test_tar_without_images(place):
    write(place, {"a.tar": tar({"1.txt": b"x", "1.cls": b"0"})})
    assert f"probing.uri={place}: " in message(place)


def test_parquet_without_images(place):
    found = message(write(place, {"a.parquet": parquet({"caption": ["x"], "image": ["a.jpg"]})}))
    assert "a.parquet" in found
    assert place.split("://")[-1].strip("/") in found
    assert "caption, image" in found


@pytest.mark.parametrize("data", [b"", b"garbage" * 99, hugging_face([jpeg(1)])[:-9]])
def test_bad_parquet(place, data):
    found = message(write(place, {"a.parquet": data}))
    assert "a.parquet" in found
    assert place.split("://")[-1].strip("/") in found


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("format", {"format": "zip"}),
        ("explain", {"explain": 0.5}),
        ("select", {"explain": 1.1, "select": -0.1, "validate": 0.0}),
        ("explain", {"explain": 0.0, "select": 0.5, "validate": 0.5}),
        ("batch_size", {"batch_size": 0}),
        ("shard_size", {"shard_size": 100, "batch_size": 32}),
        ("shard_size", {"shard_size": -32}),
        ("pooled_max", {"pooled_max": -1}),
        ("options.secret", {"options": {"secret": "x"}}),
        ("options.client_kwargs.aws_secret_access_key", {"options": {"client_kwargs": {"aws_secret_access_key": "x"}}}),
    ],
)
def test_settings_are_checked(name, options):
    with pytest.raises(ValueError, match=rf"probing\.{name}") as caught:
        ProbingSettings(**options)
    assert "\n" not in str(caught.value)


# The hash of the listing


def test_the_hash_changes_when_a_file_does(place):
    write(place, {"a/1.jpg": jpeg(1), "a/2.jpg": b"1234"})
    found = [list_images(ProbingSettings(uri=place))[1]]
    assert list_images(ProbingSettings(uri=place))[1] == found[0]
    for change in ({"a/2.jpg": b"4321"}, {"a/2.jpg": b"43210"}, {"a/3.jpg": b"x"}, {"b/3.jpg": b"x"}):
        write(place, change)
        found.append(list_images(ProbingSettings(uri=place))[1])
    assert len(set(found)) == 5


def test_changes_by_other_programs_are_seen(s3):
    prefix, client = uuid.uuid4().hex, boto3.client("s3")
    uri = write(f"{s3}/{prefix}", {"1.jpg": jpeg(1)})
    for pattern in (uri, f"{uri}/*.jpg"):
        before = list_images(ProbingSettings(uri=pattern))
        name = uuid.uuid4().hex + ".jpg"
        client.put_object(Bucket=s3[5:], Key=f"{prefix}/{name}", Body=jpeg(2))
        after = list_images(ProbingSettings(uri=pattern))
        assert len(after[0]) == len(before[0]) + 1
        assert after[1] != before[1]


# Splits


def test_splits_of_random_hashes_have_about_the_right_sizes():
    hashes = [random.Random(i).randbytes(32).hex() for i in range(2000)]
    for shares in ((0.7, 0.1, 0.2), (0.5, 0.25, 0.25), (1.0, 0.0, 0.0), (0.9, 0.1, 0.0)):
        found = [split_of(h, *shares[:2]) for h in hashes]
        for split, share in zip(SPLITS, shares, strict=True):
            assert abs(found.count(split) / 2000 - share) <= 4 * (share * (1 - share) / 2000) ** 0.5


def test_extreme_hashes():
    assert split_of("0" * 64, 0.7, 0.1) == "explain"
    assert split_of("f" * 64, 0.7, 0.1) == "validate"
    assert split_of("f" * 64, 1.0, 0.0) == "explain"


def test_an_image_keeps_its_split_when_shares_of_others_change():
    hashes = [random.Random(i).randbytes(32).hex() for i in range(500)]
    assert [split_of(h, 0.7, 0.1) == "explain" for h in hashes] == [split_of(h, 0.7, 0.2) == "explain" for h in hashes]


def test_copies_share_a_split(tmp_path):
    files = {f"{folder}/{name}-{i}.jpg": jpeg(i) for i in range(40) for folder, name in (("a", "one"), ("b", "other"))}
    files["tarred.png"] = jpeg(0)
    images, _ = probe(tmp_path, write(f"{tmp_path}/set", files))
    splits: dict[str, set] = {}
    for content, split in zip(images.column("content"), images.split, strict=True):
        splits.setdefault(content, set()).add(split)
    assert len(splits) == 40
    assert all(len(s) == 1 for s in splits.values())
    assert set.union(*splits.values()) == set(SPLITS)


# The worker


@pytest.mark.parametrize("kind", ["folder", "tar", "parquet"])
def test_shards_and_place_change_nothing(tmp_path, place, photos, kind):
    files = {str(p.relative_to(photos)): p.read_bytes() for p in sorted(photos.rglob("*.*"))}
    if kind == "tar":
        files = {"a.tar": tar(files)}
    elif kind == "parquet":
        files = {"a.parquet": hugging_face(list(files.values()))}
    whole, _ = probe(tmp_path, write(f"{tmp_path}/here", files), shard_size=100, batch_size=4)
    write(place, files)
    for shard_size, batch_size in ((1, 1), (5, 5), (12, 4), (24, 4), (100, 4)):
        images, reports = probe(tmp_path, place, shard_size=shard_size, batch_size=batch_size)
        assert len(reports) == images.num_shards == -(-24 // shard_size)
        assert images.table.drop_columns(["uri"]).equals(whole.table.drop_columns(["uri"]))
        assert (images.digest() == whole.digest()) == ((shard_size, batch_size) == (100, 4))
        assert np.array_equal(images.order, whole.order)
        assert np.array_equal(images.stored, whole.stored)
        assert np.array_equal(images.sampled, whole.sampled)
    data = contents(whole.table.to_pylist())
    assert data == contents(images.table.to_pylist())
    assert [decode(d).size for d in data] == list(zip(whole.column("width"), whole.column("height"), strict=True))
    assert set(whole.column("status")) == {"ok"}


def bad_files() -> dict[str, tuple[str, bytes]]:
    buffer = io.BytesIO()
    Image.new("RGB", (1, 5000)).save(buffer, "PNG")
    return {
        "empty.jpg": ("empty", b""),
        "text.jpg": ("not_an_image", b"hello"),
        "text2.png": ("not_an_image", b"hello again"),
        "cut.jpg": ("truncated", jpeg(1, 90, 90)[:-200]),
        "strip.png": ("too_narrow", buffer.getvalue()),
    }


def test_bad_images_are_counted_by_reason(tmp_path, place):
    bad = bad_files()
    good = {f"{i}.jpg": jpeg(i) for i in range(6)}
    images, reports = probe(tmp_path, write(place, good | {name: data for name, (_, data) in bad.items()}))
    statuses = dict(zip(images.ids, images.column("status"), strict=True))
    assert statuses == dict.fromkeys(good, "ok") | {name: why for name, (why, _) in bad.items()}
    counted: dict[str, int] = {}
    for report in reports:
        assert report.error is None
        assert set(report.seconds) == {"read", "compute", "write"}
        for why, n in report.skipped.items():
            counted[why] = counted.get(why, 0) + n
    assert counted == {"empty": 1, "not_an_image": 2, "truncated": 1, "too_narrow": 1}
    left_out = ~images.ok
    assert (images.column("width")[left_out] == 0).all()
    assert (images.column("height")[left_out] == 0).all()
    assert (images.split[left_out] == "").all()
    assert not images.stored[left_out].any()
    assert not images.sampled[left_out].any()


@pytest.mark.parametrize("kind", ["folder", "tar", "parquet", "fewer rows", "other columns"])
def test_files_that_change_after_the_listing(tmp_path, kind):
    """What has gone may come back (a disk that is not mounted), so it fails the part; what is damaged is counted."""
    files = {"1.jpg": jpeg(1), "2.jpg": jpeg(2), "3.jpg": jpeg(3)}
    if kind == "tar":
        files = {"a.tar": tar(files)}
    elif kind != "folder":
        files = {"a.parquet": hugging_face(list(files.values()))}
    chosen = ProbingSettings(uri=write(f"{tmp_path}/set", files), shard_size=4, batch_size=4)
    store = StoreSettings(root=f"{tmp_path}/store")
    listing, out = Folder(store, "listing", "0", ("listing",)), Folder(store, "probing", "0", ("images",))
    rows, _ = list_images(chosen)
    listing.write(0, {"listing": make_table("listing", {k: [r[k] for r in rows] for k in rows[0]})})
    changed = {"fewer rows": hugging_face([jpeg(1)]), "other columns": parquet({"a": [1, 2, 3]})}
    if kind in changed:
        (tmp_path / "set/a.parquet").write_bytes(changed[kind])
    else:
        (tmp_path / "set").rename(tmp_path / "gone")
        with pytest.raises(FileNotFoundError):
            ProbingWorker(ProbingJob(out, listing, chosen)).run(0)
        assert out.done() == set()
        (tmp_path / "gone").rename(tmp_path / "set")
    report = ProbingWorker(ProbingJob(out, listing, chosen)).run(0)
    assert report.skipped == {"fewer rows": {"unreadable": 2}, "other columns": {"unreadable": 3}}.get(kind, {})
    assert report.error is None
    assert out.done() == {0}


def test_damaged_rows_of_a_parquet_file_are_unreadable(tmp_path):
    data = bytearray(parquet({"image": [jpeg(i, 60, 60) for i in range(6)]}, rows=2))
    start = pq.ParquetFile(io.BytesIO(data)).metadata.row_group(1).column(0).data_page_offset
    data[start - 60 : start + 60] = bytes(120)
    images, reports = probe(tmp_path, write(f"{tmp_path}/set", {"a.parquet": bytes(data)}), shard_size=6, batch_size=6)
    assert list(images.column("status")) == ["ok", "ok", "unreadable", "unreadable", "ok", "ok"]
    assert reports[0].skipped == {"unreadable": 2}


def test_missing_bytes_in_parquet_are_empty(tmp_path):
    images = pa.array([{"bytes": jpeg(1), "path": "1.jpg"}, {"bytes": None, "path": "2.jpg"}, None])
    found, _ = probe(tmp_path, write(f"{tmp_path}/set", {"a.parquet": parquet({"image": images})}))
    assert list(found.column("status")) == ["ok", "empty", "empty"]


# The image list


def image_list(n: int, seed: int = 0, bad: float = 0.0, **sizes) -> ImageList:
    """A list of n images of which only the table exists."""
    rng = random.Random(seed)
    content = [rng.randbytes(32).hex() for _ in range(n)]
    columns = {
        "image": range(n),
        "image_id": [f"{rng.random()}/{i}.jpg" for i in range(n)],
        "uri": ["file:///x"] * n,
        **{name: [None] * n for name in ("offset", "length", "row", "label")},
        "width": [9] * n,
        "height": [9] * n,
        "content": content,
        "split": [split_of(c, 0.7, 0.1) for c in content],
        "status": ["truncated" if rng.random() < bad else "ok" for _ in range(n)],
    }
    return stored(make_table("images", columns), **sizes)


def stored(table: pa.Table, **sizes) -> ImageList:
    """The images of the table, numbered anew, as a list of two parts."""
    out = Folder(StoreSettings(root=f"memory://{uuid.uuid4().hex}"), "probing", "0", ("images",))
    table = table.set_column(0, "image", pa.array(range(len(table)), pa.int32()))
    for part in (0, 1):
        out.write(part, {"images": table.slice(part * 5, 5 if part == 0 else None)})
    return ImageList(out, **({"shard_size": 8, "batch_size": 4, "pooled_max": 10_000} | sizes), options={})


@settings(max_examples=40)
@given(st.integers(1, 200), st.integers(0, 99), st.integers(1, 9), st.integers(1, 9), st.integers(0, 60))
def test_choices_are_fixed_by_content(n, seed, batches, batch_size, pooled_max):
    sizes = {"shard_size": batches * batch_size, "batch_size": batch_size, "pooled_max": pooled_max}
    images = image_list(n, seed, 0.1, **sizes)
    assert sorted(images.order) == list(range(n))
    for split in SPLITS:
        members = images.split == split
        assert images.stored[members].sum() == min(pooled_max, members.sum())
    assert not images.stored[~images.ok].any()
    assert not images.sampled[~images.explain].any()
    assert images.sampled.any() == images.explain.any()
    others = image_list(n, seed, 0.1, shard_size=n, batch_size=1, pooled_max=pooled_max)
    for name in ("order", "stored", "sampled", "split"):
        assert np.array_equal(getattr(images, name), getattr(others, name)), name
    assert [i for part in range(images.num_shards) for i in images.shard(part)] == list(range(n))
    batches_of_all = [b for part in range(images.num_shards) for b in images.shard_batches(part)]
    assert np.array_equal(np.concatenate(batches_of_all), np.arange(n))
    for i, batch in enumerate(batches_of_all):  # cut on the global number, whatever the shard
        assert batch[0] == i * batch_size


def test_the_order_follows_the_id_and_not_the_place():
    images = image_list(300)
    shuffled = random.Random(1).sample(range(300), 300)
    moved = stored(images.table.take(shuffled))
    assert np.array_equal(np.argsort(images.order), np.array(shuffled)[np.argsort(moved.order)])
    assert abs(np.corrcoef(images.order, np.arange(300))[0, 1]) < 0.2


def test_what_is_stored_follows_the_content_and_not_the_place():
    images = image_list(300, pooled_max=20)
    shuffled = random.Random(1).sample(range(300), 300)
    moved = stored(images.table.take(shuffled), pooled_max=20)
    assert np.array_equal(images.stored[shuffled], moved.stored)
    assert np.array_equal(images.sampled[shuffled], moved.sampled)
    more = image_list(300, pooled_max=30)
    assert not (images.stored & ~more.stored).any()


def test_a_sixteenth_is_sampled():
    images = image_list(8000)
    share, count = images.sampled[images.explain].mean(), images.explain.sum()
    assert abs(share - 1 / 16) < 4 * (1 / 16 * 15 / 16 / count) ** 0.5


def test_the_mean_vector_is_summed_in_slices(monkeypatch):
    """Never all in float64 at once, and the same as if they were."""
    monkeypatch.setattr("tasks.images.ROWS", 256)
    images = image_list(8000)
    vectors = np.random.default_rng(0).normal(size=(8000, 16)).astype(np.float16)
    expected, whole = vectors[images.explain].astype(np.float64).mean(0), vectors.size * 8
    tracemalloc.start()
    found = images.mean_vector(vectors)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert peak < whole / 4
    assert np.array_equal(np.concatenate(images.explain_slices()), np.flatnonzero(images.explain))


def test_batches_are_padded_and_hold_the_decoded_pixels(tmp_path, photos):
    shutil.copytree(photos, tmp_path / "set")
    (tmp_path / "set/circle/bad.jpg").write_bytes(b"no image")
    images, _ = probe(tmp_path, str(tmp_path / "set"), shard_size=12, batch_size=4)
    preprocess, reader = Preprocess((40, 32), (44, 36), "cover"), ImageReader({})
    assert images.num_shards == 3
    assert [len(images.shard_batches(p)) for p in range(3)] == [3, 3, 1]
    seen = 0
    for part in range(3):
        numbers = images.shard_batches(part)
        for batch, group in zip(images.batches(numbers, preprocess), numbers, strict=True):
            assert batch.shape == (4, 40, 32, 3)
            for slot, pixels in enumerate(batch.numpy()):
                if slot >= len(group) or not images.ok[group[slot]]:
                    assert not pixels.any()
                    continue
                path = tmp_path / "set" / images.ids[group[slot]]
                assert np.array_equal(pixels, preprocess.pixels(decode(path.read_bytes())))
                assert images.open(int(group[slot]), reader).size == decode(path.read_bytes()).size
                seen += 1
    assert seen == 24


def test_batches_of_any_images_from_parquet(tmp_path, photos):
    data = [p.read_bytes() for p in sorted(photos.rglob("*.*"))]
    images, _ = probe(tmp_path, write(f"{tmp_path}/set", {"a.parquet": hugging_face(data)}))
    preprocess, numbers = (
        Preprocess((16, 16), (16, 16)),
        [np.array([23, 0]), np.array([7]), np.array([7, 12]), np.array([], int)],
    )
    found = [batch.numpy() for batch in images.batches(numbers, preprocess)]
    assert len(found) == 4
    for batch, group in zip(found, numbers, strict=True):
        for slot, image in enumerate(group):
            assert np.array_equal(batch[slot], preprocess.pixels(decode(data[image])))
        assert not batch[len(group) :].any()


def test_processes_decode_what_threads_do(tmp_path, photos):
    """As beside a GPU; an image that has gone is reported from there too."""
    shutil.copytree(photos, tmp_path / "set")
    images, _ = probe(tmp_path, str(tmp_path / "set"), shard_size=24, batch_size=8)
    preprocess = Preprocess((16, 16), (16, 16))
    groups = [np.arange(i % 24, min(i % 24 + i % 4, 24)) for i in range(3 * AHEAD)]  # memory is used again
    load = partial(decoded_there, images, preprocess, (8, 16, 16, 3))
    there = from_processes(load, groups, 8 * 16 * 16 * 3)
    assert all(np.array_equal(a, b) for a, b in zip(there, images.batches(groups, preprocess), strict=True))
    for path in (tmp_path / "set").rglob("*_3.*"):
        path.unlink()
    with pytest.raises(BadImage, match="unreadable"):
        list(from_processes(load, groups, 8 * 16 * 16 * 3))


@pytest.mark.parametrize("change", ["gone", "damaged"])
def test_images_that_change_after_probing_are_reported(tmp_path, change):
    uri = write(f"{tmp_path}/set", {f"{i}.jpg": jpeg(i, 60, 60) for i in range(6)})
    images, _ = probe(tmp_path, uri)
    path = tmp_path / "set/3.jpg"
    if change == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(BadImage, match="unreadable: 3.jpg" if change == "gone" else "truncated"):
        list(images.batches(images.shard_batches(0), Preprocess((8, 8), (8, 8))))


def test_the_digest_tells_data_apart_and_nothing_else(tmp_path, photos):
    shutil.copytree(photos, tmp_path / "copy")
    first, _ = probe(tmp_path, str(photos))
    copy, _ = probe(tmp_path, str(tmp_path / "copy"))
    assert copy.digest() == first.digest()
    assert list(copy.column("uri")) != list(first.column("uri"))
    path = tmp_path / "copy/square/square_1.png"
    path.write_bytes(path.read_bytes() + b"\0")
    changed, _ = probe(tmp_path, str(tmp_path / "copy"))
    path.rename(path.with_name("square_9.png"))
    renamed, _ = probe(tmp_path, str(tmp_path / "copy"))
    path.with_name("square_9.png").unlink()
    fewer, _ = probe(tmp_path, str(tmp_path / "copy"))
    other_shards, _ = probe(tmp_path, str(photos), shard_size=6)
    other_splits, _ = probe(tmp_path, str(photos), explain=0.1, select=0.1, validate=0.8)
    everything = [first, changed, renamed, fewer, other_shards, other_splits]
    assert len({images.digest() for images in everything}) == len(everything)


@pytest.mark.parametrize("column", ["image_id", "content", "split", "status"])
def test_the_digest_covers_every_column_that_matters(column):
    images = image_list(9)
    values = images.table[column].to_pylist()
    place = images.table.schema.get_field_index(column)
    for row in (0, 8):
        changed = [*values[:row], f"{values[row]}x", *values[row + 1 :]]
        assert stored(images.table.set_column(place, column, pa.array(changed))).digest() != images.digest()
    assert stored(images.table).digest() == images.digest()


def test_images_out_of_order_are_refused(tmp_path):
    out = Folder(StoreSettings(root=str(tmp_path)), "probing", "0", ("images",))
    images = image_list(6)
    out.write(0, {"images": images.table.slice(3)})
    out.write(1, {"images": images.table.slice(0, 3)})
    with pytest.raises(AssertionError, match="stored order"):
        len(ImageList(out, 3, 3, 10, {}))


@given(st.integers(1, 10**7), st.integers(1, 4096))
def test_shards_are_whole_batches_and_keep_eight_workers_busy(num_images, batch_size):
    chosen = ProbingSettings("x", batch_size=batch_size).sharded(num_images)
    assert chosen.shard_size % batch_size == 0
    assert 0 <= chosen.shard_size - min(max(num_images / 8, 128), 1024) < batch_size + 1
    assert chosen.sharded(1) == chosen, "what is said stays"


def test_a_list_travels_without_its_table():
    images = image_list(2000)
    before = images.order, images.stored, images.digest()
    data = pickle.dumps(images)
    assert len(data) < 2000
    copy = pickle.loads(data)
    assert np.array_equal(copy.order, before[0])
    assert np.array_equal(copy.stored, before[1])
    assert copy.digest() == before[2]
