"""Attention heads as units: how much each head of an attention module writes to the residual stream.

In: a model whose attention modules end in one linear projection W_O of all heads' results side by side. Out: before
each projection a module through which these results pass, so that hooks find them as they find any other output; and
from them one number per head and token.

Head h adds W_O,h z_h to the stream: z_h is its attention-weighted sum of values, W_O,h are its columns of W_O (Elhage
et al. 2021); the bias belongs to no head, and a layer scale that follows is the same for all. Its activation at a token
is the norm of that. Channels of z_h are no units on purpose: an invertible matrix may be put into a head's values, and
its inverse into W_O,h, without changing what the model computes, and then they are other channels. The norm stays the
same. It says where a head does something, not in which direction.

Shapes: B images, N tokens, H heads of d channels, C = H d channels in all, O outputs of the projection, e at most d.
"""

from collections.abc import Collection, Iterator
from copy import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

TINY = 1e-30
"""Keeps a head that writes nothing from being divided by zero."""
SUFFIX = ".heads"
"""Ends the path of the module, which lies inside its attention module."""


class Heads(nn.Module):
    """Hands on what it is given, the results [B, N, C] of an attention module before their projection."""

    factor_Hed: torch.Tensor

    def __init__(self, num: int, projection: nn.Linear) -> None:
        super().__init__()
        self.num = num
        weight_HOd = projection.weight.detach().cpu().double().unflatten(1, (num, -1)).transpose(0, 1)
        factor_Hed = torch.linalg.qr(weight_HOd, mode="r").R  # W = Q R with Q'Q = 1, so that |W z| = |R z|
        self.register_buffer("factor_Hed", factor_Hed.float().to(projection.weight.device), persistent=False)

    def forward(self, results_BNC: torch.Tensor) -> torch.Tensor:
        return results_BNC

    def read(self, results_BNC: torch.Tensor) -> torch.Tensor:
        """float32 [B, N, H], |W_O,h z_h|."""
        results_BNHd = results_BNC.float().unflatten(-1, (self.num, -1))
        return torch.einsum("bnhd,hed->bnhe", results_BNHd, self.factor_Hed).norm(dim=-1)

    def along(self, results_BNC: torch.Tensor, gradient_BNC: torch.Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """All heads, their activations [B, N, H] and the gradients along them, the direction of each z_h being kept."""
        norms_BNH = self.read(results_BNC)
        products_BNH = (results_BNC * gradient_BNC).unflatten(-1, (self.num, -1)).sum(-1)
        yield slice(None), norms_BNH, products_BNH / norms_BNH.clamp(min=TINY)

    def put(self, results_BNC: torch.Tensor, heads: list[int], values: torch.Tensor) -> None:
        """Scale what the heads give, in place, so that these are their activations: zero switches one off."""
        results_BNHd = results_BNC.unflatten(-1, (self.num, -1))
        results_BNHd[:, :, heads] *= (values / self.read(results_BNC)[..., heads].clamp(min=TINY))[..., None]


def open_heads(model: nn.Module, names: Collection[str] | None = None) -> None:
    """Put a Heads into every attention module of the model, or only those whose path would be in `names`.

    Attention modules are nn.MultiheadAttention (torchvision, open_clip) with the batch first, and others that have
    `num_heads` and a linear `proj` or `out_proj` (timm).
    """
    for path, attention in list(model.named_modules()):
        num, projection = getattr(attention, "num_heads", None), _projection(attention)
        wanted = names is None or (path + SUFFIX).lstrip(".") in names
        if not wanted or not isinstance(num, int) or projection is None or projection.in_features % num:
            continue
        if hasattr(attention, "heads"):  # it has them already
            continue
        heads = Heads(num, projection)
        if isinstance(attention, nn.MultiheadAttention):
            _project_apart(attention)
        attention.add_module("heads", heads)
        projection.register_forward_pre_hook(partial(_through, heads))


def _through(heads: Heads, _projection: nn.Module, given: tuple) -> tuple:
    return (heads(given[0]), *given[1:])


def _projection(attention: nn.Module) -> nn.Linear | None:
    found = getattr(attention, "proj", getattr(attention, "out_proj", None))
    return found if isinstance(found, nn.Linear) and getattr(attention, "batch_first", True) else None


def _project_apart(attention: nn.MultiheadAttention) -> None:
    """Make it call `out_proj`: of itself it uses only its weights, and all in one where torch has a fast path.

    Its own code runs in a shallow copy whose projection is the identity, which keeps every bit of the results.
    """
    weight, inner = attention.out_proj.weight, copy(attention)
    identity = nn.Linear(len(weight), len(weight), device=weight.device, dtype=weight.dtype).requires_grad_(False)
    identity.weight.copy_(torch.eye(len(weight)))
    identity.bias.zero_()
    inner._modules = attention._modules | {"out_proj": identity}

    def forward(*given: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        results, weights = inner.forward(*given, **options)
        return attention.out_proj(results), weights

    vars(attention)["forward"] = forward  # hides the method of the class
