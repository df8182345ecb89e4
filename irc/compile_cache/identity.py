"""What a model is: its modules, all their attributes, every weight, and the code of their classes.

Two models with equal descriptions compute the same, as far as that follows from the objects themselves: what a
`forward` reads elsewhere (files, the environment, the clock, globals of Python modules that define none of the model's
classes) is not seen. Functions are described by their bytecode, so a method, or a function of the Python modules that
define the classes, that was replaced while the program runs makes another description.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import inspect
import os
import sys
import sysconfig
import types
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

Digests = Callable[[list[Tensor]], list[str]]
_PLAIN = (bool, int, float, complex, str, bytes, type(None), type(...), type(NotImplemented), range)
_TORCH_PLAIN = (torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size)
_BUILTIN = (types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType,
            types.ClassMethodDescriptorType, types.GetSetDescriptorType, types.MemberDescriptorType)  # fmt: skip
_TABLES = ("_parameters", "_buffers", "_modules")
_CALL_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Hooks of loading and saving, and what says nothing about a call.
_SKIPPED = frozenset({
    *_TABLES, *_CALL_HOOKS,
    "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs",
    "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
    "_is_full_backward_hook", "_non_persistent_buffers_set",
})  # fmt: skip
# Python's hash of a configuration, by which transformers notices changes; another number in each process.
_OF_PROCESS = frozenset({"_original_object_hash"})
_HEAP_TYPE = 1 << 9


_STANDARD = tuple(os.path.realpath(sysconfig.get_path(name)) + os.sep for name in ("stdlib", "platstdlib"))
_INSTALLED = (f"{os.sep}site-packages{os.sep}", f"{os.sep}dist-packages{os.sep}")


def is_installed(path: str) -> bool:
    """Whether a file belongs to Python itself or to an installed library."""
    return any(part in path for part in _INSTALLED) or os.path.realpath(path).startswith(_STANDARD)


class Doubt(Exception):
    """Why it cannot be told for certain whether two compilations are the same."""


def describe_model(model: nn.Module, digests: Digests) -> str:
    """A digest of everything that is known of a model.

    Raises:
        Doubt: something in it cannot be described.
    """
    return Describer(model, digests).text()


class Describer:
    """Describes one model, and other values over its modules."""

    def __init__(self, model: nn.Module | None, digests: Digests) -> None:
        self._digests = digests
        self._modules: dict[int, int] = {}
        self._objects: dict[int, int] = {}
        self._functions: dict[tuple[int, bool], Any] = {}
        self._classes: dict[type, Any] = {}
        self._tensors: dict[int, int] = {}
        self._found: list[Tensor] = []
        self._kept: list[Any] = []  # what an id stands for stays alive
        self._parts: list[Any] = []
        if model is not None:
            _refuse_global_hooks()
            self._parts.append(self._model(model))

    def add(self, what: str, value: Any) -> None:
        """One more thing that counts."""
        try:
            self._parts.append((what, self.value(value)))
        except Doubt as doubt:
            raise Doubt(f"{what}: {doubt}") from None

    def text(self) -> str:
        """The digest."""
        spaces = [self._namespace(name) for name in self._module_names()]
        parts = repr((self._parts, spaces, self._digests(self._found)))
        return hashlib.sha256(parts.encode("utf-8", "backslashreplace")).hexdigest()

    # ---------------------------------------------------------------- modules

    def _model(self, model: nn.Module) -> Any:
        named = list(model.named_modules(remove_duplicate=False))
        for _, module in named:
            self._modules.setdefault(id(module), len(self._modules))
        seen: set[int] = set()
        described = []
        for path, module in named:
            number = self._modules[id(module)]
            described.append((path, number))
            if number not in seen:
                seen.add(number)
                try:
                    described.append(self._module(module))
                except Doubt as doubt:
                    raise Doubt(f"{path or 'the model'} ({type(module).__name__}): {doubt}") from None
        return described

    def _module(self, module: nn.Module) -> Any:
        state = module.__dict__
        if isinstance(module, torch.jit.ScriptModule):
            raise Doubt("is a script module")
        if "forward" in state:
            raise Doubt("has a forward function of its own")
        if any(state[name] for name in _CALL_HOOKS):
            raise Doubt("has hooks")
        tables = []
        for table in _TABLES[:2]:
            tables.append([(name, None if t is None else self._tensor(t)) for name, t in state[table].items()])
        children = [(name, None if m is None else self._modules[id(m)]) for name, m in state["_modules"].items()]
        attributes = []
        for name in sorted(state.keys() - _SKIPPED):
            try:
                attributes.append((name, self.value(state[name])))
            except Doubt as doubt:
                raise Doubt(f"attribute {name}: {doubt}") from None
        return (self._class(type(module)), tables, children, attributes)

    def _tensor(self, tensor: Tensor) -> Any:
        if type(tensor) not in (Tensor, nn.Parameter):
            raise Doubt(f"a tensor is a {type(tensor).__name__}")
        if tensor.device.type != "cpu" or tensor.layout != torch.strided or tensor.is_quantized:
            raise Doubt(f"a tensor is {tensor.layout} on {tensor.device}")
        if id(tensor) not in self._tensors:
            self._tensors[id(tensor)] = len(self._found)
            self._found.append(tensor)
        kind = (type(tensor).__name__, str(tensor.dtype), tuple(tensor.shape), tensor.stride(), tensor.requires_grad)
        return (kind, self._tensors[id(tensor)], tensor.is_conj(), tensor.is_neg())

    # ---------------------------------------------------------------- values

    def value(self, value: Any) -> Any:
        """A value as nested tuples of plain ones.

        Raises:
            Doubt: it may hold what cannot be seen.
        """
        if type(value) in _PLAIN:
            return (type(value).__name__, repr(value))
        if isinstance(value, _TORCH_PLAIN):
            return (type(value).__name__, str(value))
        if isinstance(value, enum.Enum):
            return (self._class(type(value)), value.name)
        if isinstance(value, Tensor):
            return self._tensor(value)
        if id(value) in self._modules:
            return ("module", self._modules[id(value)])
        if isinstance(value, nn.Module):
            raise Doubt(f"holds a {type(value).__name__} that is no submodule")
        if type(value) in (list, tuple, dict, OrderedDict, set, frozenset):
            return self._container(value)
        return self._callable(value) or self._object(value)

    def _container(self, value: Any) -> Any:
        if id(value) in self._objects:
            return ("again", self._objects[id(value)])
        self._remember(value)
        if isinstance(value, (set, frozenset)):
            return (type(value).__name__, sorted(repr(self.value(item)) for item in value))
        if isinstance(value, dict):
            return (type(value).__name__, [(self.value(key), self.value(item)) for key, item in value.items()])
        return (type(value).__name__, [self.value(item) for item in value])

    def _callable(self, value: Any) -> Any:
        """A function, method, class, operator or Python module; None for anything else."""
        if isinstance(value, types.FunctionType):
            return self._function(value, self.value)
        if isinstance(value, types.MethodType):
            return ("method", self.value(value.__func__), self.value(value.__self__))
        if type(value) is functools.partial:
            return ("partial", self.value(value.func), self.value(value.args), self.value(dict(value.keywords)))
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, types.ModuleType):
            return ("python module", value.__name__)
        if isinstance(value, _BUILTIN) and not isinstance(getattr(value, "__self__", None), (list, dict, set)):
            return ("builtin", getattr(value, "__module__", None), value.__qualname__)
        if isinstance(value, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
            return ("operator", str(value))
        return None

    def _object(self, value: Any) -> Any:
        """An instance of Python classes, by their code and its attributes."""
        kind = type(value)
        inner = [c for c in kind.__mro__ if c is not object]
        if any(not c.__flags__ & _HEAP_TYPE or c.__dict__.get("__slots__") for c in inner):
            raise Doubt(f"a {kind.__module__}.{kind.__qualname__} may hold what cannot be seen")
        if not hasattr(value, "__dict__"):
            raise Doubt(f"a {kind.__module__}.{kind.__qualname__} may hold what cannot be seen")
        if id(value) in self._objects:
            return ("again", self._objects[id(value)])
        self._remember(value)
        attributes = [(name, item) for name, item in sorted(value.__dict__.items()) if name not in _OF_PROCESS]
        return (self._class(kind), [(name, self.value(item)) for name, item in attributes])

    def _remember(self, value: Any) -> None:
        self._objects[id(value)] = len(self._objects)
        self._kept.append(value)

    # ---------------------------------------------------------------- code

    def _function(self, function: Any, describe: Callable[[Any], Any]) -> Any:
        """Bytecode, defaults and closure; the latter loosely for a function that a class or a file defines."""
        place = (id(function), describe == self.value)
        if place in self._functions:
            return self._functions[place]
        self._kept.append(function)
        self._functions[place] = ("function", function.__module__, function.__qualname__)  # of itself, inside
        cells = [_content(cell) for cell in function.__closure__ or ()]
        found = (
            "function", function.__module__, function.__qualname__, _code(function.__code__),
            [describe(x) for x in function.__defaults__ or ()],
            [(key, describe(x)) for key, x in sorted((function.__kwdefaults__ or {}).items())],
            [describe(content) for content in cells],
        )  # fmt: skip
        self._functions[place] = ("function", hashlib.sha256(repr(found).encode()).hexdigest())
        return self._functions[place]

    def _class(self, kind: type) -> Any:
        """A class by name; the code of it and of its bases, once."""
        if kind not in self._classes:
            self._classes[kind] = (kind.__module__, kind.__qualname__)
            members = [
                (base.__module__, base.__qualname__, [(n, self._member(m)) for n, m in sorted(vars(base).items())])
                for base in kind.__mro__
                if base is not object and base.__flags__ & _HEAP_TYPE
            ]
            digest = hashlib.sha256(repr(members).encode("utf-8", "backslashreplace")).hexdigest()
            self._classes[kind] = (kind.__module__, kind.__qualname__, digest)
        return self._classes[kind]

    def _member(self, member: Any) -> Any:
        if isinstance(member, (staticmethod, classmethod)):
            return (type(member).__name__, self._loosely(member.__func__))
        if isinstance(member, property):
            return [self._loosely(part) for part in (member.fget, member.fset, member.fdel)]
        return self._loosely(member)

    def _loosely(self, value: Any) -> Any:
        """A value of code: what cannot be seen counts by its type alone, for the file it stands in counts as well."""
        if isinstance(value, types.FunctionType):
            return self._function(value, self._loosely)
        if isinstance(value, type):
            return ("class", value.__module__, value.__qualname__)
        if type(value) in (list, tuple, dict, set, frozenset):
            items = list(value.items()) if isinstance(value, dict) else list(value)
            found = [self._loosely(item) for item in items] if len(items) < 1000 else [len(items)]
            return (type(value).__name__, sorted(map(repr, found)) if isinstance(value, (set, frozenset)) else found)
        if type(value) in _PLAIN or isinstance(value, _TORCH_PLAIN):
            return (type(value).__name__, repr(value))
        if isinstance(value, types.ModuleType):
            return ("python module", value.__name__)
        if isinstance(value, _BUILTIN):
            return ("builtin", getattr(value, "__module__", None), value.__qualname__)
        return ("a", type(value).__module__, type(value).__qualname__)

    def _module_names(self) -> list[str]:
        """Python modules that define the classes met so far, and PyTorch's functions."""
        names = {base.__module__ for kind in self._classes for base in kind.__mro__ if base.__flags__ & _HEAP_TYPE}
        return sorted({*names, "torch.nn.functional"} & sys.modules.keys())

    def _namespace(self, name: str) -> Any:
        """Functions, classes and values of a Python module; modules come into it by being imported elsewhere.

        Texts of installed libraries do not count: some make themselves a new name in each process.
        """
        space = vars(sys.modules[name])
        path = getattr(sys.modules[name], "__file__", None) or ""
        ignored = (types.ModuleType, str) if is_installed(path) else types.ModuleType
        names = sorted(key for key, v in space.items() if not key.startswith("__") and not isinstance(v, ignored))
        return (name, [(key, self._loosely(space[key])) for key in names])


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return None


def _code(code: types.CodeType) -> Any:
    constants = [_code(c) if inspect.iscode(c) else _constant(c) for c in code.co_consts]
    return (code.co_name, code.co_code, constants, code.co_names, code.co_varnames, code.co_freevars, code.co_flags)


def _constant(value: Any) -> Any:
    return sorted(map(repr, value)) if isinstance(value, frozenset) else (type(value).__name__, repr(value))


def _refuse_global_hooks() -> None:
    module: Any = torch.nn.modules.module
    tables: Iterable[Any] = (module._global_forward_hooks, module._global_forward_pre_hooks,
                             module._global_backward_hooks)  # fmt: skip
    if any(tables):
        raise Doubt("there are hooks for all modules")
