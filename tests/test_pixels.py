"""Pixels: every kind of image file becomes the right RGB image or a counted reason, never another exception; a model
sees, bit for bit, what torchvision, timm and open_clip would show it; boxes on its input find their way back.
"""

import io
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import open_clip
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from tasks.crops import crop_grid
from tasks.pixels import FILTERS, MAX_ASPECT, MAX_PIXELS, BadImage, Preprocess, decode
from tests import samples

REASONS = {"empty", "not_an_image", "truncated", "too_large", "too_narrow", "float_pixels"}
WHITE = (255, 255, 255)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")


def encode(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth enough for JPEG, different in every pixel and corner."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (max(2, height // 6), max(2, width // 6), 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def pixels(data: bytes) -> np.ndarray:
    image = decode(data)
    assert image.mode == "RGB"
    return np.asarray(image)


def reason(data: bytes) -> str:
    with pytest.raises(BadImage) as caught:
        decode(data)
    return str(caught.value)


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A grey PNG file of that size whose pixels are missing."""
    head = (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    body = (head, *chunks, (b"IDAT", zlib.compress(b"\0" * 64)), (b"IEND", b""))
    parts = [struct.pack(">I", len(d)) + name + d + struct.pack(">I", zlib.crc32(name + d)) for name, d in body]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


# The zoo of files


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_lossless_rgb_is_unchanged(kind):
    image = noise(23, 17)
    assert np.array_equal(pixels(encode(image, kind, **({"lossless": True} if kind == "WEBP" else {}))), image)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_grey(kind):
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert np.array_equal(pixels(encode(Image.fromarray(values), kind)), np.stack([values] * 3, 2))


def test_grey_jpeg():
    found = pixels(encode(noise(40, 30).convert("L"), "JPEG", quality=95))
    assert np.abs(found.astype(int) - np.asarray(noise(40, 30).convert("L"))[..., None]).max() < 12


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP"])
def test_one_bit(kind):
    bits = np.random.default_rng(0).integers(0, 2, (13, 19)).astype(bool)
    assert np.array_equal(pixels(encode(Image.fromarray(bits), kind)), np.stack([bits * np.uint8(255)] * 3, 2))


def blended(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """What transparent colours look like on white paper."""
    share = alpha[..., None] / 255
    return colour * share + 255 * (1 - share)


@pytest.mark.parametrize(("mode", "kind"), [("RGBA", "PNG"), ("LA", "PNG"), ("RGBA", "TIFF"), ("RGBA", "WEBP")])
def test_alpha_lies_on_white(mode, kind):
    rng = np.random.default_rng(1)
    array = rng.integers(0, 256, (12, 18, len(mode)), np.uint8)
    array[:, :6, -1], array[:, 6:12, -1] = 0, 255
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    found = pixels(encode(Image.fromarray(array, mode), kind, **options))
    colour = array[..., :-1] if mode == "RGBA" else np.repeat(array[..., :1], 3, 2)
    assert np.abs(found - blended(colour, array[..., -1])).max() <= 1
    assert (found[:, :6] == 255).all()
    assert np.array_equal(found[:, 6:12], colour[:, 6:12])


def palette_image() -> Image.Image:
    image = Image.fromarray((np.arange(64) % 4).astype(np.uint8).reshape(8, 8), "P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 10, 20, 30])
    return image


@pytest.mark.parametrize("kind", ["PNG", "GIF", "BMP", "TIFF"])
def test_palette(kind):
    found = pixels(encode(palette_image(), kind))
    assert [tuple(v) for v in found[0, :4]] == [(255, 0, 0), (0, 255, 0), (0, 0, 255), (10, 20, 30)]


@pytest.mark.parametrize(("kind", "transparency"), [("PNG", 1), ("GIF", 1), ("PNG", bytes([255, 0, 128]))])
def test_transparent_palette_entry_is_white(kind, transparency):
    found = pixels(encode(palette_image(), kind, transparency=transparency))
    half = (0, 0, 255) if isinstance(transparency, int) else (127, 127, 255)
    assert [tuple(v) for v in found[0, :4]] == [(255, 0, 0), WHITE, half, (10, 20, 30)]


@pytest.mark.parametrize(("mode", "colour", "key"), [("L", 7, 7), ("RGB", (1, 2, 3), (1, 2, 3)), ("1", 0, 0)])
def test_transparent_colour_is_white(mode, colour, key):
    assert (pixels(encode(Image.new(mode, (9, 7), colour), "PNG", transparency=key)) == 255).all()


@pytest.mark.parametrize(
    ("ink", "colour"),
    [
        ((0, 0, 0, 0), WHITE),
        ((0, 255, 255, 0), (255, 0, 0)),
        ((255, 0, 255, 0), (0, 255, 0)),
        ((255, 255, 0, 0), (0, 0, 255)),
        ((0, 0, 0, 255), (0, 0, 0)),
        ((0, 128, 255, 51), (204, 102, 0)),
    ],
)
@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk(ink, colour, kind):
    data = encode(Image.new("CMYK", (16, 16), ink), kind, **({"quality": 95} if kind == "JPEG" else {}))
    if kind == "JPEG":  # Adobe's marker: inks are stored inverted
        assert b"Adobe" in data
        assert Image.open(io.BytesIO(data)).mode == "CMYK"
    assert np.abs(pixels(data).astype(int) - colour).max() <= 4


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_grey_is_scaled(kind):
    values = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    found = pixels(encode(Image.fromarray(values), kind))
    assert np.array_equal(found, np.stack([values // 257] * 3, 2))


@settings(max_examples=20)
@given(st.lists(st.integers(0, 65535), min_size=12, max_size=12))
def test_sixteen_bit_grey_between_the_steps(values):
    found = pixels(encode(Image.fromarray(np.array(values, np.uint16).reshape(3, 4)), "PNG"))
    assert np.abs(found[..., 0] - np.array(values).reshape(3, 4) / 257).max() < 1


def test_sixteen_bit_big_endian_tiff():
    values = np.linspace(0, 65535, 40).astype(np.uint16).reshape(5, 8)
    image = Image.frombytes("I;16B", (8, 5), values.astype(">u2").tobytes())
    assert np.array_equal(pixels(encode(image, "TIFF"))[..., 0], values // 257)


def test_float_tiff_is_refused():
    assert reason(encode(Image.fromarray(np.random.rand(8, 8).astype(np.float32)), "TIFF")) == "float_pixels"


def orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


# What a camera stores for an upright scene, by EXIF's definition of where row 0 and column 0 lie.
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: a.transpose(1, 0, 2)[::-1],
    7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda a: a.transpose(1, 0, 2)[:, ::-1],
}


@pytest.mark.parametrize("value", STORED)
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_pixel_exact(value, kind):
    upright = np.asarray(noise(21, 13))
    stored = Image.fromarray(np.ascontiguousarray(STORED[value](upright)))
    options = {"lossless": True} if kind == "WEBP" else {}
    assert np.array_equal(pixels(encode(stored, kind, exif=orientation(value), **options)), upright)


@pytest.mark.parametrize("value", STORED)
def test_exif_orientation_of_jpeg(value):
    stored = Image.fromarray(np.ascontiguousarray(STORED[value](np.asarray(noise(48, 32)))))
    turned = pixels(encode(stored, "JPEG", quality=95, exif=orientation(value)))
    plain = pixels(encode(stored, "JPEG", quality=95))
    assert turned.shape == (32, 48, 3)
    assert np.array_equal(np.ascontiguousarray(STORED[value](turned)), plain)


def test_orientation_of_sixteen_bit_grey():
    values = np.arange(6, dtype=np.uint16).reshape(2, 3) * 257
    found = pixels(encode(Image.fromarray(np.ascontiguousarray(values.T[::-1])), "PNG", exif=orientation(6)))
    assert np.array_equal(found[..., 0], values // 257)


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"not EXIF at all", b"Exif\0\0MM\0*\0\0\0\xff", b"Exif\0\0II*\0"])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_damaged_exif_does_not_lose_the_image(exif, kind):
    assert pixels(encode(noise(24, 16), kind, exif=exif)).shape == (16, 24, 3)


def test_odd_exif_beside_the_orientation_does_not_lose_the_image():
    entries = [
        (0x0112, 3, 1, b"\6\0\0\0"),
        (0x9286, 7, 4, b"abcd"),
        (0x011A, 3, 1, b"\1\0\0\0"),
        (0x0128, 2, 4, b"abc\0"),
    ]
    directory = b"".join(struct.pack("<HHI", tag, kind, count) + value for tag, kind, count, value in entries)
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + directory + b"\0\0\0\0"
    assert pixels(encode(noise(24, 16), "JPEG", exif=exif)).shape == (24, 16, 3)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame_of_an_animation(kind):
    frames = [Image.new("RGB", (14, 10), c) for c in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert (pixels(data) == (255, 0, 0)).all()


def test_empty():
    assert reason(b"") == "empty"


@pytest.mark.parametrize(
    "data", [b"\0", b"file label\n" * 50, b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"\xff" * 99]
)
def test_not_an_image(data):
    assert reason(data) == "not_an_image"


@pytest.mark.parametrize("share", [0.4, 0.7, 0.95])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "TIFF", "GIF", "PPM"])
def test_truncated(kind, share):
    data = encode(noise(90, 70), kind)
    assert reason(data[: int(len(data) * share)]) in ("truncated", "not_an_image")
    if kind in ("JPEG", "PNG"):
        assert reason(data[: int(len(data) * share)]) == "truncated"


@pytest.mark.parametrize("size", [(60_000, 60_000), (2**31 - 1, 2**31 - 1), (13_378, 13_378)])
def test_decompression_bomb(size):
    assert size[0] * size[1] > MAX_PIXELS
    assert reason(png(*size)) == "too_large"


def test_just_below_the_limit_is_judged_by_its_pixels():
    assert 0 < MAX_PIXELS - 13_377**2 < 13_377
    assert reason(png(13_377, 13_377)) == "truncated"


def test_bomb_in_a_text_chunk():
    chunk = (b"zTXt", b"Comment\0\0" + zlib.compress(b"\0" * 80_000_000, 9))
    assert reason(png(8, 8, chunk)) in REASONS


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1), (2, 2 * MAX_ASPECT + 1)])
def test_strip_is_too_narrow(size):
    assert reason(encode(Image.new("RGB", size), "PNG")) == "too_narrow"


def test_longest_allowed_strip():
    image = decode(encode(noise(4 * MAX_ASPECT, 4), "PNG"))
    assert Preprocess().pixels(image).shape == (224, 224, 3)


def test_smallest_image():
    assert np.array_equal(pixels(encode(Image.new("RGB", (1, 1), (9, 8, 7)), "PNG")), [[[9, 8, 7]]])


def judged(data: bytes) -> None:
    """Decodes to an RGB image or raises BadImage with one of the reasons."""
    try:
        found = decode(data).mode
    except BadImage as bad:
        found = str(bad)
    assert found in REASONS | {"RGB"}


SIGNATURES = (
    b"",
    b"\xff\xd8\xff",
    b"\x89PNG\r\n\x1a\n",
    b"GIF89a",
    b"BM",
    b"II*\0",
    b"MM\0*",
    b"RIFF\x40\0\0\0WEBPVP8 ",
    b"P5 ",
)


@settings(max_examples=150)
@given(st.sampled_from(SIGNATURES), st.binary(max_size=300))
def test_random_bytes_never_raise_anything_else(signature, data):
    judged(signature + data)


DAMAGED = [encode(noise(48, 40), "JPEG", exif=orientation(6)), encode(noise(48, 40), "JPEG", progressive=True)]
DAMAGED += [encode(noise(24, 20), kind) for kind in ("PNG", "GIF", "TIFF", "BMP", "WEBP")]


@settings(max_examples=200)
@given(st.data())
def test_damaged_files_never_raise_anything_else(data):
    file = bytearray(data.draw(st.sampled_from(DAMAGED)))
    for place, value in data.draw(
        st.dictionaries(st.integers(0, len(file) - 1), st.integers(0, 255), max_size=6)
    ).items():
        file[place] = value
    judged(bytes(file[: data.draw(st.one_of(st.just(len(file)), st.integers(0, len(file))))]))


def test_decoding_in_threads_leaves_the_warning_filters_alone():
    data, before = encode(noise(120, 120), "JPEG"), list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(decode, [data] * 600))
    assert list(warnings.filters) == before


# What a model sees

SHAPES = [(1, 1), (2, 3), (7, 5), (31, 64), (64, 31), (64, 64), (65, 64), (97, 101), (201, 333), (300, 200), (30, 600)]
"""Width and height: tiny, odd, portrait, landscape, exact, long."""
MODES = {
    "bilinear": InterpolationMode.BILINEAR,
    "bicubic": InterpolationMode.BICUBIC,
    "nearest": InterpolationMode.NEAREST,
    "lanczos": InterpolationMode.LANCZOS,
}


@pytest.mark.parametrize("interpolation", MODES)
@pytest.mark.parametrize(("size", "short"), [(64, 73), (64, 64), (63, 72), (48, 97), (64, 50)])
def test_pixels_are_torchvisions(interpolation, size, short):
    preprocess = Preprocess((size, size), (short, short), "cover", interpolation)
    theirs = transforms.Compose([transforms.Resize(short, MODES[interpolation]), transforms.CenterCrop(size)])
    for shape in SHAPES:
        image = noise(*shape)
        found = preprocess.pixels(image)
        assert found.shape == (size, size, 3)
        assert found.dtype == np.uint8
        assert np.array_equal(found, np.asarray(theirs(image))), shape


@settings(max_examples=150)
@given(st.integers(1, 220), st.integers(1, 220), st.integers(16, 64), st.integers(16, 80))
def test_pixels_are_torchvisions_at_any_size(width, height, size, short):
    if max(width, height) > MAX_ASPECT * min(width, height):
        width = height
    image = noise(width, height)
    theirs = transforms.Compose([transforms.Resize(short, MODES["bilinear"]), transforms.CenterCrop(size)])
    found = Preprocess((size, size), (short, short), "cover", "bilinear").pixels(image)
    assert np.array_equal(found, np.asarray(theirs(image)))


def own_input(preprocess: Preprocess, image: Image.Image) -> torch.Tensor:
    return preprocess.normalise(torch.from_numpy(preprocess.pixels(image))[None])[0]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("crop_pct", [0.875, 0.95, 1.0, 0.9])
@pytest.mark.parametrize("size", [(64, 64), (63, 63), (48, 80), (96, 64)])
@pytest.mark.parametrize("crop_mode", ["center", "squash"])
def test_input_is_timms(interpolation, crop_pct, size, crop_mode):
    given_ = {"crop_pct": crop_pct, "interpolation": interpolation, "input_size": (3, *size), "crop_mode": crop_mode}
    config = resolve_data_config(given_, pretrained_cfg=timm.get_pretrained_cfg("resnet50.a1_in1k").to_dict())
    assert config["crop_pct"] == crop_pct
    theirs = create_transform(**config)
    to = tuple(int(np.floor(s / crop_pct)) for s in size)
    resize = "squash" if crop_mode == "squash" else "cover"
    preprocess = Preprocess(size, to, resize, interpolation, config["mean"], config["std"])
    for shape in SHAPES:
        image = noise(*shape)
        assert torch.equal(own_input(preprocess, image), theirs(image)), shape


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("mode", "resize"), [("shortest", "cover"), ("longest", "contain"), ("squash", "squash")])
@pytest.mark.parametrize("size", [(64, 64), (63, 63), (48, 80), (50, 45)])
def test_input_is_open_clips(interpolation, mode, resize, size):
    if mode == "shortest" and size[0] != size[1]:
        interpolation = "bicubic"  # open_clip takes no other there
    theirs = open_clip.image_transform(size, is_train=False, resize_mode=mode, interpolation=interpolation)
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    preprocess = Preprocess(size, size, resize, interpolation, mean, std)
    for shape in SHAPES:
        image = noise(*shape)
        assert torch.equal(own_input(preprocess, image), theirs(image)), shape


@settings(max_examples=100)
@given(st.integers(1, 200), st.integers(1, 200), st.sampled_from(["shortest", "longest", "squash"]))
def test_input_is_open_clips_at_any_size(width, height, mode):
    if max(width, height) > MAX_ASPECT * min(width, height):
        width = height
    image = noise(width, height)
    theirs = open_clip.image_transform(40, is_train=False, resize_mode=mode)
    resize = {"shortest": "cover", "longest": "contain", "squash": "squash"}[mode]
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    assert torch.equal(own_input(Preprocess((40, 40), (40, 40), resize, "bicubic", mean, std), image), theirs(image))


def test_normalise_is_to_tensor_and_normalize():
    preprocess = Preprocess((24, 32), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    images = [np.random.default_rng(i).integers(0, 256, (24, 32, 3), np.uint8) for i in range(3)]
    theirs = transforms.Compose([transforms.ToTensor(), transforms.Normalize(preprocess.mean, preprocess.std)])
    batch = torch.from_numpy(np.stack(images))
    before = batch.clone()
    found = preprocess.normalise(batch)
    assert torch.equal(found, torch.stack([theirs(image) for image in images]))
    assert found.dtype == torch.float32
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(batch, before)


# And back


def marker(preprocess: Preprocess, image: Image.Image, box: tuple[int, int, int, int]) -> np.ndarray:
    """The box of a red rectangle painted into a blue image, found in the model's input and mapped back to the image."""
    image.paste((255, 0, 0), box)
    red = preprocess.pixels(image)[..., 0] >= 128
    rows, columns = np.flatnonzero(red.any(1)), np.flatnonzero(red.any(0))
    found = np.array([[columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]], float)
    shares = found / np.array([preprocess.size[1], preprocess.size[0]] * 2)
    return preprocess.to_image(shares, np.array([image.width]), np.array([image.height]))[0]


@settings(max_examples=200)
@given(
    size=st.tuples(st.integers(96, 200), st.integers(96, 200)),
    shape=st.tuples(st.integers(40, 360), st.integers(40, 360)),
    resize=st.sampled_from(["cover", "contain", "squash"]),
    crop=st.floats(0.8, 1.0),
    square=st.booleans(),
    place=st.tuples(*[st.floats(0.0, 0.3)] * 4),
    interpolation=st.sampled_from(["bilinear", "bicubic", "lanczos"]),
)
def test_a_box_on_the_input_finds_its_place_in_the_image(size, shape, resize, crop, square, place, interpolation):
    size = (size[0], size[0]) if square else size
    (height, width), (w, h) = size, shape
    preprocess = Preprocess(size, (int(height / crop), int(width / crop)), resize, interpolation)
    scale_x, scale_y = w / (width / crop), h / (height / crop)
    if resize != "squash":
        scale_x = scale_y = min(scale_x, scale_y) if resize == "cover" else max(scale_x, scale_y)
    # the part of the image that is surely in the model's input, seen from the image's middle
    half_x, half_y = min(w / 2, 0.95 * scale_x * width / 2), min(h / 2, 0.95 * scale_y * height / 2)
    x0, x1 = round(w / 2 - half_x * (0.3 + place[0])), round(w / 2 + half_x * (0.3 + place[1]))
    y0, y1 = round(h / 2 - half_y * (0.3 + place[2])), round(h / 2 + half_y * (0.3 + place[3]))
    found = marker(preprocess, Image.new("RGB", (w, h), (0, 0, 255)), (x0, y0, x1, y1))
    # two pixels, or one of the model's pixels where those are larger
    assert np.abs(found - [x0, y0, x1, y1])[::2].max() <= max(2, scale_x)
    assert np.abs(found - [x0, y0, x1, y1])[1::2].max() <= max(2, scale_y)


@pytest.mark.parametrize(
    ("resize", "box"),
    [("cover", [100, 0, 300, 200]), ("contain", [0, 0, 400, 200]), ("squash", [0, 0, 400, 200])],
)
def test_the_whole_input(resize, box):
    preprocess = Preprocess((64, 64), (64, 64), resize)
    found = preprocess.to_image(np.array([[0.0, 0.0, 1.0, 1.0]]), np.array([400]), np.array([200]))
    assert np.allclose(found, [box], atol=1e-9)


def test_boxes_of_many_images_at_once_are_those_of_each():
    rng = np.random.default_rng(0)
    corners = np.sort(rng.random((50, 2, 2)), 1).reshape(50, 4)
    widths, heights = rng.integers(1, 500, 50), rng.integers(1, 500, 50)
    for resize in ("cover", "contain", "squash"):
        preprocess = Preprocess((48, 80), (53, 88), resize)
        together = preprocess.to_image(corners, widths, heights)
        alone = [preprocess.to_image(corners[i : i + 1], widths[i : i + 1], heights[i : i + 1])[0] for i in range(50)]
        assert np.array_equal(together, alone)
        assert (together >= 0).all()
        assert (together[:, ::2] <= widths[:, None]).all()
        assert (together[:, 1::2] <= heights[:, None]).all()
        assert (together[:, 2:] >= together[:, :2]).all()


@settings(max_examples=60)
@given(
    shape=st.tuples(st.integers(1, 200), st.integers(1, 200)),
    size=st.integers(14, 70),
    resize=st.sampled_from(["cover", "contain", "squash"]),
    interpolation=st.sampled_from(list(FILTERS)),
    seed=st.integers(0, 2**31),
)
def test_crops_cut_by_torch_have_the_pixels_of_pillow(shape, size, resize, interpolation, seed):
    """To the bit, larger and smaller than the model's input, with hard edges between black and white."""
    rng = np.random.default_rng(seed)
    photo = rng.choice(np.array([0, 255, 7, 128, 250], np.uint8), (*shape, 3))
    side = rng.integers(1, min(shape) + 1, (4, 1))
    low = rng.integers(0, np.array(shape[::-1]) - side + 1)
    boxes = np.concatenate([low, low + side], 1)
    check_cut(
        Preprocess((size, size), (size, size), resize, interpolation), Image.fromarray(photo), boxes[[0, 1, 2, 3, 1]]
    )


def check_cut(preprocess, image, boxes):
    expected = np.stack([preprocess.pixels(image.crop(box)) for box in boxes.tolist()])
    found = preprocess.cut(torch.from_numpy(np.array(image)), boxes)
    assert found.dtype == torch.uint8
    assert np.array_equal(found.numpy(), expected)


@pytest.mark.skipif(not samples.DATA.exists(), reason=samples.NO_DATA)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_crops_of_photos_cut_by_torch(interpolation):
    for path in sorted((samples.DATA / "imagenet_1k_samples" / "images").iterdir())[:40:4]:
        image = decode(path.read_bytes())
        boxes, _ = crop_grid(*image.size, [0.5, 0.25])
        check_cut(Preprocess((224, 224), (224, 224), "cover", interpolation), image, boxes[1::9])


def test_no_boxes():
    assert Preprocess().to_image(np.zeros((0, 4)), np.zeros(0, int), np.zeros(0, int)).shape == (0, 4)


def test_formats_that_call_other_programs_are_not_tried():
    """EPS is drawn by Ghostscript; here it is not an image, whatever the file is called."""
    eps = io.BytesIO()
    Image.new("RGB", (8, 8)).save(eps, "EPS")
    with pytest.raises(BadImage, match="not_an_image"):
        decode(eps.getvalue())
