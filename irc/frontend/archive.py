"""Reads a `.pt2` file (an ExportedProgram that `torch.export.save` wrote) without executing anything in it.

`torch.export.load` must not be given untrusted files: it unpickles weights and example inputs that say
so, evaluates size expressions as Python, and looks up any attribute of `torch` as an operator. Here the
archive is checked first against lists of what is allowed, and anything else is refused by name.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator
from typing import Any

import torch
from torch.export import ExportedProgram

from irc.core.errors import StorageError

_MODEL = "models/"
_MAX_JSON = 1 << 30
_OPERATOR = re.compile(
    r"torch\.ops\.(aten|irc)\.\w+\.\w+|torch\.ops\.higher_order\.(wrap_with_set_grad_enabled|wrap_with_autocast)"
    r"|torch\._?sym_\w+|math\.(ceil|floor|sqrt|trunc)"
)
_REFUSED_OPERATOR = re.compile(r"torch\.ops\.aten\.from_file\..*")
_PYTHON_OPERATORS = {
    "add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "pow", "eq", "ne", "lt", "le", "gt", "ge", "and_", "or_",
    "getitem", "not_", "pos", "abs",
}  # fmt: skip
_EXPRESSION = re.compile(r"[\w+\-*/(),.<>=&|~^ ]*")
_NAMED = re.compile(r"Symbol\('(\w+)'(?:, *\w+=(?:True|False))*\)")
_WORD = re.compile(r"[A-Za-z_]\w*")
_FUNCTIONS = {
    "Max", "Min", "Mod", "PythonMod", "FloorDiv", "CeilDiv", "CleanDiv", "ModularIndexing", "IntTrueDiv",
    "FloatTrueDiv", "PowByNatural", "FloatPow", "ToFloat", "TruncToInt", "FloorToInt", "CeilToInt", "RoundToInt",
    "Identity", "Where", "Eq", "Ne", "Lt", "Le", "Gt", "Ge", "And", "Or", "Not", "Pow", "Add", "Mul", "Integer", "Abs",
    "True", "False", "oo", "int_oo", "true", "false",
}  # fmt: skip
_SYMBOL = re.compile(r"[suz]\d+|_?[suz]\d*_?\d*")
_CONTAINERS = {"builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict", None}


def load_pt2(path: str) -> ExportedProgram:
    """The exported program in the file; its example inputs are not read (they are pickled).

    Raises:
        StorageError: no such file, not an archive of this kind, or something in it that is not allowed.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            root, model = _find_model(archive, path)
            _check_payloads(archive, root, model, path)
            document = _read_json(archive, f"{root}{_MODEL}{model}.json", path)
            _check_program(document, path)
    except FileNotFoundError:
        raise StorageError(f"no file {path!r}") from None
    except (OSError, zipfile.BadZipFile) as error:
        raise StorageError(f"{path}: not a .pt2 archive: {error}") from error
    return _deserialize(path, model, document)


def _find_model(archive: zipfile.ZipFile, path: str) -> tuple[str, str]:
    names = archive.namelist()
    if len(set(names)) != len(names) or len({name.split("/")[0] for name in names}) > 1:
        raise StorageError(f"{path}: not a .pt2 archive: entries that repeat, or more than one folder")
    found = [m for m in (re.fullmatch(r"([^/]+/)?models/([\w.\- ]+)\.json", n) for n in names) if m]
    if len(found) != 1:
        raise StorageError(
            f"{path}: expected one exported program (models/*.json), found {len(found)};"
            " save it again with torch.export.save of torch 2.8 or newer"
        )
    return found[0][1] or "", found[0][2]


def _read_json(archive: zipfile.ZipFile, name: str, path: str) -> Any:
    try:
        if archive.getinfo(name).file_size > _MAX_JSON:
            raise StorageError(f"{path}: {name} is too large ({archive.getinfo(name).file_size} bytes)")
        return json.loads(archive.read(name))
    except KeyError:
        raise StorageError(f"{path}: {name} is missing") from None
    except (ValueError, RecursionError) as error:
        raise StorageError(f"{path}: {name} is not JSON: {error}") from error


