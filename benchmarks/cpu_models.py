"""CNNs and an encoder on target cpu against PyTorch, ONNX Runtime and OpenVINO: ResNet-50, MobileNetV2 and BERT-base,
random weights.

    python benchmarks/cpu_models.py                                        # f32, batch 1 and 8
    python benchmarks/cpu_models.py --model resnet50 --format int8 --batch 1
    python benchmarks/cpu_models.py --model mobilenet --format int8 --batch 1
    python benchmarks/cpu_models.py --quick                                # a small ResNet and a small BERT

All engines run the same model in turns, on as many threads; printed are medians in milliseconds, the spread (10th and
90th percentile) and the fastest peer's median over ours. CNNs see 224 × 224 pixels, BERT 128 tokens. Formats: `f32`;
`bf16` (weights and activations; `torch.compile` in f32, too; ONNX Runtime has none and runs f32, so does OpenVINO where
the processor has no bf16); `int8` (weights a channel, activations static, attention f32; `torch.compile` runs f32, ONNX
Runtime its static QDQ, OpenVINO NNCF's quantization). PyTorch eager runs f32, whatever the format. OpenVINO and NNCF
are installed the first time into an environment of their own (`openvino_peer.py`); `--without` leaves peers out.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))

from openvino_peer import Worker, python

import irc
from irc.lowering.cpp.templates.base import detect_isa

# Weights of 7 bits where bytes can only be summed in 16 bits, as NNCF does for such processors.
INT8 = (
    f"quantize-weights{{bits={8 if detect_isa() == 'avx512' else 7},group-size=none,include-convolutions=true}},"
    "quantize-activations{include-attention=false,include-residuals=true}"
)
Run = Callable[[int], list[float]]
"""Seconds of each of so many runs."""


def _bert(quick: bool) -> nn.Module:
    from transformers import BertConfig, BertModel

    small = {"num_hidden_layers": 2, "hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 512}
    return BertModel(BertConfig(**small if quick else {}), add_pooling_layer=False)


def _resnet(quick: bool) -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    small = {"layer_type": "basic", "depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512]}
    return ResNetForImageClassification(ResNetConfig(**small if quick else {}))


def _mobilenet(quick: bool) -> nn.Module:
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    small = {"depth_multiplier": 0.5} if quick else {}
    return MobileNetV2ForImageClassification(MobileNetV2Config(tf_padding=False, **small))


MODELS: dict[str, Callable[[bool], nn.Module]] = {
    "resnet50": _resnet, "bert": _bert, "mobilenet": _mobilenet,
}  # fmt: skip


def make_model(name: str, quick: bool) -> nn.Module:
    """A model with random weights and plausible statistics of its batch norms."""
    torch.manual_seed(0)
    model = MODELS[name](quick)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.uniform_(-0.1, 0.1)
            part.running_var.uniform_(0.5, 1.5)
    return model.eval()


def make_input(name: str, batch: int, quick: bool) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    if name == "bert":
        return torch.randint(0, 30000, (batch, 32 if quick else 128), generator=generator)
    size = 64 if quick else 224
    return torch.randn(batch, 3, size, size, generator=generator)


def timed(call: Callable[[], object]) -> Run:
    """A call as an engine."""

    def run(count: int) -> list[float]:
        seconds = []
        for _ in range(count):
            started = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - started)
        return seconds

    return run


def first(output: Any) -> Tensor:
    """The first tensor of a model's output."""
    return output if isinstance(output, Tensor) else next(iter(output.values()))


class Engines:
    """One model at one batch size in one format, built for every engine that has the format."""

    def __init__(self, model: nn.Module, x: Tensor, kind: str, args: argparse.Namespace) -> None:
        self.kind, self.args = kind, args
        self.runs: dict[str, Run] = {}
        self.worker: Worker | None = None
        self.notes: list[str] = []
        wide = x if x.dtype == torch.int64 or kind != "bf16" else x.bfloat16()
        plain = copy.deepcopy(model).to(torch.bfloat16) if kind == "bf16" else model
        with torch.no_grad():
            self.wanted = first(plain(wide)).float()
            self._irc(plain, wide)
            self.runs["eager f32"] = timed(torch.no_grad()(lambda: model(x)))
            if "compile" not in args.without:
                self._inductor("torch.compile", plain, wide)
                if kind == "bf16":
                    self._inductor("torch.compile f32", model, x)
        with tempfile.TemporaryDirectory(prefix="irc-models-") as scratch:
            path = Path(scratch) / "model.onnx"
            if {"onnxruntime", "openvino"} - set(args.without):
                torch.onnx.export(
                    model, (x,), str(path), dynamo=True, opset_version=18, verbose=False, external_data=False
                )
            if "onnxruntime" not in args.without:
                self._onnx_runtime(path, x)
            if "openvino" not in args.without:
                self._openvino(path, x)

    def _irc(self, model: nn.Module, x: Tensor) -> None:
        started = time.perf_counter()
        passes = f"fold-conv-batch-norm,{INT8}" if x.is_floating_point() else INT8
        compiled = irc.compile(
            model, passes if self.kind == "int8" else None, target="cpu", example_inputs=(x,), verify="off",
            options={"threads": self.args.threads},
            **({"calibration": [(x,)]} if self.kind == "int8" else {}),
        )  # fmt: skip
        self.compile_s = time.perf_counter() - started
        self.artifact = compiled.artifact
        self.notes += self.artifact.notes
        found = self.artifact.run(x)[0].float()
        self.error = float((found - self.wanted).norm() / self.wanted.norm())
        self.runs["irc"] = timed(lambda: self.artifact.run(x))

    def _inductor(self, name: str, model: nn.Module, x: Tensor) -> None:
        import torch._inductor.config as settings

        with settings.patch(freezing=True):
            built = torch.compile(model, mode=self.args.compile_mode)
            built(x)
            built(x)
        self.runs[name] = timed(torch.no_grad()(lambda: built(x)))

    def _onnx_runtime(self, path: Path, x: Tensor) -> None:
        import onnxruntime

        if self.kind == "int8":
            path = quantized_onnx(path, x)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.args.threads
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        given = {session.get_inputs()[0].name: x.numpy()}
        session.run(None, given)
        self.runs["onnxruntime"] = timed(lambda: session.run(None, given))

    def _openvino(self, path: Path, x: Tensor) -> None:
        import numpy

        data = path.with_name("inputs.npz")
        numpy.savez(data, x.numpy())
        self.worker = Worker(
            self.args.openvino_python or python(), "openvino_model.py", path, data, self.args.threads, self.kind
        )
        self.runs["openvino"] = self.worker.ask

    def close(self) -> None:
        if self.worker is not None:
            self.worker.close()


