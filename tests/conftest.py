"""Fixtures that several test files use: an S3 server on this machine and a folder of generated photos."""

import gc
import os
from pathlib import Path

import numpy as np
import pytest
import s3fs
from hypothesis import settings
from moto.server import ThreadedMotoServer
from PIL import Image, ImageDraw

BUCKET = "axonym-test"
settings.register_profile("axonym", deadline=None)  # how long an example takes hangs on what else the machine does
settings.load_profile("axonym")


def pytest_collection_finish():
    """Libraries stay: each stage of a sweep in this process would look at half a million of their objects again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def s3():
    """URI of a bucket on a real S3 server (moto) at 127.0.0.1; the environment leads every S3 client there."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name in [n for n in os.environ if n.startswith("AWS_")]:
            patch.delenv(name)
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
        patch.setenv("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")
        patch.setenv("AWS_CONFIG_FILE", os.devnull)
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
        patch.setenv("NO_PROXY", "127.0.0.1")
        patch.setenv("no_proxy", "127.0.0.1")
        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().mkdir(BUCKET)
        yield f"s3://{BUCKET}"
        s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """Read-only folder of 24 different small photos in three class folders, of several sizes and formats."""
    root = tmp_path_factory.mktemp("photos")
    for c, kind in enumerate(("circle", "square", "stripes")):
        (root / kind).mkdir()
        for i in range(8):
            photo(kind, seed=8 * c + i).save(root / kind / f"{kind}_{i}.{('jpg', 'png', 'webp', 'jpg')[i % 4]}")
    return root


def photo(kind: str, seed: int) -> Image.Image:
    """A noisy gradient with one coloured circle or square, or with stripes all over."""
    rng = np.random.default_rng(seed)
    width, height = (int(n) for n in rng.integers(48, 160, 2))
    ramp = np.linspace(0, 120, width)[None, :, None] + rng.uniform(0, 60, 3) + rng.normal(0, 8, (height, width, 3))
    image = Image.fromarray(ramp.clip(0, 255).astype(np.uint8))
    draw, colour = ImageDraw.Draw(image), tuple(int(v) for v in rng.integers(100, 256, 3))
    size = min(width, height) // 2
    x, y = (int(rng.integers(0, n - size)) for n in (width, height))
    if kind == "circle":
        draw.ellipse((x, y, x + size, y + size), fill=colour)
    elif kind == "square":
        draw.rectangle((x, y, x + size, y + size), fill=colour)
    else:
        for left in range(0, width, 12):
            draw.rectangle((left, 0, left + 5, height), fill=colour)
    return image