def _check_payloads(archive: zipfile.ZipFile, root: str, model: str, path: str) -> None:
    """Weights and constants must be raw tensors; nothing may be compiled code or a pickle that would be loaded."""
    for name in archive.namelist():
        if name.startswith(
            (f"{root}data/aotinductor/", f"{root}data/weights/{model}.pt", f"{root}data/constants/{model}.pt")
        ):
            raise StorageError(f"{path}: {name} is compiled code or a pickle, which irc does not load")
    for kind in ("weights", "constants"):
        entries = _read_json(archive, f"{root}data/{kind}/{model}_{kind}_config.json", path)
        for name, entry in dict(entries.get("config", {})).items():
            plain = re.fullmatch(r"(weight|tensor)_\d+", str(entry.get("path_name")))
            if entry.get("use_pickle") is not False or plain is None:
                raise StorageError(
                    f"{path}: {kind} {name!r} is stored as a pickle, which irc does not load\n"
                    "  try: convert it to an ordinary dense tensor before torch.export.save"
                )


def _check_program(document: Any, path: str) -> None:
    for key, value in _walk(document):
        if key == "target" and isinstance(value, str):
            _check_operator(value, path)
        elif key == "expr_str" and isinstance(value, str):
            _check_expression(value, path)
        elif key == "as_operator" and value is not None:
            raise StorageError(f"{path}: it passes the function {value!r} as an argument, which irc does not allow")
        elif key in ("in_spec", "out_spec") and isinstance(value, str):
            _check_spec(value, path)


def _walk(document: Any) -> Iterator[tuple[str, Any]]:
    pending = [document]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            yield from item.items()
            pending.extend(item.values())
        elif isinstance(item, list):
            pending.extend(item)


def _check_operator(target: str, path: str) -> None:
    known = _OPERATOR.fullmatch(target) is not None and _REFUSED_OPERATOR.fullmatch(target) is None
    if target.startswith("_operator."):
        known = target.removeprefix("_operator.") in _PYTHON_OPERATORS
    # Outputs and inputs of the signature use the same key for names of weights.
    if not known and re.fullmatch(r"[\w.]*", target) and not target.startswith(("torch", "_operator", "math", "#")):
        return
    if not known:
        raise StorageError(f"{path}: it calls {target!r}, which irc does not allow in a file")


def _check_expression(text: str, path: str) -> None:
    text = _NAMED.sub(r"\1", text)
    words = set(_WORD.findall(text))
    unknown = sorted(w for w in words if w not in _FUNCTIONS and _SYMBOL.fullmatch(w) is None)
    attribute = re.search(r"\.\s*[A-Za-z_]|[A-Za-z_)]\w*\s*\.", text)
    power = re.search(r"\*\*\s*\d{3,}|\d{20,}", text)
    if len(text) > 2000 or _EXPRESSION.fullmatch(text) is None or unknown or attribute or power:
        raise StorageError(f"{path}: size expression {text[:80]!r} is not plain arithmetic over sizes")


def _check_spec(text: str, path: str) -> None:
    try:
        document = json.loads(text) if text else None
    except (ValueError, RecursionError) as error:
        raise StorageError(f"{path}: a signature is not JSON: {error}") from error
    for key, value in _walk(document):
        if key == "type" and value not in _CONTAINERS:
            raise StorageError(f"{path}: an input or output is a {value!r}: only tuples, lists and dicts are loaded")


def _deserialize(path: str, model: str, document: Any) -> ExportedProgram:
    """What `torch.export.load` does, without the example inputs."""
    from torch._export.serde import schema
    from torch._export.serde.serialize import ExportedProgramDeserializer, _bytes_to_dataclass
    from torch.export.pt2_archive import _package

    try:
        with _package.PT2ArchiveReader(path) as reader:
            checked = _bytes_to_dataclass(schema.ExportedProgram, json.dumps(document).encode())
            checked.guards_code = []  # Python source, for the checks that ExportedProgram.module() makes
            return ExportedProgramDeserializer(None).deserialize(
                checked,
                _package._load_state_dict(reader, model),
                _package._load_constants(reader, model),
                b"",
            )
    except Exception as error:  # a damaged file makes the deserializer fail in any of its asserts and look-ups
        raise StorageError(
            f"{path}: damaged, or written by another version of torch than {torch.__version__}: {error}"
        ) from error