def quantized_onnx(path: Path, x: Tensor) -> Path:
    """The model with static QDQ int8, as ONNX Runtime's own tool makes it."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            import onnx

            name = onnx.load(str(path)).graph.input[0].name
            self.batches = iter([{name: x.numpy()}])

        def get_next(self) -> Any:
            return next(self.batches, None)

    prepared, made = path.with_name("prepared.onnx"), path.with_name("int8.onnx")
    quant_pre_process(str(path), str(prepared), skip_symbolic_shape=True)
    quantize_static(str(prepared), str(made), Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
                    activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8)  # fmt: skip
    return made


def measure(engines: Engines, rounds: int) -> dict[str, list[float]]:
    """Milliseconds by engine: [median, 10th, 90th percentile] over the rounds' medians, engines in turns."""
    times: dict[str, list[float]] = {name: [] for name in engines.runs}
    names = list(engines.runs)
    counts = {name: max(1, min(10, round(0.3 / statistics.median(run(2))))) for name, run in engines.runs.items()}
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            time.sleep(0.02)  # a pool of threads that still spins would take time from the next
            engines.runs[name](1)
            times[name].append(1e3 * statistics.median(engines.runs[name](counts[name])))
    return {name: spread(values) for name, values in times.items()}


def spread(values: Sequence[float]) -> list[float]:
    """[median, 10th, 90th percentile]."""
    ordered = sorted(values)
    low, high = (ordered[min(len(ordered) - 1, int(q * len(ordered)))] for q in (0.1, 0.9))
    return [round(statistics.median(ordered), 3), round(low, 3), round(high, 3)]


def report(found: dict[str, Any]) -> None:
    print(f"{found['model']} {found['format']} batch {found['batch']}: compiled in {found['compile_s']:.1f} s,"
          f" relative error {found['error']:.1e}")  # fmt: skip
    ours = found["ms"]["irc"][0]
    for name, (median, low, high) in sorted(found["ms"].items(), key=lambda item: item[1][0]):
        ratio = "" if name == "irc" else f"   {median / ours:5.2f} × ours"
        print(f"  {name:14} {median:9.2f} ms  ({low:.2f} to {high:.2f}){ratio}")
    print(f"  fastest peer / ours: {found['ratio']:.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(MODELS), nargs="+", default=["resnet50", "bert"])
    parser.add_argument("--format", choices=("f32", "bf16", "int8"), nargs="+", default=["f32"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--openvino-python", help="a Python that has openvino and nncf; default: installed once")
    parser.add_argument("--without", nargs="+", default=[], choices=("compile", "onnxruntime", "openvino"))
    parser.add_argument("--compile-mode", choices=("default", "max-autotune"), default="default",
                        help="of torch.compile; weights are frozen in both")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="small models, batch 1, three rounds, PyTorch eager only")
    parser.add_argument("--json", action="store_true", help="last line: one JSON object")
    args = parser.parse_args()
    if args.quick:
        args.batch, args.rounds, args.without = [1], 3, ["compile", "onnxruntime", "openvino"]
    torch.set_num_threads(args.threads)
    results = []
    for name in args.model:
        for kind in args.format:
            for batch in args.batch:
                engines = Engines(make_model(name, args.quick), make_input(name, batch, args.quick), kind, args)
                times = measure(engines, args.rounds)
                engines.close()
                peers = min(value[0] for engine, value in times.items() if engine != "irc")
                results.append({"model": name, "format": kind, "batch": batch, "threads": args.threads, "ms": times,
                                "error": engines.error, "compile_s": round(engines.compile_s, 1),
                                "ratio": round(peers / times["irc"][0], 3)})  # fmt: skip
                report(results[-1])
    if args.json:
        print(json.dumps({"results": results}))


if __name__ == "__main__":
    main()
