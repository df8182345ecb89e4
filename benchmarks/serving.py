"""Serving: throughput of many requests against one at a time, latencies, scheduling overhead, speculation.

    python benchmarks/serving.py                          the engine on the demo model and a 135M-shaped one
    python benchmarks/serving.py --url http://host:8000   any server with OpenAI's interface, by the same client

Figures are those of the field's serving benchmarks: TTFT (until a request's first token), TPOT (time per token after
it), each as mean, p50, p90 and p99, and tokens per second. The last line is one JSON object with --json.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import irc
from irc.core.paged import PagedModel
from irc.runtime.engine import Engine, EngineOptions
from irc.runtime.requests import Request
from irc.runtime.speculation.controller import Controller
from irc.runtime.speculation.draft_model import DraftModelProposer
from irc.runtime.speculation.ngram import NgramProposer
from irc.runtime.speculation.speculation import Speculation

PASSES = "merge-qkv,merge-gate-up,insert-kv-cache{layout=paged}"


@dataclass
class Timing:
    """One request: when it was sent, when its first and its last token came, and how many there were."""

    sent: float
    first: float = 0.0
    last: float = 0.0
    tokens: int = 0


def summary(timings: Sequence[Timing], seconds: float) -> dict[str, Any]:
    """The field's figures."""
    ttft = [(t.first - t.sent) * 1e3 for t in timings]
    tpot = [(t.last - t.first) / (t.tokens - 1) * 1e3 for t in timings if t.tokens > 1]
    tokens = sum(t.tokens for t in timings)
    return {
        "requests": len(timings), "seconds": seconds, "tokens_per_second": tokens / seconds,
        "requests_per_second": len(timings) / seconds, "ttft_ms": spread(ttft), "tpot_ms": spread(tpot),
    }  # fmt: skip


