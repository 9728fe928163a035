"""Devices that exist in name only: real numbers on the CPU, which raise where an accelerator would.

A `Claimed` tensor holds CPU data and says that it is on `gpu:0` or `gpu:1`. An operation whose tensors are on different
devices raises `DeviceMismatch` under the rules that torch has for accelerators: tensors without dimensions on the CPU
are free, so are indices on the CPU, copies go anywhere, and numpy reads the CPU alone.

Registration holds for the whole process, and autograd refuses devices that appear after its first backward pass, so
tests of devices run in a process of their own (`tests/test_devices.py`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _python_dispatch, backend_registration
from torch.utils._pytree import tree_map

NAME = "gpu"
_aten: Any = torch.ops.aten

_COPIES = {"_to_copy", "copy_", "copy"}
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
_STRICT = {"cat", "equal", "index_select", "gather", "scatter", "index_add", "index_copy", "embedding", "isin"}
"""Operations that refuse a CPU tensor without dimensions too."""
_RESHAPES = {"squeeze_", "unsqueeze_", "resize_", "t_", "transpose_", "set_", "as_strided_"}
"""A wrapper's shape is fixed, so these can't be followed."""


MET: list[str] = []
"""Every mismatch since it was last cleared, caught or not."""


class DeviceMismatch(RuntimeError):
    """Two devices met in one operation."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        MET.append(text)


class _Backend:
    """What torch asks of a device's module."""

    def is_available(self) -> bool:
        return True

    is_initialized = is_available

    def device_count(self) -> int:
        return 2

    def current_device(self) -> int:
        return 0

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None: ...

    def _lazy_init(self) -> None: ...


@functools.cache
def _register() -> None:
    """Fails where this torch has no devices written in Python: the checks must not pass without having run."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())
    # Module.to then keeps tied parameters tied, as on a real device.
    torch.__future__.set_swap_module_params_on_conversion(True)


class Claimed(Tensor):
    """A tensor on a device that does not exist; `held` is its data on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor, device: torch.device) -> Claimed:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=device,
        )

    def __init__(self, held: Tensor, device: torch.device) -> None:
        self.held = held

    def __deepcopy__(self, memo: dict[int, Any]) -> Claimed:
        copy = self.detach().clone().requires_grad_(self.requires_grad)
        if isinstance(self, nn.Parameter):
            copy._is_param = True
        memo[id(self)] = copy
        return copy

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"{self.held!r} on {self.device}"

    __torch_function__ = torch._C._disabled_torch_function_impl

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        if force:
            return self.detach().cpu().numpy()
        text = f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() first."
        MET.append(text)
        raise TypeError(text)

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self.numpy()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _device(tensor: Tensor) -> torch.device:
    return tensor.device if isinstance(tensor, Claimed) else torch.device("cpu")


