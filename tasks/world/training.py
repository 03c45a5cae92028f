"""What all trainings of the world share: number format, learning rate, a time line.

In: a model, a function that gives the loss of a step. Out: the model, trained.
"""

import logging
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tasks.world.truth import Album, stream

log = logging.getLogger("axonym")
CHUNK = 2048
"""Scenes drawn at a time; every scene is used a few times and then never again."""


@dataclass
class Recipe:
    """How long and how hard a model is trained."""

    steps: int
    batch: int
    rate: float
    reuse: int = 4
    """How often a drawn scene is used."""
    decay: float = 0.05


def half_precision(device: torch.device) -> bool:
    """Whether bfloat16 is faster than float32 here."""
    return device.type == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def train(
    model: nn.Module, loss: Callable[[int], torch.Tensor], recipe: Recipe, device: torch.device, name: str
) -> nn.Module:
    """AdamW with a linear warm-up over 5 % of the steps and a cosine down to zero."""
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    plain = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": recipe.decay}, {"params": plain, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=recipe.rate, betas=(0.9, 0.98))
    warm = max(recipe.steps // 20, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda s: min((s + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * s / recipe.steps))
    )
    # On a CPU the fused attention's backward pass takes three times as long as the plain one.
    attention = partial(sdpa_kernel, SDPBackend.MATH) if device.type == "cpu" else nullcontext
    model.train()
    start, total = time.monotonic(), 0.0
    for step in range(recipe.steps):
        optimiser.zero_grad(set_to_none=True)
        with attention(), torch.autocast(device.type, torch.bfloat16, enabled=half_precision(device)):
            value = loss(step)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        total += value.item()
        if (step + 1) % 200 == 0:
            log.info("%s step %d: loss %.4f, %.0f s", name, step + 1, total / 200, time.monotonic() - start)
            total = 0.0
    return model.eval()


class Scenes:
    """Training scenes without end, without the pairs that are held out, drawn a chunk at a time."""

    def __init__(self, seed: int | str, recipe: Recipe) -> None:
        self.seed, self.recipe = seed, recipe
        self.rng = np.random.default_rng([ord(c) for c in str(seed)])
        self.start, self.left = 0, 0

    def batch(self) -> tuple[Album, np.ndarray]:
        """The current chunk and the numbers of the scenes of the next batch in it."""
        if self.left < self.recipe.batch:
            self.album = stream(f"{self.seed}/train", self.start, CHUNK, unseen=False)
            self.start, self.left = self.start + CHUNK, CHUNK * self.recipe.reuse
            self.order = np.concatenate([self.rng.permutation(CHUNK) for _ in range(self.recipe.reuse)])
        self.left -= self.recipe.batch
        return self.album, self.order[self.left : self.left + self.recipe.batch]


def to_input(pixels: np.ndarray, device: torch.device, size: int) -> torch.Tensor:
    """uint8 [B, H, W, 3] -> float32 [B, 3, size, size] between -1 and 1, resized as Pillow does."""
    x = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2).float()
    if x.shape[-1] != size:
        x = nn.functional.interpolate(x, (size, size), mode="bilinear", antialias=True).round().clamp(0, 255)
    return x / 127.5 - 1
