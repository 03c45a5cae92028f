"""Running a model again from one of its layers on, with some of the layer's units set to another value.

In: a model, one recorded forward pass. Out: the same pass with what had finished before the layer's output taken from
the recording, so that an ablated pass costs only what comes after the layer.

While the model runs, its modules are nested: when a layer has its output, some modules around it are still open. All
that finished inside those is recorded, outermost modules only, and returned instead of computed. What the open modules
do in code of their own (adding a residual, joining tokens) is done again.
"""

from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from tasks.axes import first_tensor
from tasks.heads import Heads
from tasks.layers import Layer, hooked
from tasks.sae import Sae


@dataclass
class Call:
    """One finished call of a module."""

    module: nn.Module
    output: Any
    in_place: bool
    """Whether its output is its input: passed through, or written over."""
    changed: Any = None
    """What it returns instead, where units are to be changed."""


@contextmanager
def recorded(model: nn.Module, modules: list[str]) -> Iterator[dict[str, list[Call]]]:
    """While inside, a forward pass fills the dict: by module, the outermost calls that had finished when it had its
    output, in order; its own is the last. Outputs are copies, since later modules may write over them."""
    names = {model.get_submodule(name): name for name in modules}
    found: dict[str, list[Call]] = {}
    stack: list[list[Call]] = [[]]  # finished calls inside each module that is open

    def begin(_module: nn.Module, _given: tuple) -> None:
        stack.append([])

    def end(module: nn.Module, given: tuple, output: Any) -> None:
        stack.pop()
        in_place = bool(given) and output is given[0]
        stack[-1].append(Call(module, copied(output), in_place))
        if module in names:
            found[names[module]] = [call for calls in stack for call in calls]

    with ExitStack() as handles:
        for module in model.modules():
            handles.callback(module.register_forward_pre_hook(begin).remove)
            handles.callback(module.register_forward_hook(end).remove)
        yield found


@contextmanager
def replayed(calls: list[Call]) -> Iterator[None]:
    """While inside, the modules of these calls return what is recorded, call by call, and after that run as usual."""
    waiting: dict[nn.Module, deque[Call]] = defaultdict(deque)
    for call in calls:
        waiting[call.module].append(call)
    own = {module: vars(module).get("forward") for module in waiting}
    for module, queue in waiting.items():
        vars(module)["forward"] = partial(_answer, module.forward, queue)  # hides the method of the class
    try:
        yield
    finally:
        for module, forward in own.items():
            del vars(module)["forward"]
            if forward is not None:
                vars(module)["forward"] = forward


def _answer(forward: Any, queue: deque[Call], *given: Any, **options: Any) -> Any:
    if not queue:
        return forward(*given, **options)
    call = queue.popleft()
    output = given[0].copy_(call.output) if call.in_place else copied(call.output)
    return output if call.changed is None else call.changed


def copied(output: Any) -> Any:
    """A copy of every tensor in nested tuples, lists and dicts, with its strides, on which last bits may depend."""
    if isinstance(output, torch.Tensor):
        return output.clone()
    if isinstance(output, dict):
        return type(output)({key: copied(value) for key, value in output.items()})
    if isinstance(output, tuple | list):
        items = [copied(value) for value in output]
        return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)
    return output


@dataclass
class Change:
    """Units of one layer and the values that they are set to."""

    layer: Layer
    units: list[int]
    values: list[float]
    reader: Heads | Sae | None = None
    """Where the units are not channels of the layer's output."""

    def __call__(self, output: Any, positions: str) -> Any:
        """A copy of the layer's output, changed at the chosen positions."""
        output = copied(output)
        places = self.layer.places(first_tensor(output), positions)
        values = torch.tensor(self.values, dtype=places.dtype, device=places.device)
        if self.reader is None:
            places[..., self.units] = values
        else:
            self.reader.put(places, self.units, values)
        return output


def ablated(
    model: nn.Module, x: torch.Tensor, recording: dict[str, list[Call]], changes: list[Change], positions: str
) -> torch.Tensor:
    """The model's output with the changes made: replayed up to the first layer, then computed. Changes are in the order
    in which their layers have their outputs."""
    first, later = changes[0], defaultdict(list)
    for change in changes[1:]:
        later[change.layer.module].append(change)

    def changed(name: str, output: Any) -> Any:
        for change in later[name]:
            output = change(output, positions)
        return output

    *before, call = recording[first.layer.module]
    last = replace(call, changed=first(call.output, positions))
    with replayed([*before, last]), hooked(model, list(later), changed):
        return model(x)
