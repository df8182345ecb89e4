"""One step of `gguf_export.py` in a process of its own, so that its time and memory can be told apart.

python gguf_steps.py make SHAPE_JSON FOLDER         random bf16 weights: a Hugging Face folder and a program folder
python gguf_steps.py export FOLDER OUT.gguf         irc: the program to Q4_K_M
python gguf_steps.py convert LLAMA_CPP FOLDER OUT   llama.cpp's converter (its source folder), bf16, no vocabulary
python gguf_steps.py quantize IN.gguf OUT.gguf N    llama.cpp's quantizer by llama-cpp-python, N threads
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path


def make(shape: str, folder: str) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import irc

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(LlamaConfig(**json.loads(shape), max_position_embeddings=2048)).eval()
    model.save_pretrained(folder)
    started = time.perf_counter()
    program = irc.capture(model, dynamic={"input_ids": {0: "B", 1: "S"}})
    print(json.dumps({"capture_seconds": time.perf_counter() - started}))
    program.save(Path(folder) / "program")


def export(folder: str, out: str) -> None:
    import irc

    irc.export_gguf(irc.load(Path(folder) / "program"), out, type="q4_k_m")


def convert(source: str, folder: str, out: str) -> None:
    sys.path.insert(0, source)
    import convert_hf_to_gguf
    from conversion.llama import LlamaModel

    # The random model has no tokenizer; the quantizer does not look at one.
    LlamaModel.set_vocab = LlamaModel._set_vocab_none
    sys.argv = ["convert_hf_to_gguf.py", folder, "--outtype", "bf16", "--outfile", out]
    convert_hf_to_gguf.main()


def quantize(path: str, out: str, threads: str) -> None:
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M, int(threads)
    if llama_cpp.llama_model_quantize(path.encode(), out.encode(), params) != 0:
        raise SystemExit("llama_model_quantize failed")


if __name__ == "__main__":
    {"make": make, "export": export, "convert": convert, "quantize": quantize}[sys.argv[1]](*sys.argv[2:])
