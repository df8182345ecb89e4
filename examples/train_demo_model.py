"""Train the model that ships with irc, on the running interpreter's standard library.

    python examples/train_demo_model.py                       # the demo model, about an hour on two cores
    python examples/train_demo_model.py --size draft          # the draft, distilled from the demo model

Stop it at any time; the same command goes on from the last checkpoint (--work). The result is
config.json, tokenizer.json, model.safetensors (bf16) and recipe.json under --out.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

import irc.demo.tinypy as tinypy
from irc.demo.corpus import read_documents
from irc.demo.tinypy import TinyPy, TinyPyConfig

END_OF_TEXT = "<|endoftext|>"
SIZES = {
    "tinypy": TinyPyConfig(),
    "draft": TinyPyConfig(hidden_size=96, num_layers=2, num_heads=3, intermediate_size=256),
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), default="tinypy")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=16, help="sequences a step")
    parser.add_argument("--length", type=int, default=512, help="tokens a sequence")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--distill", type=float, default=0.5, help="weight of the teacher's soft targets (draft only)")
    parser.add_argument("--compile", action="store_true", help="compile the training step (needs a C++ compiler)")
    parser.add_argument("--checkpoint-every", type=int, default=100)
    parser.add_argument("--work", type=Path, default=Path("train-demo"), help="folder for the resumable state")
    parser.add_argument("--out", type=Path, default=Path(tinypy.__file__).parent / "model")
    return parser.parse_args()


def replace_file(path: Path, write) -> None:
    """Write aside, then rename, so that a kill leaves either the old file or the new one."""
    aside = path.with_name(path.name + ".partial")
    write(aside)
    os.replace(aside, path)


def train_tokenizer(path: Path, vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(read_documents("train"), trainer)
    replace_file(path, lambda aside: tokenizer.save(str(aside)))
    return tokenizer


def token_stream(tokenizer: Tokenizer, split: str) -> Tensor:
    """Every document of the split, end-of-text between them: i64[num_tokens]."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    ids: list[int] = []
    for encoding in tokenizer.encode_batch(read_documents(split)):
        ids.extend(encoding.ids)
        ids.append(end)
    return torch.tensor(ids)


@torch.no_grad()
def perplexity(model: TinyPy, stream: Tensor, length: int) -> float:
    """exp(mean negative log-likelihood) over consecutive, non-overlapping windows."""
    windows = stream[: stream.numel() // length * length].view(-1, length)
    total = torch.zeros((), dtype=torch.float64)
    for window in windows.split(16):
        logits = model(window)[:, :-1].float()
        total += F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten(), reduction="sum").double()
    return math.exp(total.item() / (windows.shape[0] * (length - 1)))


def save_state(path: Path, model: TinyPy, optimizer: torch.optim.AdamW, step: int) -> None:
    tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{key}.{name}"] = value
    replace_file(path, lambda aside: save_file(tensors, aside, metadata={"step": str(step)}))


def load_state(path: Path, model: TinyPy, optimizer: torch.optim.AdamW) -> int:
    with safe_open(path, framework="pt") as stored, torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(stored.get_tensor(f"model.{name}"))
            optimizer.state[parameter] = {
                key: stored.get_tensor(f"optimizer.{key}.{name}") for key in ("step", "exp_avg", "exp_avg_sq")
            }
        return int(stored.metadata()["step"])


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Linear warm-up, then cosine to a twentieth."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    progress = (step - args.warmup) / max(1, args.steps - args.warmup)
    return args.lr * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


def sample_batch(stream: Tensor, step: int, args: argparse.Namespace) -> Tensor:
    """Random windows i64[batch, length + 1]; a function of seed and step alone, so a resume repeats nothing."""
    generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
    starts = torch.randint(stream.numel() - args.length - 1, (args.batch, 1), generator=generator)
    return stream[starts + torch.arange(args.length + 1)]


def main() -> None:
    args = parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    config = SIZES[args.size]
    folder = args.out / ("tinypy" if args.size == "tinypy" else "tinypy-draft")
    folder.mkdir(parents=True, exist_ok=True)

    shared_tokenizer = args.out / "tinypy" / "tokenizer.json"
    if args.size == "tinypy" and not (args.work / "tokenizer.json").exists():
        train_tokenizer(args.work / "tokenizer.json", config.vocab_size)
    source = args.work / "tokenizer.json" if args.size == "tinypy" else shared_tokenizer
    tokenizer = Tokenizer.from_file(str(source))
    train, held_out = token_stream(tokenizer, "train"), token_stream(tokenizer, "validation")

    model = TinyPy(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            torch.nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.num_layers) if residual else 0.02)
    teacher = tinypy.load_model("tinypy") if args.size == "draft" else None
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95))
    state = args.work / f"{args.size}.safetensors"
    first = load_state(state, model, optimizer) if state.exists() else 0
    forward = torch.compile(model) if args.compile else model

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    started = time.monotonic()
    with Progress(*columns, refresh_per_second=1) as progress:
        bar = progress.add_task("training", total=args.steps, completed=first)
        for step in range(first, args.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args)
            batch = sample_batch(train, step, args)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = forward(batch[:, :-1])
            logits = logits.float().flatten(0, 1)
            loss = F.cross_entropy(logits, batch[:, 1:].flatten())
            total = loss
            if teacher is not None:
                with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
                    soft = teacher(batch[:, :-1]).float().flatten(0, 1)
                divergence = F.kl_div(
                    logits.log_softmax(-1), soft.log_softmax(-1), log_target=True, reduction="batchmean"
                )
                total = (1 - args.distill) * loss + args.distill * divergence
            total.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if (step + 1) % args.checkpoint_every == 0 or step + 1 == args.steps:
                save_state(state, model, optimizer, step + 1)
                rate = (step + 1 - first) * args.batch * args.length / (time.monotonic() - started)
                progress.console.print(f"step {step + 1}: loss {loss.item():.3f}, {rate:.0f} tokens/s")
            progress.update(bar, completed=step + 1, description=f"loss {loss.item():.3f}")

    model.eval()
    weights = {name: p.detach().to(torch.bfloat16) for name, p in model.named_parameters()}
    replace_file(folder / "model.safetensors", lambda aside: save_file(weights, aside))
    model.load_state_dict({name: w.float() for name, w in weights.items()}, strict=False)
    if args.size == "tinypy":
        replace_file(shared_tokenizer, lambda aside: tokenizer.save(str(aside)))
    tinypy.save_config(config, folder)
    recipe = {
        "config": asdict(config),
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "training": {
            key: getattr(args, key) for key in ("steps", "batch", "length", "lr", "weight_decay", "warmup", "seed")
        }
        | {"optimizer": "AdamW(0.9, 0.95)", "autocast": "bfloat16", "compile": args.compile}
        | ({"teacher": "tinypy", "distill": args.distill} if teacher is not None else {}),
        "corpus": f"standard library of CPython {platform.python_version()}, tests left out",
        "train_tokens": train.numel(),
        "held_out_tokens": held_out.numel(),
        "held_out_perplexity": round(perplexity(model, held_out, args.length), 4),
        "held_out_perplexity_window": args.length,
        "torch": torch.__version__.split("+")[0],
    }
    replace_file(folder / "recipe.json", lambda aside: aside.write_text(json.dumps(recipe, indent=2) + "\n"))
    print(json.dumps(recipe, indent=2))


if __name__ == "__main__":
    main()
