"""The C header of a saved artifact: its functions, and how large each input and output is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_FUNCTIONS = """
#ifdef __cplusplus
extern "C" {
#endif

/* Threads for steps: create once; one step at a time. */
void *irc_pool_create(int threads);
void irc_pool_destroy(void *pool);

/* Bytes of scratch memory (aligned to 64) that a step of these sizes needs. */
int64_t irc_arena_bytes(const int64_t *sizes, int threads);

/* One step. Inputs and outputs are dense arrays in the order below; weights is weights.bin, mapped or read. */
void irc_run(void *pool, const int64_t *sizes, void *const *inputs, void *const *outputs, const void *weights,
             void *arena);

#ifdef __cplusplus
}
#endif
"""
_BYTES = {"f64": 8, "i64": 8, "f32": 4, "i32": 4, "bf16": 2, "f16": 2, "i16": 2}


def header_text(manifest: Mapping[str, Any]) -> str:
    """Declarations, and what the sizes, inputs and outputs of this program are."""
    lines = [f"/* Program {manifest['name']}, compiled by irc. */", "#pragma once", "", "#include <stdint.h>", ""]
    lines += [f"enum {{ IRC_NUM_SIZES = {len(manifest['dims'])}, IRC_NUM_INPUTS = {len(manifest['inputs'])},"
              f" IRC_NUM_OUTPUTS = {len(manifest['outputs'])} }};"]  # fmt: skip
    lines += [f"#define IRC_WEIGHT_BYTES INT64_C({manifest['weight_bytes']})", ""]
    lines += [f"/* size {i}: {dim['name']} */" for i, dim in enumerate(manifest["dims"])]
    for i, value in enumerate(manifest["inputs"]):
        lines.append(f"/* input {i}: {value['name']} {value['dtype']}[{', '.join(value['shape'])}] */")
    for i, value in enumerate(manifest["outputs"]):
        if "value" in value:
            lines.append(f"/* output {i}: the size {value['value']}, not written */")
        elif value["in_place"] is not None:
            lines.append(f"/* output {i}: written into input {value['in_place']} */")
        else:
            lines.append(f"/* output {i}: {value['dtype']}[{', '.join(value['shape'])}] */")
    names = [str(dim["name"]) for dim in manifest["dims"]]
    lines += ["", *_sizes("irc_input_bytes", names, manifest["inputs"])]
    lines += ["", *_sizes("irc_output_bytes", names, manifest["outputs"])]
    return "\n".join(lines) + "\n" + _FUNCTIONS


def _sizes(function: str, dims: Sequence[str], values: Sequence[Mapping[str, Any]]) -> list[str]:
    """A function from an input or output and the sizes to its bytes; 0 where there is nothing to allocate."""
    lines = [f"static inline int64_t {function}(int number, const int64_t *sizes) {{"]
    lines += [f"    const int64_t {name} = sizes[{i}];" for i, name in enumerate(dims)]
    lines += [f"    (void){name};" for name in dims]
    lines.append("    switch (number) {")
    for i, value in enumerate(values):
        if "value" in value or value.get("in_place") is not None:
            continue
        size = " * ".join([str(_BYTES.get(value["dtype"], 1)), *(_as_c(text) for text in value["shape"])])
        lines.append(f"        case {i}: return {size};")
    return [*lines, "        default: return 0;", "    }", "}"]


def _as_c(size: str) -> str:
    """A size expression of the manifest in C: numbers are not negative, so division is the same."""
    if "max(" in size or "min(" in size or "**" in size:
        return f"-1 /* {size}: compute it yourself */"
    return f"({size.replace('//', '/')})"
