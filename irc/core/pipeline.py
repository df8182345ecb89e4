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
import json
import re
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from irc.core import options
from irc.core.contract import Pass, registered_passes
from irc.core.errors import OptionError, nearest

Source = str | Path | Iterable[Any]

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_PROVIDER = "irc.passes"
_MAX_DEPTH = 16


@dataclasses.dataclass
class PassSpec:
    """A pass as written: its name and raw option values, not looked up yet."""

    name: str
    options: dict[str, options.Raw] = dataclasses.field(default_factory=dict)


class _SyntaxError(ValueError):
    """One thing wrong in the text of a pipeline."""


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
        problems.append(f"pass {spec.name!r}: {error}")
        return None


def _required(cls: type[Pass]) -> list[str]:
    missing = dataclasses.MISSING
    return [f.name for f in dataclasses.fields(cls) if f.init and f.default is missing and f.default_factory is missing]


def _items(source: Source, problems: list[str]) -> list[PassSpec | Pass]:
    if isinstance(source, Path) or (isinstance(source, str) and source.endswith((".yaml", ".yml"))):
        return list(_read_yaml_file(Path(source), problems))
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
        except _SyntaxError as error:
            problems.append(f"pass {str(name)!r}: {error}")
    return specs


def _raw(value: Any) -> options.Raw:
    if isinstance(value, str):
        return options.Quoted(value)
    if isinstance(value, (list, tuple)):
        return [_raw(item) for item in value]
    if value is None or isinstance(value, (bool, int, float)):
        return options.write(value)
    raise _SyntaxError(f"{value!r} cannot be an option value")


# -------------------------------------------------------------------- text


def parse_text(text: str, problems: list[str]) -> list[PassSpec]:
    """Read `name{option=value,…},…`; syntax errors are added to `problems`, each with its place."""
    specs: list[PassSpec] = []
    reader = _Reader(text)
    if not text.strip():
        return specs
    while True:
        start = reader.at
        try:
            specs.append(reader.read_pass())
            reader.expect_end_or_comma()
        except _SyntaxError as error:
            problems.append(f"{error} at column {reader.at + 1} of {text!r}")
            reader.skip_pass(start)
        if reader.at >= len(text):
            return specs
        reader.at += 1  # the comma


class _Reader:
    """A cursor over the text of a pipeline."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def peek(self) -> str:
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1
        return self.text[self.at : self.at + 1]

    def expect(self, char: str) -> None:
        if self.peek() != char:
            raise _SyntaxError(f"expected {char!r}")
        self.at += 1

    def expect_end_or_comma(self) -> None:
        if self.peek() not in ("", ","):
            raise _SyntaxError("expected ',' or '{' after the name of a pass")

    def match(self, pattern: re.Pattern[str], what: str) -> str:
        self.peek()
        found = pattern.match(self.text, self.at)
        if found is None:
            raise _SyntaxError(f"expected {what}")
        self.at = found.end()
        return found[0]

    def read_pass(self) -> PassSpec:
        spec = PassSpec(self.match(_NAME, "the name of a pass"))
        if self.peek() != "{":
            return spec
        self.at += 1
        while self.peek() != "}":
            key = self.match(_NAME, "the name of an option, or '}'")
            if key in spec.options:
                raise _SyntaxError(f"option {key!r} is given twice")
            self.expect("=")
            spec.options[key] = self.read_value()
            if self.peek() != ",":
                break
            self.at += 1
        self.expect("}")
        return spec

    def read_value(self, depth: int = 0) -> options.Raw:
        start = self.peek()
        if start == '"':
            try:
                value, self.at = json.JSONDecoder().raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                raise _SyntaxError(f"bad quoted text ({error.msg})") from None
            return options.Quoted(value)
        if start != "[":
            pattern = options.BARE_ITEM if depth else options.BARE
            return self.match(pattern, "a value (text with other characters needs double quotes)")
        if depth >= _MAX_DEPTH:
            raise _SyntaxError("lists are nested too deep")
        self.at += 1
        items: list[Any] = []
        while self.peek() != "]":
            items.append(self.read_value(depth + 1))
            if self.peek() != ",":
                break
            self.at += 1
        self.expect("]")
        return items

    def skip_pass(self, start: int) -> None:
        """Move to the comma that ends the pass begun at `start`, so that the next ones are still checked."""
        depth, self.at = 0, start
        while self.at < len(self.text):
            char = self.text[self.at]
            if char == "," and depth <= 0:
                return
            depth += (char in "{[") - (char in "}]")
            self.at += 1


# -------------------------------------------------------------------- YAML


def _read_yaml_file(path: Path, problems: list[str]) -> list[PassSpec]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        problems.append(f"cannot read {path}: {error}")
        return []
    return parse_yaml(text, problems)


def parse_yaml(text: str, problems: list[str]) -> list[PassSpec]:
    """Read a YAML list of passes (or a mapping with the list under `passes`).

    Values are taken as written and converted by the type of the option, so `1e-5` is a number here too.
    """
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if isinstance(root, yaml.MappingNode) and [k.value for k, _ in root.value] == ["passes"]:
            root = root.value[0][1]
        if root is None:
            return []
        entries = root.value if isinstance(root, yaml.SequenceNode) else [root]
        return [_yaml_pass(entry) for entry in entries]
    except (yaml.YAMLError, _SyntaxError) as error:
        problems.append(f"this YAML is no list of passes: {' '.join(str(error).split())}")
        return []


def _yaml_pass(node: yaml.Node) -> PassSpec:
    if isinstance(node, yaml.ScalarNode):
        return PassSpec(node.value)
    where = f"line {node.start_mark.line + 1}"
    if not isinstance(node, yaml.MappingNode) or len(node.value) != 1:
        raise _SyntaxError(f"{where}: expected the name of a pass, or one `name: {{option: value}}`")
    name, given = node.value[0]
    spec = PassSpec(str(name.value))
    if isinstance(given, yaml.ScalarNode) and given.tag == "tag:yaml.org,2002:null":
        return spec
    if not isinstance(given, yaml.MappingNode):
        raise _SyntaxError(f"{where}: the options of {spec.name} must be a mapping")
    for key, value in given.value:
        if key.value in spec.options:
            raise _SyntaxError(f"{where}: option {key.value!r} is given twice")
        spec.options[str(key.value)] = _yaml_value(value, 0)
    return spec


def _yaml_value(node: yaml.Node, depth: int) -> options.Raw:
    if depth > _MAX_DEPTH:
        raise _SyntaxError(f"line {node.start_mark.line + 1}: lists are nested too deep")
    if isinstance(node, yaml.SequenceNode):
        return [_yaml_value(item, depth + 1) for item in node.value]
    if not isinstance(node, yaml.ScalarNode):
        raise _SyntaxError(f"line {node.start_mark.line + 1}: an option value is a scalar or a list")
    if node.tag == "tag:yaml.org,2002:null":
        return "none"
    return options.Quoted(node.value) if node.style in ("'", '"') else str(node.value)


__all__ = ["PassSpec", "load_providers", "parse_pipeline", "print_pass", "print_pipeline", "printed_options"]
