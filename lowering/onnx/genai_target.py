"""The target `onnx-genai`: a folder that onnxruntime-genai generates from."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from irc.core.errors import OptionError, StorageError, TargetError
from irc.core.kv_cache import KVCache
from irc.core.program import Program
from irc.core.target import Artifact, Concern, Coverage, Options, read_options, register_target
from irc.lowering.onnx.artifact import MODEL_FILE, OnnxArtifact, array_of, write_model
from irc.lowering.onnx.options import OnnxOptions
from irc.lowering.onnx.target import OnnxTarget

_CONFIG_FILE = "genai_config.json"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model")
_WRITERS = ("save_pretrained", "save")
"""Methods that write a tokenizer: into a folder (transformers), or to `tokenizer.json` (tokenizers)."""


@dataclass(frozen=True, kw_only=True)
class GenaiOptions(OnnxOptions):
    """Options of the target, beside those of `onnx`.

    Attributes:
        tokenizer: a folder with `tokenizer.json` (as `save_pretrained` writes it) or that file, or a tokenizer of
            `tokenizers` or transformers; None: ids only.
        bos_token_id, eos_token_ids, pad_token_id: generation ends at an eos token.
    """

    flavour: str = "ort"
    tokenizer: Any = None
    bos_token_id: int = 0
    eos_token_ids: Sequence[int] = ()
    pad_token_id: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.flavour != "ort":
            raise OptionError(f"target onnx-genai: flavour must be ort, not {self.flavour!r}")
        if isinstance(self.tokenizer, str | Path):
            if not Path(self.tokenizer).exists():
                raise OptionError(f"target onnx-genai: tokenizer {self.tokenizer} does not exist")
        elif self.tokenizer is not None and not any(hasattr(self.tokenizer, name) for name in _WRITERS):
            raise OptionError(
                "target onnx-genai: tokenizer is a path or a tokenizer of tokenizers or transformers, not"
                f" {self.tokenizer!r}"
            )


class GenaiArtifact(OnnxArtifact):
    """A folder with `model.onnx`, `genai_config.json` and the tokenizer's files."""

    target: ClassVar[str] = "onnx-genai"

    def __init__(self, path: Path, options: OnnxOptions, *, temporary: bool = False) -> None:
        super().__init__(path, options, temporary=temporary)
        self._model_inputs: list[str] = list(self.input_names)
        # What a step takes: the mask is made from the positions.
        self.input_names: list[str] = ["input_ids", "positions", "logit_indices", *self._model_inputs[2:]]

    def run(self, *inputs: Any) -> list[Any]:
        self.check_inputs(inputs)
        self._check_positions(inputs)
        assert self.kv_cache is not None
        tokens, positions, wanted, caches = self.kv_cache.split([torch.as_tensor(value) for value in inputs])
        lengths = positions[:, -1:].cpu() + 1
        mask = (torch.arange(int(lengths.max())) < lengths).to(torch.int64)
        feeds = {n: array_of(n, t) for n, t in zip(self._model_inputs, (tokens, mask, *caches), strict=True)}
        logits, *new = [torch.from_numpy(array) for array in self._session.run(None, feeds)]
        picked = logits.gather(1, wanted.cpu().unsqueeze(-1).expand(-1, -1, logits.shape[-1]))
        return self._with_rest(list(inputs), [picked, *new])

    def step(self, caches: list[Tensor], tokens: Tensor, positions: Tensor, logit_indices: Tensor) -> Tensor:
        return Artifact.step(self, caches, tokens, positions, logit_indices)

    def save(self, path: str | Path) -> Path:
        target = Path(path)
        self.check_place(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=".irc-", dir=target.parent))
        try:
            shutil.copytree(self.path.parent, aside, dirs_exist_ok=True)
            os.replace(aside, target)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        return target

    @classmethod
    def check_place(cls, path: Path) -> None:
        if path.exists():
            raise StorageError(f"{path} exists already: give a new folder")
        super().check_place(path)

    @classmethod
    def load(cls, path: str | Path, options: Options | None = None) -> GenaiArtifact:
        file = Path(path) / MODEL_FILE
        if not file.is_file():
            raise StorageError(f"{file} does not exist")
        return cls(file, read_options(GenaiOptions, options, what="target onnx-genai"))


@register_target
class GenaiTarget(OnnxTarget):
    """Lowers a step over a key-value cache to a folder for onnxruntime-genai."""

    name: ClassVar[str] = "onnx-genai"
    description: ClassVar[str] = "a folder that onnxruntime-genai generates from"
    options_type: ClassVar[type] = GenaiOptions
    artifact_type: ClassVar[type[Artifact]] = GenaiArtifact
    suffix: ClassVar[str] = ""

    def check(self, program: Program) -> Coverage:
        coverage = self.coverage(program, GenaiOptions())
        cache = KVCache.of(program)
        if cache is None or cache.layout != "contiguous":
            reason = "has no contiguous key-value cache, which generation needs: use the pass insert-kv-cache"
            coverage.refused.append(Concern(f"program {program.name}", 1, reason))
        return coverage

    def lower(self, program: Program, options: Options | None = None) -> GenaiArtifact:
        from irc.lowering.onnx import genai
        from irc.lowering.onnx.export import export_model, setting_of

        self.require_available()
        chosen = read_options(GenaiOptions, options, what="target onnx-genai")
        self.check(program).require(program)
        cache = KVCache.of(program)
        assert cache is not None
        if any(one.stores is not None for one in cache.caches):
            raise TargetError("onnxruntime-genai keeps plain caches: leave quantize-kv-cache out")
        model = export_model(program, setting_of(chosen))
        genai.to_genai(model, cache)
        folder = Path(tempfile.mkdtemp(prefix="irc-genai-"))
        tokens = {
            "bos_token_id": chosen.bos_token_id,
            "eos_token_id": list(chosen.eos_token_ids) or chosen.pad_token_id,
            "pad_token_id": chosen.pad_token_id,
        }
        settings = genai.config(program, cache, MODEL_FILE, tokens, chosen.threads)
        (folder / _CONFIG_FILE).write_text(json.dumps(settings, indent=2))
        _write_tokenizer(chosen.tokenizer, folder)
        write_model(model, folder / MODEL_FILE)
        return GenaiArtifact(folder / MODEL_FILE, chosen, temporary=True)


def _write_tokenizer(tokenizer: Any, folder: Path) -> None:
    if tokenizer is None:
        return
    if isinstance(tokenizer, str | Path):
        root = Path(tokenizer) if Path(tokenizer).is_dir() else Path(tokenizer).parent
        for file in (root / name for name in _TOKENIZER_FILES):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)
    elif hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(folder)
    else:
        tokenizer.save(str(folder / _TOKENIZER_FILES[0]))
    if not (folder / "tokenizer_config.json").exists():
        # Byte-level BPE and the like are read from tokenizer.json alone under this name.
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
