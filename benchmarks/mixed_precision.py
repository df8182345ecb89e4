"""Does choosing a format for each layer pay? Held-out perplexity of the demo model at several sizes.

    python benchmarks/mixed_precision.py            # all held-out text
    python benchmarks/mixed_precision.py --quick    # a few windows

Weights of all linear layers but the head (tied to the embedding), rounded to nearest, scales in f16. Layers are
measured on training files. `bits/layer` counts the quantized layers alone, scales included.
"""

from __future__ import annotations

import argparse
import json
import sys

import irc
from irc.cli.models import load_shipped
from irc.evaluation import Assignment, Comparison, Sensitivity, compare
from irc.evaluation.assign_bits import uniform
from irc.evaluation.datasets import held_out_text
from irc.evaluation.plot import plot

ALL_BITS = (2, 3, 4, 5, 6, 8)
ROWS_AND_GROUPS = [f"int{bits}.{group}" for bits in ALL_BITS for group in ("row", "g32")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="4 held-out windows, 2 to measure layers on")
    parser.add_argument("--windows", type=int, default=None, help="held-out windows of 512 tokens; default: all")
    parser.add_argument("--plot", default=None, help="draw size against perplexity to this file")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    args = parser.parse_args()
    loaded = load_shipped("tinypy")
    program = loaded.program()
    held_out = held_out_text(loaded.tokenizer, length=512, count=4 if args.quick else args.windows)

    def measured(metric: str, windows: int, formats: list[str]) -> Sensitivity:
        data = held_out_text(loaded.tokenizer, length=512, count=2 if args.quick else windows, split="train").inputs[0]
        batches = irc.CalibrationData.of(data, batch_size=2, description=f"{windows} training windows")
        return irc.sensitivity(program, batches, metric=metric, formats=formats, progress=False)

    groups = [f"int{bits}.g32" for bits in ALL_BITS]
    second = measured("second-order", 16, ROWS_AND_GROUPS)
    grouped = measured("second-order", 16, groups)
    sqnr = measured("sqnr", 16, groups)
    chosen: dict[str, Assignment | None] = {
        "int4.row": uniform(second, "int4.row"),
        "int4.g32": uniform(second, "int4.g32"),
        "int5.row": uniform(second, "int5.row"),
        "int5.g32": uniform(second, "int5.g32"),
        "4.5 bits, second order": irc.assign_bits(grouped, average_bits=4.5),
        "4.5 bits, second order, rows too": irc.assign_bits(second, average_bits=4.5),
        "5.0 bits, second order": irc.assign_bits(grouped, average_bits=5.0),
        "5.0 bits, sqnr": irc.assign_bits(sqnr, average_bits=5.0),
    }
    if not args.quick:
        chosen["5.0 bits, kl"] = irc.assign_bits(measured("kl", 2, groups), average_bits=5.0)
    results: list[irc.evaluation.Evaluation] = []
    models = {"f32": program}
    for name, one in chosen.items():
        assert one is not None
        passes = [one.as_pass()]
        models[name] = irc.PassManager(passes, verify="off").run(program).program
        print(f"{name}: {one.average_bits:.3f} bits/layer, {one.damage:.3e} expected; {one.pipeline}", file=sys.stderr)
    for name, model in models.items():  # one after the other, so that each line shows as soon as it is known
        both = {"f32": program, name: model} if args.quick else {name: model}
        reference = "f32" if args.quick else None
        results.append(compare(both, held_out, reference=reference, batch_size=8, progress=False)[name])
        print(f"{name}: perplexity {results[-1]['perplexity']:.4f}", file=sys.stderr, flush=True)
    comparison = Comparison(results)
    print(comparison)
    if args.plot:
        plot(comparison, args.plot, reference="f32")
    if args.json:
        print(json.dumps(comparison.to_json()))


if __name__ == "__main__":
    main()
