"""Reads a pipeline in YAML to the same names and raw option values as `irc.core.pipeline_text`."""

from __future__ import annotations

from pathlib import Path

import yaml

from irc.core import options
from irc.core.pipeline_text import MAX_DEPTH, PassSpec, PipelineSyntaxError


def read_yaml_file(path: Path, problems: list[str]) -> list[PassSpec]:
    """Read a file; what is wrong is added to `problems`."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        problems.append(f"cannot read {path}: {error.strerror}")
        return []
    except UnicodeDecodeError as error:
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
    except (yaml.YAMLError, PipelineSyntaxError) as error:
        problems.append(f"this YAML is no list of passes: {' '.join(str(error).split())}")
        return []


def _yaml_pass(node: yaml.Node) -> PassSpec:
    if isinstance(node, yaml.ScalarNode):
        return PassSpec(node.value)
    where = f"line {node.start_mark.line + 1}"
    if not isinstance(node, yaml.MappingNode) or len(node.value) != 1:
        raise PipelineSyntaxError(f"{where}: expected the name of a pass, or one `name: {{option: value}}`")
    name, given = node.value[0]
    spec = PassSpec(str(name.value))
    if isinstance(given, yaml.ScalarNode) and given.tag == "tag:yaml.org,2002:null":
        return spec
    if not isinstance(given, yaml.MappingNode):
        raise PipelineSyntaxError(f"{where}: the options of {spec.name} must be a mapping")
    for key, value in given.value:
        if key.value in spec.options:
            raise PipelineSyntaxError(f"{where}: option {key.value!r} is given twice")
        spec.options[str(key.value)] = _yaml_value(value, 0)
    return spec


def _yaml_value(node: yaml.Node, depth: int) -> options.Raw:
    if depth > MAX_DEPTH:
        raise PipelineSyntaxError(f"line {node.start_mark.line + 1}: lists are nested too deep")
    if isinstance(node, yaml.SequenceNode):
        return [_yaml_value(item, depth + 1) for item in node.value]
    if not isinstance(node, yaml.ScalarNode):
        raise PipelineSyntaxError(f"line {node.start_mark.line + 1}: an option value is a scalar or a list")
    if node.tag == "tag:yaml.org,2002:null":
        return "none"
    return options.Quoted(node.value) if node.style in ("'", '"') else str(node.value)
