"""Channels first or last: told from what a model does with a tensor.

In: a forward pass inside `with Axes() as axes`. Out: the layout of every 4-dimensional tensor in it, the grids seen.
"""

from typing import Any

import torch
from torch.overrides import TorchFunctionMode


def first_tensor(output: Any) -> Any:
    """The tensor itself, or the first entry of a tuple (attention modules return more than one value)."""
    return output[0] if isinstance(output, tuple | list) and output else output


class Axes(TorchFunctionMode):
    """Follows one forward pass and remembers of every 4-dimensional tensor whether its channels come first or last.

    Convolutions, pooling and batch norm want them first, linear layers and layer norm last; permutations move them;
    anything else hands them on from an operand of the same shape. So a layout is told from what the model does with a
    tensor, also after it left the module, and never from its sizes. A tensor about which nothing is known has the
    layout of another output of the same class of module.
    """

    FIRST = frozenset(
        [
            "conv2d",
            "conv_transpose2d",
            "batch_norm",
            "group_norm",
            "max_pool2d",
            "avg_pool2d",
            "adaptive_avg_pool2d",
            "interpolate",
        ]
    )
    LAST = frozenset(["linear", "layer_norm", "rms_norm"])

    def __init__(self) -> None:
        super().__init__()
        self.layouts: dict[int, str] = {}
        self.grids: list[tuple[int, int]] = []
        self.kept: list[torch.Tensor] = []  # keeps ids unique while we look

    def layout(self, output: Any) -> str | None:
        return self.layouts.get(id(first_tensor(output)))

    def _note(self, tensor: Any, layout: str | None) -> None:
        if isinstance(tensor, torch.Tensor) and tensor.ndim == 4 and layout and id(tensor) not in self.layouts:
            self.layouts[id(tensor)] = layout
            self.kept.append(tensor)
            height, width = tensor.shape[2:] if layout == "chw" else tensor.shape[1:3]
            self.grids.append((int(height), int(width)))

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        if name in self.FIRST | self.LAST:
            layout = "chw" if name in self.FIRST else "hwc"
            self._note(args[0] if args else None, layout)
            self._note(out, layout)
        elif name == "permute" and tensors:
            order = tuple(args[1]) if isinstance(args[1], tuple | list) else tuple(args[1:])
            moves = {((0, 2, 3, 1), "chw"): "hwc", ((0, 3, 1, 2), "hwc"): "chw"}
            self._note(out, moves.get((tuple(d % 4 for d in order), self.layout(tensors[0]) or "")))
        elif isinstance(out, torch.Tensor) and name not in ("reshape", "view", "transpose"):
            alike = [self.layout(t) for t in tensors if t.shape == out.shape and self.layout(t)]
            self._note(out, alike[0] if alike else None)
        return out
