"""One ONNX model under OpenVINO, timed on request: `cpu_models.py` starts it with a Python that has OpenVINO.

    python openvino_model.py MODEL.onnx INPUTS.npz THREADS f32|bf16|int8

Prints one JSON line when the model is compiled, then answers each line `N` with the seconds of N runs as a JSON list.
int8 is quantized by NNCF after training, on the given inputs.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import openvino as ov


def main() -> None:
    path, data, threads, kind = sys.argv[1:]
    inputs = list(np.load(data).values())
    core = ov.Core()
    model = core.read_model(path)
    for port, value in zip(model.inputs, inputs, strict=True):
        model.reshape({port: value.shape})
    if kind == "int8":
        import nncf

        transformer = nncf.ModelType.TRANSFORMER if inputs[0].dtype.kind == "i" else None
        dataset = nncf.Dataset([dict(zip((port.any_name for port in model.inputs), inputs, strict=True))])
        model = nncf.quantize(model, dataset, model_type=transformer, subset_size=1)
    precision = "bf16" if kind == "bf16" else "f32"
    options = {"INFERENCE_NUM_THREADS": int(threads), "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": precision}
    request = core.compile_model(model, "CPU", options).create_infer_request()
    request.infer(inputs)
    print(json.dumps({"version": ov.__version__}), flush=True)
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            started = time.perf_counter()
            request.infer(inputs)
            seconds.append(time.perf_counter() - started)
        print(json.dumps(seconds), flush=True)


if __name__ == "__main__":
    main()
