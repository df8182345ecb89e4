"""Layers that are alike are traced once: `torch.export` takes a third of a second for each layer of a Llama.

While a model is exported, the blocks of its module lists that have the same structure are watched. The first one is
traced between two marks; where another is called with arguments of the same types, one call of
`irc_capture::repeat` stands for it, and `expansion.py` puts the first one's operations there, over the other's weights.

That is right because both run the same code on the same values: what a block does can differ from what the first one
did only after it has read something that differs. Arguments are compared, and so is every attribute of every module
inside; attributes that differ (the number of a layer, say) are watched while the first block is traced, and if one of
them was read, the other block is traced itself. So is whatever has hooks, changes its own attributes, or takes or gives
anything but tensors and plain values. What is not seen: state that a forward function keeps outside of its modules.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

_PLAIN = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
    type(None),
)
_LISTS = (nn.ModuleList, nn.Sequential)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_TABLES = ("_parameters", "_buffers", "_modules")
Place = tuple[str, str]
"""(path of a module within its block, name of an attribute)."""

_library = torch.library.Library("irc_capture", "DEF")
_library.define("enter(Tensor[] xs, int call) -> Tensor[]")
_library.define("leave(Tensor[] ys, int call) -> Tensor[]")
_library.define("repeat(Tensor[] xs, int call, int block) -> Tensor[]")
ENTER, LEAVE, REPEAT = (getattr(torch.ops.irc_capture, name).default for name in ("enter", "leave", "repeat"))
_active: list[Repeats] = []


@dataclass
class Block:
    """A module that may be a repetition: where it is, and which attributes differ among its kind."""

    module: nn.Module
    path: str
    number: int
    varying: frozenset[Place] = frozenset()

    def value(self, place: Place) -> Any:
        return _value(self.module.get_submodule(place[0]), place[1])


@dataclass
class Traced:
    """A block that was traced between marks: with what arguments, what it gave, what it read."""

    block: Block
    call: int
    given: Any
    results: list[Any]
    spec: pytree.TreeSpec
    read: frozenset[Place]


@dataclass
class Repeats:
    """What happened to the blocks during one export."""

    blocks: list[Block]
    traced: list[Traced] = field(default_factory=list)
    calls: int = 0
    repeated: int = 0
    inside: bool = False

    def call(self, block: Block, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """What stands for the forward function of a block while the model is traced."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        given = _described(leaves, spec)
        if self.inside or given is None or _has_hooks(block.module):
            return forward(*args, **kwargs)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        for known in self.traced:
            if known.given == given and _may_repeat(known, block):
                self.repeated += 1
                results = iter(REPEAT(tensors, known.call, block.number))
                flat = [next(results) if isinstance(leaf, Tensor) else leaf for leaf in known.results]
                return pytree.tree_unflatten(flat, known.spec)
        return self._trace(block, forward, leaves, spec, given)

    def _trace(self, block: Block, forward: Callable[..., Any], leaves: list[Any], spec: Any, given: Any) -> Any:
        call, self.calls, self.inside = self.calls, self.calls + 1, True
        entered = iter(ENTER([leaf for leaf in leaves if isinstance(leaf, Tensor)], call))
        args, kwargs = pytree.tree_unflatten([next(entered) if isinstance(x, Tensor) else x for x in leaves], spec)
        before = _attributes(block.module)
        try:
            with _watched(block) as read:
                result = forward(*args, **kwargs)
        finally:
            self.inside = False
        found, result_spec = pytree.tree_flatten(result)
        unchanged = _alike(before, _attributes(block.module), deep=False)
        if not unchanged or not all(isinstance(x, (Tensor, *_PLAIN)) for x in found):
            return result
        left = iter(LEAVE([x for x in found if isinstance(x, Tensor)], call))
        found = [next(left) if isinstance(x, Tensor) else x for x in found]
        self.traced.append(Traced(block, call, given, found, result_spec, frozenset(read)))
        return pytree.tree_unflatten(found, result_spec)


@contextlib.contextmanager
def recorded(model: nn.Module) -> Iterator[Repeats]:
    """While the body exports the model, repeated blocks are traced once; the model is left as it was."""
    state = Repeats(_blocks(model))
    for block in state.blocks:
        block.module.__dict__["forward"] = _replaced(state, block, block.module.forward)
    _active.append(state)
    try:
        yield state
    finally:
        _active.pop()
        for block in state.blocks:
            del block.module.__dict__["forward"]


