"""Drawn scenes as a probing dataset: listed as files, the same bytes in every process, read whole or in ranges."""

import hashlib
import subprocess
import sys

import fsspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.images import ImageReader
from tasks.listing import list_images
from tasks.pixels import decode
from tasks.probing import ProbingSettings
from tasks.world.files import number_of, scenes_of
from tasks.world.truth import stream
from tests import samples

DRAWN = "46e73398936f8b4587d3d810c2f23b9f03f4edb6a63adfae78b7deb575f6de85"
"""SHA-256 of the pixels of 16 scenes. If it changes, raise tasks.world.files.VERSION and make the models anew."""
PRINT_HASH = """
import hashlib
from tasks.world.files import WorldFileSystem
fs = WorldFileSystem()
print(hashlib.sha256(b"".join(fs.cat_file(path) for path in sorted(fs.find("t/40"))[::-1])).hexdigest())
"""


@pytest.fixture(scope="module")
def fs():
    return fsspec.filesystem("world")


def test_scenes_are_drawn_as_they_always_were():
    assert hashlib.sha256(stream("pinned", 0, 16).pixels.tobytes()).hexdigest() == DRAWN


def test_a_folder_of_files(fs):
    paths = [f"t/12/scene-{n:05d}.png" for n in range(12)]
    assert fs.ls("world://t/12", detail=False) == fs.find("t/12/") == fs.glob("t/12/*.png") == paths
    assert fs.isdir("t/12")
    assert not fs.isfile("t/12")
    for path in paths:
        assert fs.isfile(path)
        assert fs.info(path)["size"] == len(fs.cat_file(path))
        assert fs.unstrip_protocol(path) == f"world://{path}"
    for missing in ("t/12/scene-00012.png", "t/12/scene-1.png", "t/12/x/scene-00001.png", "t/12/x"):
        assert not fs.exists(missing)
        with pytest.raises(FileNotFoundError):
            fs.cat_file(missing)
    with pytest.raises(OSError, match="can only be read"):
        fs.open("t/12/scene-00001.png", "wb")


def test_files_show_their_scenes_in_every_process(fs):
    paths = fs.find("t/40")
    for path, pixels in zip(paths, stream("t", 0, 40).pixels, strict=True):
        assert np.array_equal(np.asarray(decode(fs.cat_file(path))), pixels)
    ours = hashlib.sha256(b"".join(fs.cat_file(path) for path in paths[::-1])).hexdigest()
    other = subprocess.run([sys.executable, "-c", PRINT_HASH], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == ours


@given(st.none() | st.integers(-30000, 30000), st.none() | st.integers(-30000, 30000))
def test_ranges(start, end):
    fs, path = fsspec.filesystem("world"), "t/40/scene-00003.png"
    with fs.open(path) as file:
        assert fs.cat_file(path, start=start, end=end) == file.read()[start:end]


@pytest.mark.parametrize(
    "uri", ["world://x", "world://", "world://a/0", "world://a/b", "world://a/100001", "world://*/3"]
)
def test_bad_uris_are_one_line(uri):
    with pytest.raises(ValueError, match=r"expected world://<seed>/<count>|no images") as error:
        list_images(ProbingSettings(uri=uri))
    assert str(error.value).startswith(f"probing.uri={uri}")
    assert "\n" not in str(error.value)


def test_another_seed_or_count_is_another_dataset():
    stamps = [list_images(ProbingSettings(uri=uri))[1] for uri in ("world://t/8", "world://u/8", "world://t/9")]
    assert len(set(stamps)) == 3
    assert list_images(ProbingSettings(uri="world://t/8"))[1] == stamps[0]


def test_numbers_are_found_back_from_ids():
    rows = list_images(ProbingSettings(uri=["world://t/3", "world://u/2"]))[0]
    assert [number_of(row["image_id"]) for row in rows] == [0, 1, 2, 0, 1]
    assert [scenes_of(row["uri"]) for row in rows] == [("t", 3)] * 3 + [("u", 2)] * 2
    one = list_images(ProbingSettings(uri="world://t/8/scene-00005.png"))[0]
    assert [row["image_id"] for row in one] == ["scene-00005.png"]
    with pytest.raises(ValueError, match="expected scene"):
        number_of("photo.png")


def test_probing_end_to_end(tmp_path):
    images = samples.probe(tmp_path, ProbingSettings(uri="world://t/40", shard_size=16, batch_size=8))
    assert len(images) == 40
    assert images.ok.all()
    assert len(set(images.column("content"))) == 40
    assert [number_of(i) for i in images.ids] == list(range(40))
    assert np.array_equal(np.asarray(images.open(7, ImageReader({}))), stream("t", 7, 1).pixels[0])
