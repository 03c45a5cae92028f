"""What `axonym bench` can be told.

In: fields by name. Out: BenchSettings, of all devices or with the sizes of one; ValueError naming the field.
"""

from dataclasses import dataclass, field, replace

from tasks.bench_figures import has_cuda
from tasks.clip import DTYPES

ROWS = ("collection", "embedding", "memory", "time", "workers", "sweep", "curves")


@dataclass
class BenchSettings:
    what: list[str] = field(default_factory=lambda: list(ROWS))
    """Which measurements; each gives one or more rows."""
    device: str = "all"
    """cpu, cuda, or all that there are."""
    model: str = "vit_b"
    """Target of the rows collection, files and tables: vit_b, vit_l or any name of timm. Its weights are random."""
    small: str = "vit_tiny_patch16_224"
    """Target of the other rows."""
    clip: str = "vit_base_patch32_clip_224"
    """Image tower, by its name in timm, of the row embedding."""
    small_clip: str = "vit_small_patch32_224"
    """The same for the sweep."""
    images: int = 0
    """Images of the rows collection and bytes, on a GPU of embedding too; 0: 256 on a CPU, 8,192 on a GPU."""
    small_images: int = 0
    """The same of the other rows; 0: 256 on a CPU, 512 on a GPU."""
    side: int = 400
    """Longer side of the JPEG files, pixels."""
    crops: int = 2
    """Crops per image of the row embedding."""
    batch: int = 0
    """Images per model call; 0: 16 on a CPU, 128 on a GPU."""
    shard: int = 0
    """Images per shard, at most, whose tables are written together; 0: 1,024 on a CPU, 8,192 on a GPU."""
    pairs: int = 5
    """How often each of two is measured, in turn."""
    threads: int = 1
    """Torch threads on a CPU."""
    dtype: str = "auto"
    """float32, float16, bfloat16; auto: float32 on a CPU, float16 on a GPU."""
    seed: int = 0
    out: str = "bench.parquet"

    def __post_init__(self) -> None:
        unknown = [name for name in self.what if name not in ROWS]
        if unknown or not self.what:
            raise ValueError(f"what={','.join(unknown)}: allowed are {', '.join(ROWS)}")
        if self.device not in ("all", "cpu", "cuda"):
            raise ValueError(f"device={self.device}: allowed are all, cpu, cuda")
        if self.dtype not in ("auto", *DTYPES):
            raise ValueError(f"dtype={self.dtype}: allowed are auto, {', '.join(DTYPES)}")
        least = {"images": 0, "small_images": 0, "batch": 0, "side": 32, "shard": 0, "crops": 1, "pairs": 1}
        for key, smallest in (least | {"threads": 1, "seed": 0}).items():
            if getattr(self, key) < smallest:
                raise ValueError(f"{key}={getattr(self, key)}: must be at least {smallest}")

    @property
    def devices(self) -> list[str]:
        """Raises ValueError where the one that is asked for is not there."""
        there = ["cpu", "cuda"] if has_cuda() else ["cpu"]
        if self.device not in ("all", *there):
            raise ValueError(f"device={self.device}: not there; allowed are all, {', '.join(there)}")
        return there if self.device == "all" else [self.device]

    def on(self, device: str) -> "BenchSettings":
        """With the sizes of this device where none are given."""
        images, small, batch, shard = (8192, 512, 128, 8192) if device == "cuda" else (256, 256, 16, 1024)
        own = {"images": images, "small_images": small, "batch": batch, "shard": shard}
        chosen = {key: getattr(self, key) or value for key, value in own.items()}
        dtype = {"cpu": "float32", "cuda": "float16"}[device] if self.dtype == "auto" else self.dtype
        return replace(self, device=device, dtype=dtype, **chosen)