def _replaced(state: Repeats, block: Block, forward: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: state.call(block, forward, args, kwargs)


# -------------------------------------------------------------------- which blocks


def _blocks(model: nn.Module) -> list[Block]:
    """Blocks of the same structure in lists of modules, the outermost ones."""
    found: list[Block] = []
    covered: set[int] = set()
    for path, holder in model.named_modules():
        if not isinstance(holder, _LISTS) or id(holder) in covered:
            continue
        kinds: dict[Any, list[Block]] = {}
        for name, module in holder.named_children():
            structure = _structure(module)
            if structure is not None and id(module) not in covered:
                kinds.setdefault(structure, []).append(Block(module, f"{path}.{name}" if path else name, 0))
        for blocks in kinds.values():
            if len(blocks) < 2:
                continue
            varying = frozenset().union(*[_differences(blocks[0], other) for other in blocks[1:]])
            if any(_is_property(block.module, place) for block in blocks for place in varying):
                continue
            covered.update(id(inner) for block in blocks for inner in block.module.modules())
            for block in blocks:
                block.number, block.varying = len(found), varying
                found.append(block)
    return found


def _structure(module: nn.Module) -> Any:
    """Modules inside by path and class, types of their weights, what is shared; None for what is never a repetition."""
    places: dict[int, int] = {}
    parts: list[Any] = []
    for path, inner in module.named_modules(remove_duplicate=False):
        if "forward" in inner.__dict__ or isinstance(inner, torch.jit.ScriptModule):
            return None
        parts.append((path, type(inner), places.setdefault(id(inner), len(places))))
        for table in _TABLES[:2]:
            for name, tensor in inner.__dict__[table].items():
                kind = None if tensor is None else _described([tensor], None)
                parts.append((name, kind, None if tensor is None else places.setdefault(id(tensor), len(places))))
    return tuple(parts) if len(parts) > 1 and any(True for _ in module.children()) else None


def _differences(one: Block, other: Block) -> set[Place]:
    """Attributes of the modules inside that are not the same in both."""
    found: set[Place] = set()
    for path, inner in one.module.named_modules():
        twin = other.module.get_submodule(path)
        for name in (inner.__dict__.keys() | twin.__dict__.keys()) - set(_TABLES):
            if not _alike(_value(inner, name), _value(twin, name)):
                found.add((path, name))
    return found


def _may_repeat(known: Traced, block: Block) -> bool:
    """Whether the block has the structure of the traced one, which read nothing that differs."""
    if known.block.varying is not block.varying:  # another kind
        return False
    return all(_alike(known.block.value(place), block.value(place)) for place in known.read)


def _has_hooks(module: nn.Module) -> bool:
    return any(inner.__dict__[name] for inner in module.modules() for name in _HOOKS)


# -------------------------------------------------------------------- what is the same

_MISSING = object()


def _value(module: nn.Module, name: str) -> Any:
    """An attribute as it is compared: a method of the module's own, or a partial call, by what it consists of."""
    value = module.__dict__.get(name, _MISSING)
    if isinstance(value, MethodType) and value.__self__ is module:
        return ("method", value.__func__)
    if type(value) is functools.partial:
        return ("partial", value.func, value.args, value.keywords)
    return value


def _alike(a: Any, b: Any, *, deep: bool = True) -> bool:
    """The same object, equal plain values, or containers of such."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, _PLAIN):
        return bool(a == b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(_alike(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return list(a) == list(b) and all(_alike(a[key], b[key]) for key in a)
    return isinstance(a, (set, frozenset)) and all(isinstance(x, _PLAIN) for x in a) and a == b


def _attributes(module: nn.Module) -> list[dict[str, Any]]:
    """Every attribute of every module inside, containers copied: whether they change shows in a comparison."""

    def copied(value: Any) -> Any:
        return value.copy() if isinstance(value, (list, dict, set)) else value

    return [{name: copied(value) for name, value in inner.__dict__.items()} for inner in module.modules()]


def _described(leaves: list[Any], spec: Any) -> Any:
    """Types of tensors and values of everything else, to be compared; None if there is anything else."""
    found: list[Any] = [spec]
    for leaf in leaves:
        if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
            sizes = [_number(x) for x in (*leaf.shape, *leaf.stride(), leaf.storage_offset())]
            found.append((leaf.dtype, leaf.device, leaf.dim(), leaf.requires_grad, *sizes))
        elif isinstance(leaf, torch.SymInt):
            found.append((torch.SymInt, leaf.node.expr))
        elif isinstance(leaf, _PLAIN):
            found.append((type(leaf), leaf))
        else:
            return None
    return tuple(found)


def _number(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size


# -------------------------------------------------------------------- what is read


def _is_property(module: nn.Module, place: Place) -> bool:
    """Whether the class gives the attribute a meaning of its own."""
    kind = type(module.get_submodule(place[0]))
    return inspect.isdatadescriptor(inspect.getattr_static(kind, place[1], None)) or hasattr(kind, place[1])


@contextlib.contextmanager
def _watched(block: Block) -> Iterator[set[Place]]:
    """Places of the block whose attributes are read in the body, of those that vary among blocks."""
    read: set[Place] = set()
    paths = {id(inner): path for path, inner in block.module.named_modules(remove_duplicate=False)}
    watched = {(type(block.module.get_submodule(path)), name) for path, name in block.varying}

    def reader(name: str) -> property:
        def get(instance: Any) -> Any:
            if id(instance) in paths:
                read.add((paths[id(instance)], name))
            if name in instance.__dict__:
                return instance.__dict__[name]
            raise AttributeError(name)

        def put(instance: Any, value: Any) -> None:
            instance.__dict__[name] = value

        return property(get, put)

    for kind, name in watched:
        setattr(kind, name, reader(name))
    try:
        yield read
    finally:
        for kind, name in watched:
            delattr(kind, name)


# -------------------------------------------------------------------- types of the marks


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)


@torch.library.register_fake("irc_capture::enter", lib=_library)
def _enter(xs: list[Tensor], call: int) -> list[Tensor]:
    return [_like(x) for x in xs]


@torch.library.register_fake("irc_capture::leave", lib=_library)
def _leave(ys: list[Tensor], call: int) -> list[Tensor]:
    return [_like(y) for y in ys]


@torch.library.register_fake("irc_capture::repeat", lib=_library)
def _repeat(xs: list[Tensor], call: int, block: int) -> list[Tensor]:
    known = next(traced for traced in _active[-1].traced if traced.call == call)
    return [_like(y) for y in known.results if isinstance(y, Tensor)]
