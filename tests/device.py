"""A GPU that is not there: tensors that say they lie on one, whose values lie in main memory.

In: a test that runs inside `simulated()`. Out: what a GPU would compute, by the code that only a GPU runs; an error
where tensors of two devices meet, as on a real one; a list of the places where the host would wait for it. So a machine
without a GPU tests everything of one but its speed, its last bits and its backward passes.
"""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten
GPU = torch.device("cuda", 0)
CROSSES = (aten.copy_.default, aten._to_copy.default)
"""What may read from one device and write to the other."""
WAITS = (
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.equal.default,
    aten.masked_select.default,
    aten.bincount.default,
    aten.repeat_interleave.Tensor,
    aten._unique2.default,
)
"""What gives the host a value, or a shape that hangs on values."""


class OnGpu(torch.Tensor):
    """What lies on the GPU; `held` is what it would be on the CPU."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "OnGpu":
        with torch.inference_mode(False):  # in which a view of a weight could not be made
            found = torch.Tensor._make_wrapper_subclass(
                cls, held.shape, held.stride(), held.storage_offset(), dtype=held.dtype, device=GPU
            )
        found.held = held
        return found

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return Simulation.current[-1].__torch_dispatch__(func, types, args, kwargs)  # from a thread that is in no mode


class Simulation(TorchDispatchMode):
    """Computes on the CPU what is asked of either device."""

    current: ClassVar[list["Simulation"]] = []

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        """Lines of our code at which the host would have waited."""
        self.pinned: list[torch.Tensor] = []

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        self.pinned.append(tensor.clone())
        return self.pinned[-1]

    def _is_pinned(self, tensor: torch.Tensor) -> bool:
        return any(tensor.untyped_storage().data_ptr() == p.untyped_storage().data_ptr() for p in self.pinned)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        with self:  # inference mode hands on what is made of other operations
            if (found := func.decompose(*args, **kwargs)) is not NotImplemented:
                return found
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        theirs = [x for x in tensors if isinstance(x, OnGpu)]
        asked = kwargs.get("device")
        if asked is not None:
            kwargs["device"] = torch.device("cpu")
        there = torch.device(asked).type == "cuda" if asked is not None else bool(theirs)
        if func is aten.copy_.default:
            there = isinstance(args[0], OnGpu)
        elif func not in CROSSES:
            strangers = [x for x in tensors if not isinstance(x, OnGpu) and x.ndim]
            index = func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default)
            assert not (theirs and strangers) or index, f"{func}: tensors on two devices"
        if (theirs or there) and self._waits(func, args, kwargs, there):
            self.waits.append(_line())
        if theirs and func is aten._fused_sdp_choice.default:
            return 0  # the products themselves: other choices are kernels of the device
        found = func(*tree_map_only(OnGpu, lambda x: x.held, args), **tree_map_only(OnGpu, lambda x: x.held, kwargs))
        if not there:
            return found
        own = {id(x.held): x for x in theirs}  # what is changed in place stays the same tensor
        return tree_map_only(torch.Tensor, lambda x: own[id(x)] if id(x) in own else OnGpu(x), found)

    def _waits(self, func: Any, args: Any, kwargs: Any, there: bool) -> bool:
        if func in CROSSES:
            source = args[1] if func is aten.copy_.default else args[0]
            free = kwargs.get("non_blocking") or (func is aten.copy_.default and args[2:] == (True,))
            here = [x for x in (args[:2] if func is aten.copy_.default else args[:1]) if not isinstance(x, OnGpu)]
            return there != isinstance(source, OnGpu) and not (free and all(map(self._is_pinned, here)))
        if func in (aten.index.Tensor, aten.index_put_.default):
            return any(
                x.dtype in (torch.bool, torch.uint8) or not isinstance(x, OnGpu) for x in args[1] if x is not None
            )
        return func in WAITS


def _line() -> str:
    own = [f for f in traceback.extract_stack() if "/tasks/" in f.filename or "/tests/test_" in f.filename]
    return f"{own[-1].filename.rsplit('/', 1)[-1]}:{own[-1].lineno} {own[-1].line}" if own else "elsewhere"


@contextmanager
def simulated() -> Iterator[Simulation]:
    """Inside, torch finds a GPU. Sums run as on a CPU."""
    torch._C._ensureCUDADeviceGuardSet()  # as FakeTensorMode does: no driver is asked which device is the current one
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor too asks the mode for a copy on the device
    with pytest.MonkeyPatch.context() as patch, torch.backends.cudnn.flags(enabled=False), Simulation() as simulation:
        patch.setattr("torch.__future__.get_overwrite_module_params_on_conversion", lambda: True)
        patch.setattr("torch.cuda.is_available", lambda: True)
        patch.setattr("torch.cuda._lazy_init", lambda: None)
        patch.setattr("torch.cuda.synchronize", lambda *_: None)
        patch.setattr("torch.Tensor.pin_memory", lambda tensor, *_: simulation.pin(tensor))
        Simulation.current.append(simulation)
        try:
            yield simulation
        finally:  # of a test that fails nothing stays for the next
            Simulation.current.clear()
            torch._C._set_only_lift_cpu_tensors(False)


@contextmanager
def no_gpu() -> Iterator[None]:
    """Inside, torch finds none, also where there is one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.cuda.is_available", lambda: False)
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        yield
