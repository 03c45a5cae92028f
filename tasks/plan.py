"""What a sweep will cost: arithmetic on its config, the shapes of its models and the number of its images.

In: the sweep's settings, facts about images, models and words, and rates. Out: one Estimate per stage: model passes,
images, operations, rows and bytes of each table, tokens, seconds of work, memory of one worker. Nothing is run.

What no config tells is assumed and stated here: how unevenly images are chosen (EVEN), how much a language model says,
and what a machine does per second (Rates). Each constant was measured on finished sweeps; docs/design.md, section 17,
tells how far estimates and outcomes lie apart. tasks/plan_stages.py has the formulas.
"""

import math
from dataclasses import dataclass, field
from typing import Protocol

from tasks.ablation import AblationSettings
from tasks.activations import WRITERS, ActivationsSettings
from tasks.clip import ClipSettings, JudgeSettings
from tasks.clusters import RefineSettings
from tasks.decoding import DECODERS
from tasks.drawn import DrawnSettings
from tasks.layers import LayersSettings
from tasks.neurons import NeuronsSettings
from tasks.patches import PatchesSettings
from tasks.phrases import VocabularySettings
from tasks.plan_bytes import Words
from tasks.plan_models import ClipSketch, TargetSketch
from tasks.probing import ProbingSettings
from tasks.report import ReportSettings
from tasks.scorers import ScorerSettings
from tasks.target import TargetSettings

EVEN = {"tokens": 2.0, "maps": 0.2, "images": 2.0}
"""How evenly crops are chosen: the shape of a gamma distribution (see `distinct`). Measured over photos: by layers of
tokens 1.7 to 3; by maps of convolutions 0.2, and 0.8 where all layers are taken; whole images, by units without
positions, 1.9 to 3."""
EVEN_DRAWN = {"tokens": 0.35, "maps": 0.2, "images": 2.0}
"""The same over drawn scenes, which are flat in most places: 0.29 to 0.42, 0.14 to 0.26, 3.6 and more."""
EVEN_RANDOM = {"tokens": 0.6, "maps": 0.08, "images": 0.15}
"""The same of random weights, whose units are all alike: 0.64, 0.07 to 0.09, 0.10 to 0.24."""
PER_ANSWER, PER_PHRASE, HEAPS = 25, 4, 0.806
"""Phrases in an answer of a language model, tokens of one, and the exponent by which n phrases hold n^HEAPS different
ones (Heaps' law; the drawn world's model: 1,791 hold 420)."""
BASE = 1.0 * 2**30
"""Bytes of a worker's process before it has done anything: Python, torch, Arrow."""


@dataclass
class Rates:
    """What machines do per second, and their prices; every one can be given as key=value."""

    cpu_gflops: float = 110
    """Billions of operations of a float32 model on one CPU thread."""
    cpu_gb: float = 8
    """Gigabytes that its operations write, on one CPU thread."""
    gpu_tflops: float = 300
    """Trillions of operations in half precision: an H100 at 30 % of its 989."""
    gpu_tflops_float32: float = 40
    """The same in float32, in which CLIP runs unless clip.dtype says otherwise: 60 % of an H100's 67."""
    gpu_gb: float = 2000
    """Gigabytes per second to and from its memory: 60 % of an H100's 3,350."""
    megapixels: float = 60
    """Millions of pixels decoded, cropped or resized by one CPU thread."""
    scenes: float = 330
    """Scenes of the drawn world drawn by one CPU thread."""
    write_mb: float = 60
    """Megabytes of Parquet encoded and put by one worker."""
    read_mb: float = 200
    """Megabytes of Parquet read by one worker."""
    tokens: float = 1000
    """Tokens written by a language model."""
    start: float = 6
    """Seconds until a new worker process can begin."""
    cpu_hour: float = 0
    """Price of one CPU for an hour."""
    gpu_hour: float = 0
    """Price of one GPU for an hour."""

    def __post_init__(self) -> None:
        for key, value in vars(self).items():
            free = key.endswith("_hour") or key == "start"
            if not 0 <= value < math.inf or (value == 0 and not free):
                raise ValueError(f"{key}={value:g}: must be {'at least' if free else 'above'} 0, and finite")


class Settings(Protocol):
    """The groups of a sweep's config that its cost depends on."""

    unit_block: int
    target: TargetSettings
    layers: LayersSettings
    probing: ProbingSettings
    vocabulary: VocabularySettings
    clip: ClipSettings
    judge: JudgeSettings | None
    activations: ActivationsSettings
    patches: PatchesSettings
    refine: RefineSettings
    scorer: ScorerSettings
    neurons: NeuronsSettings
    drawn: DrawnSettings
    ablation: AblationSettings
    report: ReportSettings