@dataclasses.dataclass(frozen=True)
class _Rule:
    """What is known of an operation: its name, and the places and names of the arguments that it changes."""

    name: str
    at: tuple[int, ...]
    names: tuple[str, ...]

    @classmethod
    @functools.cache
    def of(cls, func: Any) -> _Rule:
        changed = [
            (i, argument)
            for i, argument in enumerate(func._schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        name = func._schema.name.removeprefix("aten::")
        return cls(name, tuple(i for i, _ in changed), tuple(argument.name for _, argument in changed))

    def written(self, args: Any, kwargs: dict[str, Any]) -> list[Tensor]:
        found: list[Tensor] = []
        for i, name in zip(self.at, self.names, strict=True):
            found += _tensors(args[i] if i < len(args) else kwargs.get(name))
        return found


def _tensors(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, list | tuple):
        return [tensor for part in tree for tensor in _tensors(part)]
    return []


def _meeting(rule: _Rule, tensors: list[Tensor], written: list[Tensor], args: Any, kwargs: Any) -> torch.device:
    """The one device of an operation's tensors.

    Raises:
        DeviceMismatch: if they have several.
    """
    if rule.name in _RESHAPES:
        raise NotImplementedError(f"{rule.name} of a tensor on {NAME}: the shape of a Claimed tensor is fixed.")
    if rule.name in _COPIES:
        return _device(tensors[0])
    bound = tensors
    if rule.name in _INDEXING:
        # A tensor on the CPU takes indices from the CPU alone; others take them from there too.
        indices = [i for i in args[1] if i is not None and (isinstance(i, Claimed) or not isinstance(args[0], Claimed))]
        bound = [args[0], *indices, *([args[2]] if "put" in rule.name else [])]
    if rule.name.rstrip("_") not in _STRICT:
        bound = [t for t in bound if t.dim() or isinstance(t, Claimed) or any(t is w for w in written)]
    devices = {_device(tensor) for tensor in bound}
    if kwargs.get("generator") is not None:
        devices.add(kwargs["generator"].device)
        devices |= {_indexed(kwargs["device"])} if kwargs.get("device") is not None else set()
    if len(devices) > 1:
        found = " and ".join(sorted(map(str, devices)))
        raise DeviceMismatch(f"Expected all tensors to be on the same device, but found {found} in {rule.name}.")
    return devices.pop() if devices else torch.device("cpu")


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = _tensors(args) + _tensors(list(kwargs.values()))
    wanted = kwargs.get("device")
    if (wanted is None or torch.device(wanted).type != NAME) and not any(isinstance(t, Claimed) for t in tensors):
        return func(*args, **kwargs)
    if func is _aten.histc.default and not args[0].is_floating_point():
        # Devices count integers; the CPU does not.
        return _run(func, (args[0].float(), *args[1:]), kwargs).to(args[0].dtype)
    rule = _Rule.of(func)
    written = rule.written(args, kwargs)
    device = _meeting(rule, tensors, written, args, kwargs)
    if wanted is not None:
        device = _indexed(wanted)
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if kwargs.get("pin_memory"):
        kwargs = {**kwargs, "pin_memory": False}
    own = {id(held(tensor)): tensor for tensor in written}
    out = func(*held(args), **held(kwargs))
    return _claimed(out, device, own)


def held(tree: Any) -> Any:
    """The data on the CPU of every tensor in a nest of lists and dicts."""
    if isinstance(tree, Claimed):
        return tree.held
    if isinstance(tree, list | tuple):
        return type(tree)(held(part) for part in tree)
    return {key: held(value) for key, value in tree.items()} if isinstance(tree, dict) else tree


def _claimed(out: Any, device: torch.device, own: dict[int, Tensor]) -> Any:
    """Results on their device; an argument that was changed in place is itself."""
    if isinstance(out, list | tuple):
        return type(out)(_claimed(part, device, own) for part in out)
    if not isinstance(out, Tensor) or isinstance(out, Claimed):
        return out
    return own[id(out)] if id(out) in own else out if device.type == "cpu" else Claimed(out, device)


def _indexed(device: torch.device | str) -> torch.device:
    device = torch.device(device)
    return torch.device(NAME, device.index or 0) if device.type == NAME else device


class _Factories(_python_dispatch.TorchDispatchMode):
    """Tensors that torch itself makes on a claimed device, as backward passes do."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Constructors(TorchFunctionMode):
    """The functions that torch runs without its dispatcher, or with an in-place change of shape."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _FROM_VALUES:
            value, *rest = args
            value = value if isinstance(value, Tensor) else tree_map(_item, value)
            made = func(value, *rest, **{**kwargs, "device": None if isinstance(value, Tensor) else "cpu"})
            return made.to(kwargs.get("device") or made.device)
        if func in _PRODUCTS and args[0].dim() == 1 and args[1].dim() == 2:
            return func(args[0][None], args[1])[0]
        if func in _BRACKETS and isinstance(args[0], Claimed):
            at = args[1] if isinstance(args[1], tuple) else (args[1],)
            args = (args[0], tuple(torch.tensor(i) if isinstance(i, list) else i for i in at), *args[2:])
        return func(*args, **kwargs)


def _item(value: Any) -> Any:
    return value.item() if isinstance(value, Claimed) else value


_FROM_VALUES = (torch.tensor, torch.as_tensor, torch.asarray)
_BRACKETS = (Tensor.__getitem__, Tensor.__setitem__)
_PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__)


def spread(hf: Any) -> None:
    """Puts the blocks on both devices in turn; hooks of accelerate move what each is given."""
    from accelerate import dispatch_model

    place: dict[str, str] = {}
    for name, child in hf.base_model.named_children():
        path, is_norm = f"{hf.base_model_prefix}.{name}", "norm" in name or name == "ln_f"
        if isinstance(child, nn.ModuleList):
            place |= {f"{path}.{i}": f"{NAME}:{(i + 1) % 2}" for i in range(len(child))}
        else:
            place[path] = f"{NAME}:{int(is_norm)}"  # the final norm is apart from the head
    head = next(name for name, module in hf.named_modules() if module is hf.get_output_embeddings())
    dispatch_model(hf, device_map={**place, head: f"{NAME}:0"})


@contextlib.contextmanager
def devices() -> Iterator[None]:
    """Makes `gpu:0` and `gpu:1` usable inside the block."""
    _register()
    # Autograd has queues for one device of this kind; without threads of its own it needs none.
    with torch.autograd.set_multithreading_enabled(False), _Factories(), _Constructors():
        yield
