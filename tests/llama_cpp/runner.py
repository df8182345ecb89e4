"""Runs GGUF files with llama.cpp: started in the environment that holds llama-cpp-python, without irc or torch.

Reads jobs from a JSON file and answers each in a folder: logits of given tokens, greedy tokens, tokens of a text,
log-likelihoods of long sequences. Keys and values are kept in f32, so that what differs is the file.
"""

import ctypes
import json
import sys
from pathlib import Path

import llama_cpp as cpp
import numpy as np

_F32 = 0


@cpp.llama_log_callback
def _quiet(level, text, data):
    if level >= 4:
        sys.stderr.write(text.decode("utf-8", "replace"))


def open_model(path, length, encoder):
    """(model, context) of a file."""
    params = cpp.llama_model_default_params()
    params.n_gpu_layers = 0
    model = cpp.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        raise RuntimeError(f"llama.cpp does not load {path}")
    options = cpp.llama_context_default_params()
    options.n_ctx = options.n_batch = options.n_ubatch = max(length, 32)
    options.n_threads = options.n_threads_batch = 1
    options.type_k = options.type_v = _F32
    options.flash_attn_type = 0
    options.embeddings = encoder
    options.no_perf = True
    context = cpp.llama_init_from_model(model, options)
    if not context:
        raise RuntimeError(f"llama.cpp makes no context for {path}")
    return model, context


def decode(context, tokens, start, every):
    """Run tokens at positions start, start + 1, …; with logits of all of them or of the last."""
    batch = cpp.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for index, token in enumerate(tokens):
        batch.token[index] = token
        batch.pos[index] = start + index
        batch.n_seq_id[index] = 1
        batch.seq_id[index][0] = 0
        batch.logits[index] = every or index == len(tokens) - 1
    if cpp.llama_decode(context, batch) != 0:
        raise RuntimeError("llama_decode failed")
    cpp.llama_batch_free(batch)


def rows(context, count, width, encoder):
    read = cpp.llama_get_embeddings_ith if encoder else cpp.llama_get_logits_ith
    return np.stack([np.ctypeslib.as_array(read(context, index), shape=(width,)).copy() for index in range(count)])


def clear(context):
    cpp.llama_memory_clear(cpp.llama_get_memory(context), True)


def greedy(model, context, prompt, count):
    width = cpp.llama_vocab_n_tokens(cpp.llama_model_get_vocab(model))
    clear(context)
    decode(context, prompt, 0, every=False)
    found, at = [], len(prompt)
    for _ in range(count):
        logits = np.ctypeslib.as_array(cpp.llama_get_logits_ith(context, -1), shape=(width,))
        found.append(int(logits.argmax()))
        decode(context, found[-1:], at, every=False)
        at += 1
    return found


def log_likelihood(model, context, windows):
    """Mean negative log-likelihood of each token after the first of each window."""
    width = cpp.llama_vocab_n_tokens(cpp.llama_model_get_vocab(model))
    total, count = 0.0, 0
    for tokens in windows:
        clear(context)
        decode(context, tokens, 0, every=True)
        logits = rows(context, len(tokens), width, False)[:-1].astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        chosen = np.take_along_axis(logits, np.array(tokens[1:])[:, None], -1)[:, 0]
        total += float((np.log(np.exp(logits).sum(-1)) - chosen).sum())
        count += len(tokens) - 1
    return total / count


def tokenize(model, text):
    vocab, raw = cpp.llama_model_get_vocab(model), text.encode()
    buffer = (cpp.llama_token * (len(raw) + 8))()
    count = cpp.llama_tokenize(vocab, raw, len(raw), buffer, len(buffer), False, True)
    return list(buffer[:count])


def quantize(job, folder):
    """Blocks of llama.cpp's own quantizers, of numbers [n, K]."""
    values = np.load(job["quantize"]).astype(np.float32)
    call = cpp.llama_cpp._lib.ggml_quantize_chunk
    call.restype = ctypes.c_size_t
    call.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p
    ]  # fmt: skip
    for name, number in job["types"].items():
        buffer = np.zeros(values.size * 4, dtype=np.uint8)
        count = call(number, values.ctypes.data, buffer.ctypes.data, 0, len(values), values.shape[1], None)
        np.save(folder / f"{name}.npy", buffer[:count].reshape(len(values), -1))
    return {}


def run(job, folder):
    if "quantize" in job:
        return quantize(job, folder)
    path = job["path"]
    length = max([len(job.get("tokens", [])) + job.get("greedy", 0), *(len(w) for w in job.get("windows", []))])
    encoder = job.get("encoder", False)
    model, context = open_model(path, length, encoder)
    answer = {}
    if job.get("tokens"):
        decode(context, job["tokens"], 0, every=True)
        vocab = cpp.llama_model_get_vocab(model)
        width = cpp.llama_model_n_embd(model) if encoder else cpp.llama_vocab_n_tokens(vocab)
        np.save(folder / "logits.npy", rows(context, len(job["tokens"]), width, encoder))
    if job.get("greedy"):
        answer["greedy"] = greedy(model, context, job["tokens"], job["greedy"])
    if job.get("windows"):
        answer["nll"] = log_likelihood(model, context, job["windows"])
    if job.get("texts"):
        answer["texts"] = [tokenize(model, text) for text in job["texts"]]
    cpp.llama_free(context)
    cpp.llama_model_free(model)
    return answer


def main():
    jobs, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    cpp.llama_log_set(_quiet, ctypes.c_void_p(0))
    cpp.llama_backend_init()
    answers = {}
    for name, job in jobs.items():
        own = folder / name
        own.mkdir(parents=True, exist_ok=True)
        try:
            answers[name] = run(job, own)
        except RuntimeError as error:
            answers[name] = {"error": str(error)}
        (folder / "answers.json").write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
