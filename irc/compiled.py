"""`Compiled`: a compiled model. Called like the model, it generates text, and is saved and loaded."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from irc.compiled_folder import Settings, read_settings, read_tokenizer, write_settings
from irc.core.errors import OptionError, StorageError
from irc.core.kv_cache import KVCache
from irc.core.manager import FIRST_STAGE
from irc.core.misfits import misfit_error, misfits
from irc.core.paged import PagedModel
from irc.core.program import Program
from irc.core.report import Report
from irc.core.stages import Stages
from irc.core.target import Artifact, Target, get_target
from irc.runtime.engine import EngineOptions
from irc.runtime.generation import Prompts, StreamCallback, TokenEvent, generate, stream_tokens
from irc.runtime.models import paged_model
from irc.runtime.results import GenerationResult
from irc.runtime.sampling import Sampling
from irc.runtime.speculation.draft_model import DraftModelProposer
from irc.runtime.speculation.ngram import NgramProposer
from irc.runtime.speculation.speculation import Speculation


@dataclass(kw_only=True)
class Compiled:
    """A compiled model: what `irc.compile` and `Compiled.load` give.

        compiled(x)                       # same arguments and results as the model
        compiled.generate("import os")    # a language model with a tokenizer; .stream gives tokens as they come
        print(compiled.report)            # a line for each pass: matches, sizes, measured error, time
        print(compiled.stages["capture"]) # the program after a pass
        compiled.save("model.compiled")   # read back with Compiled.load

    Attributes:
        artifact: what the target made; its `run` takes and gives flat lists of tensors.
        stages: the program after each pass by the pass's name, first `capture`; what was loaded has only some of them.
        report: a row for each pass, and one for the lowering.
        target: what it was lowered to.
        tokenizer: for text in `generate`; None: token ids only.
        eos: token ids that end a sequence; None: what the tokenizer says.
        from_cache: it was compiled before, and kept (`irc.compile(cache=…)`).
    """

    artifact: Artifact
    stages: Mapping[str, Program] = field(repr=False)
    report: Report = field(repr=False)
    target: Target = field(repr=False)
    tokenizer: Any = field(default=None, repr=False)
    eos: frozenset[int] | None = None
    from_cache: bool = False

    @property
    def program(self) -> Program:
        """The program that was lowered."""
        return self.stages[list(self.stages)[-1]]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Same arguments and results as the model, also when a key-value cache was inserted."""
        first = next(iter(self.stages.values()))
        flat = first.flatten_inputs(args, kwargs)
        try:
            if self.artifact.kv_cache is None or KVCache.of(first) is not None:
                return first.unflatten(self.artifact.run(*flat))
            tokens = flat[first.input_names.index(self.program.input_names[0])]
            return first.unflatten([self.artifact.whole_rows(tokens)])
        except Exception as error:  # of any kind, by what the target ran: said again where an input explains it
            problems = misfits(first, flat)
            if not problems:
                raise
            raise misfit_error(first, problems) from error

    # ---------------------------------------------------------------- generation

    def generate(
        self,
        prompts: Prompts,
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        seed: int = 0,
        stop: str | int | Iterable[str | int] = (),
        eos: int | Iterable[int] | None = None,
        stream: StreamCallback | None = None,
        tokenizer: Any = None,
        sampling: Sampling | None = None,
        draft: Draft | None = None,
        options: EngineOptions | None = None,
    ) -> GenerationResult:
        """Continue a prompt or several: text gives `.text`, token ids give `.token_ids`.

        Args:
            prompts: a text, a list of ids, a list of either, or a tensor of ids.
            temperature: 0: always the likeliest token.
            top_k, top_p, min_p, seed: see `irc.runtime.sampling.Sampling`.
            stop: texts or token ids that end a sequence and are not part of the result's text.
            eos: end-of-sequence tokens; None: what the model or the tokenizer says; `()`: none.
            stream: called with (index of the prompt, token id, new text) for each token.
            sampling: everything about how tokens are chosen, instead of the single arguments.
            draft: speculative decoding, which changes speed but not what is said: `"ngram"` looks up what the text has
                repeated, a smaller compiled model (`irc.make_draft`) is asked; or a `Speculation`.
            options: of the engine: memory, batch size.
        """
        return generate(
            self.paged_model(), prompts, tokenizer=tokenizer or self.tokenizer, max_new_tokens=max_new_tokens,
            sampling=sampling
            or Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed),
            stop=stop, eos=self.eos if eos is None else eos, stream=stream,
            options=options, speculation=self.speculation(draft),
        )  # fmt: skip

    def stream(
        self,
        prompts: Prompts,
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        seed: int = 0,
        stop: str | int | Iterable[str | int] = (),
        eos: int | Iterable[int] | None = None,
        tokenizer: Any = None,
        sampling: Sampling | None = None,
        draft: Draft | None = None,
        options: EngineOptions | None = None,
    ) -> Generator[TokenEvent, None, GenerationResult]:
        """As `generate`, as an iterator over tokens as they are made."""
        return stream_tokens(
            self.paged_model(), prompts, tokenizer=tokenizer or self.tokenizer, max_new_tokens=max_new_tokens,
            sampling=sampling
            or Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed),
            stop=stop, eos=self.eos if eos is None else eos,
            options=options, speculation=self.speculation(draft),
        )  # fmt: skip

    def speculation(self, draft: Draft | None) -> Speculation | None:
        """Speculative decoding with what `generate(draft=…)` takes.

        Raises:
            OptionError: it is nothing of that kind.
        """
        if draft is None or isinstance(draft, Speculation):
            return draft
        if draft == "ngram":
            return Speculation(NgramProposer())
        if isinstance(draft, Compiled):
            return Speculation(DraftModelProposer(draft.paged_model(), self.paged_model()))
        raise OptionError(f"draft is 'ngram', a compiled model or a Speculation, not {draft!r}")

    def paged_model(self) -> PagedModel:
        """What an `irc.runtime.engine.Engine` drives: a step over flat tokens with positions and block tables."""
        return paged_model(self.artifact, self.program)

    # ---------------------------------------------------------------- storage

    def save(self, path: str | Path) -> Path:
        """Write the artifact, and beside it what `generate` needs. Read it back with `Compiled.load`.

        The reference target writes a program folder, which `irc.load` reads too.

        Raises:
            OptionError, StorageError: the target does not write there; see `Target.check_place`.
        """
        self.target.check_place(path)
        written = self.artifact.save(path)
        if written.is_dir():
            write_settings(written, Settings(self.target.name, self.program.name, self.eos), self.tokenizer)
        return written

    @staticmethod
    def load(path: str | Path, *, options: Mapping[str, Any] | None = None, tokenizer: Any = None) -> Compiled:
        """Read a folder that `save` or `irc compile` wrote. Neither the model nor a compiler is needed.

        Args:
            options: of the target, `{"threads": 2}` say.
            tokenizer: instead of the one that was saved beside the artifact.

        Raises:
            StorageError: it is missing or damaged.
        """
        folder = Path(path)
        settings = read_settings(folder)
        target = get_target(settings.target)
        artifact = target.load(folder, options)
        if not holds_program(artifact):
            raise StorageError(f"{folder}: artifacts of target {target.name!r} do not hold their program")
        return Compiled(
            artifact=artifact, stages=Stages({FIRST_STAGE: lambda: program_of(artifact)}), report=Report(settings.name),
            target=target, tokenizer=tokenizer if tokenizer is not None else read_tokenizer(folder), eos=settings.eos,
        )  # fmt: skip


def holds_program(artifact: Artifact) -> bool:
    """Whether an artifact knows the program that it was made of."""
    return hasattr(type(artifact), "program") or "program" in vars(artifact)


def program_of(artifact: Artifact) -> Program:
    """The program that an artifact holds; it may have to be read."""
    program: Program = getattr(artifact, "program")  # noqa: B009 (not every artifact has one)
    return program


Draft: TypeAlias = str | Compiled | Speculation
"""How tokens are guessed: see `Compiled.generate`."""
