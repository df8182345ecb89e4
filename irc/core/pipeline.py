"""Pipelines of passes: a Python list, text, or YAML; the same thing three ways.

    [FoldConvBatchNorm(), QuantizeWeights(bits=4, group_size=32)]
    fold-conv-batch-norm,quantize-weights{bits=4,group-size=32}
    - fold-conv-batch-norm
    - quantize-weights: {bits: 4, group-size: 32}

Whatever is wrong in a pipeline (syntax, names, options, values) is reported at once.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from irc.core import options
from irc.core.contract import Pass, registered_passes
from irc.core.errors import OptionError, nearest
from irc.core.pipeline_text import PassSpec, PipelineSyntaxError, parse_text
from irc.core.pipeline_yaml import read_yaml_file

Source = str | Path | Iterable[Any]

_PROVIDER = "irc.passes"


@functools.cache
def load_providers() -> None:
    """Import the packages that register passes: irc's own, and those of other distributions."""
    importlib.import_module(_PROVIDER)
    for entry in metadata.entry_points(group=_PROVIDER):
        entry.load()


def parse_pipeline(source: Source) -> list[Pass]:
    """Passes from a list (of passes, rules, texts, mappings), a text, or a YAML file.

    A string or path ending in `.yaml` or `.yml` is read as a file.

    Raises:
        OptionError: lists every unknown pass, unknown option and wrong value, with the nearest names.
    """
    problems: list[str] = []
    passes: list[Pass] = []
    for item in _items(source, problems):
        if isinstance(item, PassSpec):
            built = build_pass(item, problems)
            if built is not None:
                passes.append(built)
        else:
            passes.append(item)
    if problems:
        raise OptionError("this pipeline cannot be used:\n" + "\n".join(f"  - {p}" for p in problems))
    return passes


def print_pipeline(passes: Iterable[Pass], *, style: str = "text") -> str:
    """The text (or, with `style="yaml"`, the YAML) of passes; only options that are not the default."""
    if style not in ("text", "yaml"):
        raise OptionError(f"a pipeline prints as text or yaml, not {style!r}")
    items = [(one.name, printed_options(one, style=style)) for one in passes]
    if style == "text":
        return ",".join(
            name + ("{" + ",".join(f"{k}={v}" for k, v in given.items()) + "}" if given else "")
            for name, given in items
        )
    if not items:
        return "[]\n"
    lines = []
    for name, given in items:
        lines.append(f"- {name}:" if given else f"- {name}")
        lines += [f"    {key}: {value}" for key, value in given.items()]
    return "\n".join(lines) + "\n"


def print_pass(one: Pass) -> str:
    """Text of one pass."""
    return print_pipeline([one])


def printed_options(one: Pass, *, style: str = "text") -> dict[str, str]:
    """Option → text, of the options that are not the default.

    Raises:
        OptionError: a value has no text form (a tensor, a function).
    """
    printed: dict[str, str] = {}
    text = options.word if style == "text" else options.yaml_word
    for field in dataclasses.fields(one):
        value = getattr(one, field.name)
        default = field.default_factory() if callable(field.default_factory) else field.default
        if not field.init or field.name == "name" or (type(value) is type(default) and value == default):
            continue
        try:
            printed[field.name.replace("_", "-")] = options.write(value, text)
        except options.WrongValue as error:
            raise OptionError(f"option {field.name} of pass {one.name}: {error}") from None
    return printed


def build_pass(spec: PassSpec, problems: list[str]) -> Pass | None:
    """The pass that a spec describes; whatever is wrong with it is added to `problems`."""
    load_providers()
    known = registered_passes()
    if spec.name not in known:
        problems.append(f"no pass is called {spec.name!r}{nearest(spec.name, known)}")
        return None
    cls = known[spec.name]
    wanted = options.option_types(cls)
    given: dict[str, Any] = {}
    found = len(problems)
    for key, raw in spec.options.items():
        field = key.replace("-", "_")
        if field not in wanted:
            names = [name.replace("_", "-") for name in wanted]
            problems.append(f"pass {spec.name!r} has no option {key!r}{nearest(key, names)}")
            continue
        try:
            given[field] = options.read(raw, wanted[field])
        except options.WrongValue as error:
            problems.append(f"option {key!r} of pass {spec.name!r}: {error}")
    named = {key.replace("-", "_") for key in spec.options}
    problems.extend(
        f"pass {spec.name!r} needs option {name.replace('_', '-')!r} ({options.type_text(wanted[name])})"
        for name in _required(cls)
        if name not in named
    )
    if len(problems) > found:
        return None
    try:
        return cls(**given)
    except (OptionError, ValueError) as error:
        problems.append(f"pass {spec.name!r}: {str(error).removeprefix(f'{spec.name}: ')}")
        return None


def _required(cls: type[Pass]) -> list[str]:
    missing = dataclasses.MISSING
    return [f.name for f in dataclasses.fields(cls) if f.init and f.default is missing and f.default_factory is missing]


def _items(source: Source, problems: list[str]) -> list[PassSpec | Pass]:
    if isinstance(source, Path) or (isinstance(source, str) and source.endswith((".yaml", ".yml"))):
        return list(read_yaml_file(Path(source), problems))
    if isinstance(source, str):
        return list(parse_text(source, problems))
    if isinstance(source, (Pass, Mapping)) or not isinstance(source, Iterable):
        source = [source]
    found: list[PassSpec | Pass] = []
    for item in source:
        if isinstance(item, Pass):
            found.append(item)
        elif isinstance(item, str):
            found.extend(parse_text(item, problems))
        elif isinstance(item, Mapping):
            found.extend(_mapping_specs(item, problems))
        elif isinstance(item, type) and issubclass(item, Pass):
            problems.append(f"{item.__name__} is a class: write {item.__name__}()")
        elif callable(getattr(item, "as_pass", None)):  # a rewrite rule
            found.append(item.as_pass())
        else:
            problems.append(f"{item!r} is not a pass, a rule or the text of one")
    return found


def _mapping_specs(item: Mapping[Any, Any], problems: list[str]) -> list[PassSpec]:
    """`{name: {option: value}}` with Python values, as `yaml.safe_load` or JSON gives them."""
    specs = []
    for name, given in item.items():
        if not isinstance(given, (Mapping, type(None))):
            problems.append(f"the options of {name} must be a mapping, not {given!r}")
            continue
        try:
            specs.append(PassSpec(str(name), {str(k): _raw(v) for k, v in (given or {}).items()}))
        except PipelineSyntaxError as error:
            problems.append(f"pass {str(name)!r}: {error}")
    return specs


def _raw(value: Any) -> options.Raw:
    if isinstance(value, str):
        return options.Quoted(value)
    if isinstance(value, (list, tuple)):
        return [_raw(item) for item in value]
    if value is None or isinstance(value, (bool, int, float)):
        return options.write(value)
    raise PipelineSyntaxError(f"{value!r} cannot be an option value")


__all__ = ["PassSpec", "load_providers", "parse_pipeline", "print_pass", "print_pipeline", "printed_options"]
