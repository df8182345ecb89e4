"""The C header of a saved artifact."""

from __future__ import annotations

from collections.abc import Mapping
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
    return "\n".join(lines) + "\n" + _FUNCTIONS
