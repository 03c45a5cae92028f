"""Drawn images for tests, and a finished chain of stages over them in this process."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from tasks.activations import ActivationsJob, ActivationsSettings, ActivationsWorker
from tasks.exemplars import ExemplarsJob, ExemplarsWorker
from tasks.forward import TargetPass, describe
from tasks.images import ImageList
from tasks.layers import LayersSettings, unit_blocks
from tasks.listing import list_images
from tasks.probing import ProbingJob, ProbingSettings, ProbingWorker
from tasks.store import Folder, StoreSettings
from tasks.tables import make_table
from tasks.target import TargetSettings

DATA = Path(__file__).parents[2] / "shared" / "data"
NO_DATA = "the shared test data (photos and weights that may not be redistributed) is not here"
COLOURS = {"red": (220, 30, 30), "green": (40, 180, 60), "blue": (30, 60, 220), "yellow": (230, 210, 40)}


def draw(number: int, scale: int = 1) -> Image.Image:
    """Photo-like picture `number`: a plain, striped or checkered noisy ground, a coloured shape, one of a few sizes."""
    rng = np.random.default_rng(number)
    width, height = [(96, 64), (120, 80), (64, 96), (80, 80)][number % 4]
    width, height = width * scale, height * scale
    y, x = np.mgrid[:height, :width] // (6 * scale)
    ground = [0 * x, x % 2, (x + y) % 2][number % 3][..., None] * rng.uniform(40, 90, 3)
    noise = rng.normal(110, 30 / scale, (height, width, 3)) + ground - 20
    image = Image.fromarray(noise.clip(0, 255).astype(np.uint8))
    left, top = int(rng.integers(0, width // 2)), int(rng.integers(0, height // 2))
    colour = list(COLOURS.values())[number % len(COLOURS)]
    shape = ImageDraw.Draw(image).ellipse if number % 2 else ImageDraw.Draw(image).rectangle
    shape([left, top, left + width // 3, top + height // 3], fill=colour)
    return image


def draw_folder(folder: Path, count: int, scale: int = 1) -> Path:
    """`count` drawn PNG files in class folders by colour, one more that is no image, and one exact duplicate."""
    for number in range(count):
        place = folder / list(COLOURS)[number % len(COLOURS)]
        place.mkdir(parents=True, exist_ok=True)
        draw(number, scale).save(place / f"{number:04d}.png")
    (folder / "red" / "broken.png").write_bytes(b"not an image")
    (folder / "red" / "copy.png").write_bytes((folder / "red" / "0000.png").read_bytes())
    return folder


def probe(root: Path, settings: ProbingSettings) -> ImageList:
    """Listing and images tables of a probing dataset."""
    store, rows = StoreSettings(str(root)), list_images(settings)[0]
    settings = settings.sharded(len(rows))
    listing = Folder(store, "listing", "x", ("listing",))
    listing.write(0, {"listing": make_table("listing", {c: [row[c] for row in rows] for c in rows[0]})})
    images = Folder(store, "probing", "x", ("images",))
    worker = ProbingWorker(ProbingJob(images, listing, settings))
    for part in range(-(-len(rows) // settings.shard_size)):
        worker.run(part)
    return ImageList(images, settings.shard_size, settings.batch_size, settings.pooled_max, settings.options)


def random_embeddings(root: Path, images: ImageList, width: int = 8) -> Folder:
    """Image embeddings that are random but fixed by the image's content."""
    folder = Folder(StoreSettings(str(root)), "image_embeddings", "x", ("image_embeddings",))
    vectors = np.array([np.random.default_rng(int(c[:8], 16)).normal(size=width) for c in images.column("content")])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    for part in range(images.num_shards):
        rows = np.array(images.shard(part))
        table = make_table("image_embeddings", {"image": rows, "embedding": vectors[rows].astype(np.float16)})
        folder.write(part, {"image_embeddings": table})
    return folder


def collect(
    root: Path,
    images: ImageList,
    target: TargetSettings,
    layers: LayersSettings,
    k: int = 10,
    unit_block: int = 7,
) -> tuple[ActivationsJob, ExemplarsJob]:
    """Activations and exemplars of a target model over a probed dataset."""
    store, about = StoreSettings(str(root)), describe(target, layers)
    blocks = unit_blocks(about.layers, unit_block)
    out = Folder(store, "activations", "x", ("candidates", "stats", "pooled"))
    embeddings, settings = random_embeddings(root, images), ActivationsSettings(k)
    model = TargetPass(images, target, about.layers, "float32", 1, about.channels_last)
    job = ActivationsJob(out, model, embeddings, blocks, layers.pool, settings)
    worker = ActivationsWorker(job)
    for part in range(images.num_shards):
        worker.run(part)
    merged = ExemplarsJob(Folder(store, "exemplars", "x", ("exemplars", "unit_stats")), images, out, blocks, k)
    for part in range(len(blocks)):
        ExemplarsWorker(merged).run(part)
    return job, merged


def collect_by_shard(
    root: Path, target: TargetSettings, layers: list[str]
) -> dict[int, tuple[ActivationsJob, ExemplarsJob]]:
    """The same 45 drawn images collected in shards of 8, 24 and 64, by shard size."""
    folder, found = draw_folder(root / "photos", 45), {}
    for size in (8, 24, 64):
        probing = ProbingSettings(str(folder), explain=0.6, select=0.2, shard_size=size, batch_size=8, max_skipped=1)
        images = probe(root / str(size), probing)
        found[size] = collect(root / str(size), images, target, LayersSettings(layers), k=6)
    return found


def tiny_clip(folder: Path, seed: int = 0, width: int = 32) -> Path:
    """A CLIP in open_clip's own folder format, two narrow layers a side, random but always the same weights; `width` is
    that of its vectors."""
    import json

    import open_clip
    import torch
    from safetensors.torch import save_file

    config = {
        "model_cfg": {
            "embed_dim": width,
            "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16},
            "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
        },
        "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "shortest"},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(seed)
    model = open_clip.model.CLIP(**config["model_cfg"])
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    return folder


WORDS = ["red", "green", "blue", "yellow", "noise", "circle", "square", "a red circle", "blue square", "bright", "dark"]


def sweep_arguments(folder: Path) -> list[str]:
    """Overrides of a whole sweep over drawn images, seconds long; makes images, CLIP and words in `folder`."""
    photos = draw_folder(folder / "photos", 45)
    (folder / "words.txt").write_text("\n".join(WORDS))
    return [
        f"probing.uri={photos}",
        "probing.shard_size=16",
        "probing.batch_size=8",
        "probing.explain=0.5",
        "probing.select=0.2",
        "probing.validate=0.3",
        "target=factory",
        f"target.name={Path(__file__).parent}/models.py:planted",
        "target.preprocess={size: [64, 96], resize_to: [64, 96]}",
        "layers.names=[relu,logits]",
        "clip=folder",
        f"clip.name={tiny_clip(folder / 'clip')}",
        f"vocabulary.path={folder}/words.txt",
        "vocabulary.merge=1",  # a random CLIP tells few words apart
        "activations.k=10",
        "patches.k=4",
        "patches.crops.sizes=[0.5]",
        "scorer.keep=5",
        "unit_block=4",
        "run=drawn",
    ]


def stored_tables(root: Path) -> dict[str, bytes]:
    """Bytes of every Parquet object below a local root, by name."""
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*.parquet"))}