@dataclass
class Facts:
    """What is known beside the config."""

    images: int
    drawn: bool
    """Whether the images are scenes of the drawn world."""
    target: TargetSketch
    clip: ClipSketch
    judge: ClipSketch | None
    phrases: int
    prompts: list[str]
    """Texts of what a language model is asked."""
    against: int | None
    """Phrases of the list that names are compared with."""
    words: Words
    half: tuple[str, ...] = ()
    """Models that a GPU runs in half precision: target, clip, judge."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Measured, of one image, by model (target, clip); instead of what the rates say."""


@dataclass
class Estimate:
    """One stage."""

    stage: str
    parts: int
    passes: float = 0
    """Images, texts or scenes through a model, padding included."""
    images: float = 0
    """Images that are read and decoded."""
    flops: float = 0
    rows: dict[str, float] = field(default_factory=dict)
    bytes: dict[str, float] = field(default_factory=dict)
    asked: float = 0
    """Tokens of prompts to a language model."""
    said: float = 0
    """Tokens of its answers."""
    model: str = ""
    """Which model runs: target, clip or judge, or the text tower of one of them."""
    values: float = 0
    """Numbers that models write."""
    pixels: float = 0
    """Pixels that are decoded, cropped and resized."""
    cut: float = 0
    """The same of crops, which a GPU cuts itself, in no time."""
    drawn: float = 0
    """Scenes of the drawn world that are drawn."""
    read: float = 0
    """Bytes read from the store."""
    other: float = 0
    """Seconds of work on a CPU that no rate covers."""
    memory: float = BASE
    """Bytes of the largest worker."""


def distinct(draws: float, cells: float, even: float) -> float:
    """Expected number of different cells in `draws` draws from `cells` that are chosen unevenly.

    Each cell has a weight from a gamma distribution of shape `even` and mean 1, and is drawn a Poisson number of times;
    so a cell stays undrawn with probability (1 + draws / (cells even))^-even (negative binomial). Infinite `even` is
    the classical 1 - exp(-draws / cells), of which measured sweeps reach 30 to 95 %, because images are alike and units
    agree on which are strong.
    """
    if not cells or not draws:
        return 0.0
    return cells * -math.expm1(-even * math.log1p(draws / (cells * even)))


def answered(prompts: int, most: int) -> float:
    """Different phrases in so many answers of at most `most` tokens each."""
    return (prompts * min(PER_ANSWER, most / PER_PHRASE)) ** HEAPS


@dataclass
class Work:
    """How a stage's estimate becomes time: which device, how many workers."""

    gpus: float
    """Of one worker."""
    workers: int
    cpus: float
    """Of one worker; beside a GPU those on which images are decoded for it."""
    threads: int

    @property
    def gpu(self) -> bool:
        return self.gpus > 0


def seconds(found: Estimate, work: Work, rates: Rates, facts: Facts) -> float:
    """Of all workers together, without the start of their processes.

    On a CPU decoding and computing take turns; a GPU computes while images are decoded, and the slower one counts.
    """
    decode = found.pixels / (rates.megapixels * 1e6) + found.drawn / rates.scenes
    if work.gpu:
        half = found.model in facts.half and found.stage.split()[-1] not in ("screen", "ablation")
        compute = found.flops / ((rates.gpu_tflops if half else rates.gpu_tflops_float32) * 1e12)
        compute += found.values * (2 if half else 4) / (rates.gpu_gb * 1e9)
        decode /= min(DECODERS, work.cpus)
    else:
        decode += found.cut / (rates.megapixels * 1e6)
        compute = found.flops / (rates.cpu_gflops * 1e9) + found.values * 4 / (rates.cpu_gb * 1e9)
        compute /= work.threads
    if found.model in facts.seconds:
        compute = found.passes * facts.seconds[found.model]
    both = max(decode, compute) if work.gpu else decode + compute
    sizes = list(found.bytes.values()) or [0.0]
    beside = found.stage == "activations" and work.gpu  # its tables are encoded beside each other
    written = max(max(sizes), sum(sizes) / min(WRITERS, max(work.cpus, 1))) if beside else sum(sizes)
    return both + written / (rates.write_mb * 1e6) + found.read / (rates.read_mb * 1e6) + found.other


def money(found: Estimate, spent: float, work: Work, rates: Rates, prices: list[float]) -> float:
    """Of the machines that are held for the stage, and of the language model's tokens (prices of a million each)."""
    words = (found.asked * prices[0] + found.said * prices[1]) / 1e6
    return spent / 3600 * (work.cpus * rates.cpu_hour + work.gpus * rates.gpu_hour) + words
