"""Calibration data: representative inputs that quantizers look at, in batches a program can run.

Passes get it through their context: `irc.compile(model, passes, calibration=data)`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from irc.core.contract import PassContext
from irc.core.errors import IrcError, OptionError, PassError
from irc.core.program import Program

CALIBRATION_KEY = "calibration"
_TEXT_SUFFIXES = frozenset({".txt", ".md", ".py", ".json", ".jsonl", ".csv", ".html", ".rst"})
_TENSOR_SUFFIXES = frozenset({".safetensors", ".npy"})


@dataclass(frozen=True)
class CalibrationData:
    """Batches of inputs, each a tuple with one value for every input of the program: what quantizers calibrate on.

        CalibrationData.of(ids)                                   # i64[N, S], cut into batches
        CalibrationData.of(text, tokenizer=tokenizer, length=512) # windows of tokens
        CalibrationData.of("samples/")                            # a folder; also data sets, data loaders

    Attributes:
        batches: in the order they are run.
        description: where they come from, for reports.
    """

    batches: tuple[tuple[Any, ...], ...]
    description: str = "tensors"

    def __post_init__(self) -> None:
        if not self.batches or all(_num_samples(batch) == 0 for batch in self.batches):
            raise OptionError(f"the calibration data ({self.description}) is empty")

    @property
    def num_samples(self) -> int:
        """Samples in all batches: sizes of the first dimension of the first input."""
        return sum(_num_samples(batch) for batch in self.batches)

    def fingerprint(self) -> str:
        """Hash of every value, for recognising the same data again."""
        found = hashlib.sha256()
        for batch in self.batches:
            for value in batch:
                if isinstance(value, Tensor):
                    found.update(str((value.dtype, tuple(value.shape))).encode())
                    found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
                else:
                    found.update(repr(value).encode())
        return found.hexdigest()

    # ---------------------------------------------------------------- sources

    @staticmethod
    def of(source: Any, **options: Any) -> CalibrationData:
        """From whatever there is: see the `from_…` functions, which also say what the options mean.

        Raises:
            OptionError: nothing is known about such a source, or the options do not go with it.
        """
        if isinstance(source, CalibrationData):
            return source
        if isinstance(source, Tensor):
            return CalibrationData.from_tensors(source, **options)
        if isinstance(source, Path) or (isinstance(source, str) and "tokenizer" not in options):
            return CalibrationData.from_folder(source, **options)
        if isinstance(source, str):
            return CalibrationData.from_text([source], **options)
        if hasattr(source, "column_names"):
            return CalibrationData.from_dataset(source, **options)
        if isinstance(source, Sequence) and source and all(isinstance(item, str) for item in source):
            return CalibrationData.from_text(source, **options)
        if isinstance(source, Iterable):
            return CalibrationData.from_iterable(source, **options)
        raise OptionError(f"calibration data cannot be made from a {type(source).__name__}")

    @staticmethod
    def from_tensors(*inputs: Tensor, batch_size: int = 8, description: str = "tensors") -> CalibrationData:
        """One tensor per input, samples along the first dimension, cut into batches of `batch_size`."""
        if batch_size < 1:
            raise OptionError(f"batch_size must be at least 1, not {batch_size}")
        lengths = {len(value) for value in inputs}
        if len(lengths) != 1:
            raise OptionError(f"the inputs hold different numbers of samples: {[len(value) for value in inputs]}")
        # Clones: a view's base would be kept alive, and memory counted twice.
        parts = [[part.clone() for part in value.split(batch_size)] for value in inputs]
        return CalibrationData(tuple(zip(*parts, strict=True)), description)

    @staticmethod
    def from_iterable(
        batches: Iterable[Any], *, limit: int | None = None, description: str = "batches"
    ) -> CalibrationData:
        """Batches as a data loader gives them: tensors, tuples of inputs, or dicts in the program's input order.

        Of a pair (inputs, labels) the caller keeps the inputs. `limit`: at most so many batches.
        """
        found: list[tuple[Any, ...]] = []
        for batch in batches:
            if limit is not None and len(found) >= limit:
                break
            if isinstance(batch, Mapping):
                batch = tuple(batch.values())
            found.append(tuple(batch) if isinstance(batch, (tuple, list)) else (batch,))
        return CalibrationData(tuple(found), description)

    @staticmethod
    def from_text(
        texts: Iterable[str],
        *,
        tokenizer: Any,
        length: int = 512,
        count: int = 128,
        batch_size: int = 8,
        seed: int = 0,
        description: str = "text",
    ) -> CalibrationData:
        """`count` windows i64[length] drawn without repetition from the texts joined one behind the other.

        Raises:
            OptionError: the texts are shorter than one window.
        """
        ids: list[int] = []
        for text in texts:
            encoded = tokenizer.encode(text)
            ids.extend(getattr(encoded, "ids", encoded))
        windows = torch.tensor(ids[: len(ids) // length * length], dtype=torch.int64).view(-1, length)
        if not len(windows):
            raise OptionError(f"the calibration text has {len(ids)} tokens, fewer than one window of {length}")
        order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))[:count]
        return CalibrationData.from_tensors(windows[order], batch_size=batch_size, description=description)

    @staticmethod
    def from_dataset(
        dataset: Any, *, column: str | None = None, tokenizer: Any = None, **options: Any
    ) -> CalibrationData:
        """A Hugging Face `datasets` object: a text column with a tokenizer, or a column of equal-sized arrays.

        Raises:
            OptionError: no such column, or several and none was named.
        """
        columns = list(dataset.column_names)
        if column is None and len(columns) == 1:
            column = columns[0]
        if column not in columns:
            raise OptionError(f"name one of the data set's columns ({', '.join(columns)}), not {column!r}")
        if tokenizer is not None:
            texts = (str(row[column]) for row in dataset)
            return CalibrationData.from_text(
                texts, tokenizer=tokenizer, description=f"data set column {column}", **options
            )
        values = torch.stack([torch.as_tensor(row[column]) for row in dataset])
        return CalibrationData.from_tensors(values, description=f"data set column {column}", **options)

    @staticmethod
    def from_folder(
        folder: str | Path,
        *,
        tokenizer: Any = None,
        transform: Callable[[Tensor], Tensor] | None = None,
        **options: Any,
    ) -> CalibrationData:
        """Text files (with a tokenizer), or `.npy` and `.safetensors` files of samples [N, …] each.

        Nothing is unpickled. `transform` is applied to each file's samples.

        Raises:
            OptionError: no folder, or no file of these kinds in it.
        """
        root = Path(folder)
        if not root.is_dir():
            raise OptionError(f"calibration folder {root} does not exist (text itself needs a tokenizer=… beside it)")
        files = sorted(p for p in root.rglob("*") if p.is_file())
        if tokenizer is not None:
            texts = [p.read_text(encoding="utf-8", errors="replace") for p in files if p.suffix in _TEXT_SUFFIXES]
            if not texts:
                raise OptionError(
                    f"calibration folder {root} holds no text files ({', '.join(sorted(_TEXT_SUFFIXES))})"
                )
            return CalibrationData.from_text(texts, tokenizer=tokenizer, description=str(root), **options)
        samples = [sample for p in files if p.suffix in _TENSOR_SUFFIXES for sample in _read_tensors(p)]
        if not samples:
            raise OptionError(f"calibration folder {root} holds no .npy or .safetensors files; text needs a tokenizer")
        joined = torch.cat([transform(sample) if transform else sample for sample in samples])
        return CalibrationData.from_tensors(joined, description=str(root), **options)

    # ---------------------------------------------------------------- use

    def inputs_for(self, program: Program) -> list[tuple[Any, ...]]:
        """The batches, checked against the program's inputs.

        Raises:
            PassError: their number or types do not fit.
        """
        for index, batch in enumerate(self.batches):
            if len(batch) != len(program.placeholders):
                raise PassError(
                    f"calibration batch {index} has {len(batch)} inputs, program {program.name} takes"
                    f" {len(program.placeholders)} ({', '.join(program.input_names)})"
                    + ("; quantize before the KV cache is inserted" if len(program.placeholders) > len(batch) else "")
                )
            for node, value in zip(program.placeholders, batch, strict=True):
                wanted = node.meta["val"]
                if isinstance(value, Tensor) and (value.dtype != wanted.dtype or value.ndim != wanted.ndim):
                    raise PassError(
                        f"calibration batch {index}: input {node.target} is {value.dtype} with {value.ndim} dimensions,"
                        f" program {program.name} takes {program.type_text(node)}"
                    )
                if isinstance(value, Tensor) and value.is_floating_point() and not bool(value.isfinite().all()):
                    raise PassError(f"calibration batch {index}: input {node.target} holds numbers that are not finite")
        return list(self.batches)


def calibration_of(ctx: PassContext, pass_name: str) -> CalibrationData:
    """The calibration data that a pass was given.

    Raises:
        PassError: there is none.
    """
    data = ctx.options.get(CALIBRATION_KEY)
    if data is None:
        raise PassError(
            f"pass {pass_name!r} needs calibration data: irc.compile(…, calibration=irc.CalibrationData.of(…)),"
            " or --calibration on the command line",
            pass_name=pass_name,
        )
    return CalibrationData.of(data)


def _num_samples(batch: Sequence[Any]) -> int:
    first = next((value for value in batch if isinstance(value, Tensor)), None)
    return 0 if first is None else (len(first) if first.ndim else 1)


def _read_tensors(path: Path) -> Iterator[Tensor]:
    try:
        if path.suffix == ".npy":
            import numpy

            yield torch.from_numpy(numpy.load(path, allow_pickle=False))
        else:
            from safetensors.torch import load_file

            yield from load_file(path).values()
    except (OSError, ValueError, json.JSONDecodeError) as error:
        raise IrcError(f"calibration file {path} cannot be read: {error}") from None
