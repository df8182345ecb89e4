"""INT8 W8A8 on the demo model: held-out perplexity of static and dynamic quantization beside full precision.

python benchmarks/int8_perplexity.py            # 32 windows of 256 tokens
"""

from __future__ import annotations

import argparse
import functools

from tokenizers import Tokenizer
from torch import Tensor

import irc
from irc.demo.corpus import read_documents
from irc.demo.evaluation import evaluate, held_out_windows
from irc.demo.tinypy import load_model, model_dir
from irc.passes import QuantizeActivations, QuantizeWeights, SmoothActivations


def logits(program: irc.Program, tokens: Tensor) -> Tensor:
    found: Tensor = program.run(tokens)[0]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--quick", action="store_true", help="4 windows")
    given = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(model_dir() / "tokenizer.json"))
    windows = held_out_windows(tokenizer, length=256, count=4 if given.quick else given.windows)
    data = irc.CalibrationData.from_text(
        read_documents("train")[::40], tokenizer=tokenizer, length=256, count=16, batch_size=4
    )
    program = irc.capture(load_model(), (windows[:2],), dynamic=({0: "B", 1: "S"},), name="tinypy")
    reference = functools.partial(logits, program)
    base = evaluate(reference, windows, reference)
    print(f"{'f32':<24} perplexity {base.perplexity:.4f}")
    weights = QuantizeWeights(bits=8, group_size=None, include_embeddings=True)
    variants = {
        "W8": [weights],
        "W8A8 static": [weights, QuantizeActivations()],
        "W8A8 static, min-max": [weights, QuantizeActivations(observer="min-max")],
        "W8A8 static, smoothed": [SmoothActivations(), weights, QuantizeActivations(observer="min-max")],
        "W8A8 auto": [weights, QuantizeActivations(mode="auto")],
        "W8A8 dynamic": [weights, QuantizeActivations(mode="dynamic")],
    }
    for name, passes in variants.items():
        context = irc.PassContext(options={"calibration": data})
        result = irc.PassManager(passes, ctx=context, verify="off" if "static" in name else "each").run(program)
        found = evaluate(functools.partial(logits, result.program), windows, reference)
        loss = 100 * (found.perplexity / base.perplexity - 1)
        print(
            f"{name:<24} perplexity {found.perplexity:.4f} ({loss:+.3f} %), KL {found.kl:.5f}, top-1 {found.top1:.4f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