def spread(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    ordered = sorted(values)

    def at(share: float) -> float:
        return ordered[min(int(share * len(ordered)), len(ordered) - 1)]

    return {"mean": statistics.fmean(values), "p50": at(0.5), "p90": at(0.9), "p99": at(0.99)}


# ---------------------------------------------------------------- the engine


def prompts_of(count: int, vocabulary: int, length: int = 32, spread: int = 0) -> list[list[int]]:
    """Random tokens; lengths from `length` - `spread` to `length` + `spread`."""
    generator = torch.Generator().manual_seed(7)
    prompts = torch.randint(0, vocabulary, (count, length + spread), generator=generator).tolist()
    return [prompt[: length - spread + index % (2 * spread + 1)] for index, prompt in enumerate(prompts)]


def serve_all(
    model: PagedModel, prompts: Sequence[Sequence[int]], new_tokens: int, concurrency: int,
    speculation: Speculation | None = None,
) -> tuple[dict[str, Any], Engine]:  # fmt: skip
    """All prompts, `concurrency` at a time."""
    options = EngineOptions(max_sequences=concurrency, max_batch_tokens=512, prefix_cache=False)
    engine = Engine(model, options, speculation)
    waiting, timings = list(prompts), dict[int, Timing]()
    started = time.perf_counter()
    while waiting or engine.has_work:
        while waiting and engine.num_running + engine.num_waiting < concurrency:
            number = engine.add(Request(prompt=waiting.pop(0), max_new_tokens=new_tokens))
            timings[number] = Timing(time.perf_counter())
        outputs = engine.step()
        now = time.perf_counter()
        for output in outputs:
            timing = timings[output.request_id]
            timing.first = timing.first or now
            timing.last = now
            timing.tokens += len(output.token_ids)
    return summary(list(timings.values()), time.perf_counter() - started), engine


def throughput(name: str, model: PagedModel, *, rounds: int, new_tokens: int, alone: int) -> dict[str, Any]:
    """32 at once against one at a time, in turns."""
    prompts = prompts_of(32, model.vocabulary_size, spread=8)
    serve_all(model, prompts[:4], 4, 4)
    ratios, overheads, choosing, last = [], [], [], dict[str, Any]()
    for _ in range(rounds):
        single, _ = serve_all(model, prompts[:alone], new_tokens, 1)
        many, engine = serve_all(model, prompts, new_tokens, 32)
        ratios.append(many["tokens_per_second"] / single["tokens_per_second"])
        overheads.append(engine.stats.overhead_ms / engine.stats.steps)
        choosing.append(engine.stats.choosing_ms / engine.stats.steps)
        last = {"one": single, "many": many}
    result = {
        "model": name, "ratio": statistics.median(ratios), "ratio_spread": [min(ratios), max(ratios)],
        "overhead_ms": statistics.median(overheads), "overhead_spread": [min(overheads), max(overheads)],
        "choosing_ms": statistics.median(choosing), **last,
    }  # fmt: skip
    print(
        f"{name}: 32 at once {last['many']['tokens_per_second']:.0f} tok/s, one at a time"
        f" {last['one']['tokens_per_second']:.0f}: {result['ratio']:.2f} × ({min(ratios):.2f}–{max(ratios):.2f});"
        f" overhead {result['overhead_ms']:.3f} ms a step ({min(overheads):.3f}–{max(overheads):.3f}),"
        f" choosing tokens {result['choosing_ms']:.3f} ms;"
        f" TTFT p50 {last['many']['ttft_ms']['p50']:.0f} ms, TPOT p50 {last['many']['tpot_ms']['p50']:.1f} ms"
    )
    return result


class Instant:
    """The interface of a model that answers at once: what is left is the engine's own time."""

    def __init__(self, model: PagedModel) -> None:
        self._model, self._logits = model, torch.zeros(64, model.vocabulary_size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def paged_step(self, pages: Any, inputs: Any) -> torch.Tensor:
        return self._logits[: len(inputs.logit_indices)]


def overhead(model: PagedModel, *, rounds: int, batch: int = 32, new_tokens: int = 100) -> dict[str, Any]:
    """Time of the engine's thread on a processor per decoding step (what other processes take is not in it)."""
    found = []
    for _ in range(rounds):
        engine = Engine(Instant(model), EngineOptions(max_sequences=batch))
        for prompt in prompts_of(batch, model.vocabulary_size, 16, spread=8):
            engine.add(Request(prompt=prompt, max_new_tokens=new_tokens))
        engine.step()
        started, steps = time.thread_time(), engine.stats.steps
        while engine.has_work:
            engine.step()
        found.append((time.thread_time() - started) * 1e3 / (engine.stats.steps - steps))
    result = {"batch": batch, "cpu_ms": statistics.median(found), "spread": [min(found), max(found)]}
    print(
        f"engine without a model, batch {batch}: {result['cpu_ms']:.3f} ms of processor time a step"
        f" ({min(found):.3f}–{max(found):.3f})"
    )
    return result


# ---------------------------------------------------------------- speculation


def decoding(model: PagedModel, prompt: list[int], new_tokens: int, speculation: Speculation | None) -> float:
    """Milliseconds a token behind the first one, which reading the prompt gives."""
    return serve_all(model, [prompt], new_tokens, 1, speculation)[0]["tpot_ms"]["mean"]


def speculated(
    name: str, model: PagedModel, prompts: Sequence[list[int]], make: Callable[[], Speculation], *, rounds: int,
    new_tokens: int,
) -> dict[str, Any]:  # fmt: skip
    """Speed-up of decoding (TPOT) at batch 1, in turns with plain decoding prompt by prompt.

    One controller lives through all rounds, as in a server.
    """
    speculation, ratios = make(), []
    decoding(model, prompts[0], 8, None)
    for turn in range(rounds):
        plain = guessed = 0.0
        for index, prompt in enumerate(prompts):
            if (turn + index) % 2:
                guessed += decoding(model, prompt, new_tokens, speculation)
            plain += decoding(model, prompt, new_tokens, None)
            if (turn + index) % 2 == 0:
                guessed += decoding(model, prompt, new_tokens, speculation)
        ratios.append(plain / guessed)
    stats, controller = speculation.stats, speculation.controller
    rate = stats.acceptance_rate
    predicted = controller.predicted(stats.alpha, stats.rounds, stats.drafted, stats.plain_steps, stats.missed)
    result = {
        "task": name, "speedup": statistics.median(ratios), "spread": [min(ratios), max(ratios)],
        "acceptance_rate": rate, "tokens_per_step": stats.tokens_per_step, "predicted": predicted,
    }  # fmt: skip
    print(
        f"{name}: {result['speedup']:.2f} × ({min(ratios):.2f}–{max(ratios):.2f}), acceptance"
        f" {'–' if rate is None else f'{rate:.0%}'}, {stats.tokens_per_step or 0:.2f} tokens a step,"
        f" predicted {'–' if predicted is None else f'{predicted:.2f} ×'}"
    )
    return result


def copy_heavy(model: PagedModel, prompts: Sequence[list[int]], new_tokens: int, count: int = 4) -> list[list[int]]:
    """The prompts that make the model copy most: the share of its answer's 4-grams that prompt or answer had before."""

    def copied(prompt: list[int]) -> float:
        engine, ids = Engine(model, EngineOptions(max_sequences=1)), list(prompt)
        engine.add(Request(prompt=prompt, max_new_tokens=new_tokens))
        while engine.has_work:
            ids += [token for output in engine.step() for token in output.token_ids]
        seen = [tuple(ids[i : i + 4]) for i in range(len(ids) - 3)]
        answer = range(len(prompt) - 3, len(seen))
        return sum(seen[i] in seen[:i] for i in answer) / len(answer)

    return sorted(prompts, key=copied)[-count:]


def speculation_tasks(target: str, draft_target: str, rounds: int, new_tokens: int) -> list[dict[str, Any]]:
    from irc.demo.corpus import read_documents
    from irc.demo.tinypy import load_tokenizer

    tokenizer = load_tokenizer()
    model, draft = demo("tinypy", target), demo("tinypy-draft", draft_target)
    documents = read_documents("validation")[:40]
    code = [tokenizer.encode(text).ids[40:104] for text in documents if len(tokenizer.encode(text).ids) > 200][:8]
    copies = copy_heavy(model, [tokenizer.encode(text).ids[:64] for text in documents], new_tokens)
    noise = prompts_of(8, model.vocabulary_size, 64)

    def by_draft() -> Speculation:
        return Speculation(DraftModelProposer(draft, model))

    def by_lookup() -> Speculation:
        return Speculation(NgramProposer(), Controller(max_length=12))

    return [
        speculated("draft model, code", model, code, by_draft, rounds=rounds, new_tokens=new_tokens),
        speculated("n-gram, copying", model, copies, by_lookup, rounds=rounds, new_tokens=new_tokens),
        speculated("n-gram, code", model, code, by_lookup, rounds=rounds, new_tokens=new_tokens),
        speculated("draft model, noise", model, noise, by_draft, rounds=rounds, new_tokens=new_tokens),
        speculated("n-gram, noise", model, noise, by_lookup, rounds=rounds, new_tokens=new_tokens),
    ]


def demo(which: str, target: str) -> PagedModel:
    from irc.cli.models import load_shipped

    loaded = load_shipped(which)
    return irc.compile(
        loaded.model, PASSES, target=target, example_inputs=loaded.example_inputs, dynamic=loaded.dynamic, verify="off"
    ).paged_model()


def of_135m(target: str) -> PagedModel:
    """Random weights in the shape of SmolLM-135M."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    return irc.compile(model, PASSES, target=target, verify="off").paged_model()


# ---------------------------------------------------------------- any server


async def drive_server(url: str, model: str, key: str, count: int, concurrency: int, new_tokens: int) -> dict[str, Any]:
    """The same client for every server: streamed completions, `concurrency` at a time.

    Tokens are those that the server reports at the end of a stream, or else the events that carry text.
    """
    import httpx

    gate, timings = asyncio.Semaphore(concurrency), list[Timing]()
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    async with httpx.AsyncClient(timeout=None, headers=headers, limits=httpx.Limits(max_connections=None)) as client:
        known = await client.get(f"{url}/v1/models")
        known.raise_for_status()
        name = model or known.json()["data"][0]["id"]

        async def one(number: int) -> None:
            body = {
                "model": name, "prompt": f"def function_{number}(self, value):\n    ", "max_tokens": new_tokens,
                "temperature": 0, "stream": True, "stream_options": {"include_usage": True},
            }  # fmt: skip
            async with gate:
                timing = Timing(time.perf_counter())
                async with client.stream("POST", f"{url}/v1/completions", json=body) as answer:
                    answer.raise_for_status()
                    async for line in answer.aiter_lines():
                        if line.startswith("data: {"):
                            note(timing, json.loads(line.removeprefix("data: ")))
                timings.append(timing)

        started = time.perf_counter()
        await asyncio.gather(*(one(n) for n in range(count)))
        return summary(timings, time.perf_counter() - started)


def note(timing: Timing, event: dict[str, Any]) -> None:
    """What one event of a stream says."""
    if event.get("choices"):
        timing.last = time.perf_counter()
        timing.first = timing.first or timing.last
        timing.tokens += 1
    if event.get("usage"):
        timing.tokens = event["usage"]["completion_tokens"]


def driven(given: argparse.Namespace) -> dict[str, Any]:
    """Figures of a server, in the table of the field's benchmarks."""
    import httpx

    try:
        made = asyncio.run(
            drive_server(given.url.rstrip("/"), given.model, given.key, given.requests, given.concurrency, given.tokens)
        )
    except httpx.HTTPError as error:
        sys.exit(f"{given.url} cannot be measured: {error or type(error).__name__}")
    print(
        f"{given.url}: {made['requests']} requests, {given.concurrency} at once, {given.tokens} tokens each:"
        f" {made['tokens_per_second']:.0f} tok/s, {made['requests_per_second']:.1f} requests/s"
    )
    for name in ("ttft_ms", "tpot_ms"):
        figures = ", ".join(f"{key} {value:.1f}" for key, value in made[name].items())
        print(f"  {name.split('_')[0].upper()} in ms: {figures}")
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter runs, without the 135M shape")
    parser.add_argument("--json", action="store_true", help="last line: one JSON object")
    parser.add_argument("--only", choices=["demo", "135m", "speculation"], help="one part")
    parser.add_argument("--target", default="reference", choices=["reference", "cpu"])
    parser.add_argument("--draft-target", choices=["reference", "cpu"], help="of the draft model; default: --target")
    parser.add_argument("--threads", type=int, help="of PyTorch and of the cpu target; default: PyTorch's choice")
    parser.add_argument("--url", help="drive a server instead")
    parser.add_argument("--model", default="", help="of the server; default: the first that it names")
    parser.add_argument("--key", default="", help="of the server")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of a request")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    result: dict[str, Any] = {"torch": torch.__version__, "threads": torch.get_num_threads(), "target": given.target}
    if given.url:
        result["server"] = driven(given)
    else:
        gc.collect()
        gc.freeze()  # as a server does: what was loaded stays, and collections need not walk it
        rounds, tokens = (1, 24) if given.quick else (5, given.tokens)
        if given.only in (None, "demo"):
            result["overhead"] = overhead(demo("tinypy", given.target), rounds=5)
            result["demo"] = throughput("demo", demo("tinypy", given.target), rounds=rounds, new_tokens=tokens, alone=4)
        if given.only in (None, "speculation"):
            result["speculation"] = speculation_tasks(given.target, given.draft_target or given.target, rounds, tokens)
        if given.only == "135m" or (given.only is None and not given.quick):
            large = of_135m(given.target)
            result["135m"] = throughput("135M shape", large, rounds=min(rounds, 3), new_tokens=tokens, alone=2)
    if given.json:
        print(json.dumps(result))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
