"""Small target models with answers known by construction; tests name them as factories (tests/models.py:planted)."""

import torch
from torch import nn

SIZE = (64, 96)
"""Height and width of their input."""


class Planted(nn.Module):
    """Units of known meaning: conv 0 red, 1 brightness, 2 dead, 3 one value always, 4 never above 0, 5 blue minus 2."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 8, 8)
        weight = torch.zeros(6, 3)
        weight[0] = torch.tensor([1.0, -0.5, -0.5])
        weight[1] = 1 / 3
        weight[4] = -1.0
        weight[5] = torch.tensor([0.0, 0.0, 1.0])
        bias = torch.tensor([0.0, 0.0, 0.0, 3.0, -10.0, -2.0])
        self.conv.weight.data = weight[:, :, None, None].expand(6, 3, 8, 8).clone() / 64
        self.conv.bias.data = bias
        self.relu = nn.ReLU()
        self.head = nn.Linear(6, 3, bias=False)
        self.head.weight.data = torch.eye(3, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.relu(self.conv(x)).mean((2, 3)))


class Tokens(nn.Module):
    """A token model that does nothing: token i is the mean colour of patch i, behind CLS and registers.

    The CLS token carries the image's mean, the registers the constant 9; unit 3 fires on the prefix tokens alone.
    """

    def __init__(self, registers: int = 2, patch: int = 8) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, 4, patch, patch)
        self.proj.weight.data = torch.eye(4, 3)[:, :, None, None].expand(4, 3, patch, patch).clone() / patch**2
        self.proj.bias.data = torch.zeros(4)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.register_tokens = nn.Parameter(torch.full((1, registers, 4), 9.0))
        self.block = nn.Identity()
        self.norm = nn.Identity()
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.proj(x).flatten(2).transpose(1, 2)
        cls = self.cls_token + tokens.mean(1, keepdim=True)
        cls[..., 3] = 5.0
        tokens = torch.cat([cls, self.register_tokens.expand(len(x), -1, -1), tokens], 1)
        return self.head(self.norm(self.block(tokens))[:, 0])


class Standardised(nn.Conv2d):
    """A convolution whose code views its weights as rows: it takes no weights whose channels lie side by side."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = self.weight.view(self.weight.shape[0], -1)
        weight = ((rows - rows.mean(1, keepdim=True)) / rows.std(1, keepdim=True)).view_as(self.weight)
        return nn.functional.conv2d(x, weight, self.bias, self.stride)


def standardised() -> nn.Module:
    return nn.Sequential(Standardised(3, 6, 4, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2))


def planted() -> nn.Module:
    return Planted()


def tokens(registers: int = 2) -> nn.Module:
    return Tokens(registers)


def random_cnn() -> nn.Module:
    """Convolutions with batch norm, a gap and logits; random but always the same weights."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3, 2, 1),
        nn.GELU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(24 * 16, 10),
    ).eval()


class View(nn.Module):
    """Flattens as code did before torch.flatten: only maps whose channels lie one behind the other."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(len(x), -1)


def viewing() -> nn.Module:
    """random_cnn, flattened so."""
    return nn.Sequential(*(View() if isinstance(part, nn.Flatten) else part for part in random_cnn())).eval()


class Overflowing(nn.Module):
    """Unit 0 is infinite on bright images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bright = (x.mean((1, 2, 3), keepdim=True) > 0).float()
        return self.conv(x / (1 - bright))


def overflowing() -> nn.Module:
    torch.manual_seed(0)
    return Overflowing()


def not_finite() -> nn.Module:
    model = Planted()
    model.conv.bias.data += torch.nan
    return model


def deep(layers: int = 20) -> nn.Module:
    """One convolution after the other, then a pool and logits."""
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(3 if i == 0 else 8, 8, 3, 2 if i == 0 else 1, 1) for i in range(layers)]
    return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).eval()
