"""A kernel as a program of its own, to run it alone: under a sanitizer, a profiler or a debugger.

    harness 3 5 in0.bin in1.bin out0.bin        # sizes in the kernel's order, then a file for each buffer

A buffer that is read and not written comes from its file; one that is written is stored to its file in the end, and
starts with what the file holds, if there is one (zeros otherwise). The exit status is not 0 when a file is too short.
"""

from __future__ import annotations

from irc.core.errors import TargetError
from irc.lowering.cpp.expressions import STORAGE_TYPES, size_text
from irc.lowering.cpp.function import PrintedFunction
from irc.lowering.kernels.buffers import Buffer
from irc.lowering.kernels.kernel import Kernel

_HEAD = """#include "irc/program.h"
#include <cstdio>
#include <cstdlib>
#include <vector>
#include "irc/pool_impl.h"

"""
_MAIN = """
// A buffer's elements from a file; false when the file is shorter than the buffer.
template <class T>
static bool read(const char* path, std::vector<T>& data, bool required) {
    std::FILE* file = std::fopen(path, "rb");
    if (file == nullptr) return !required;
    const size_t count = std::fread(data.data(), sizeof(T), data.size(), file);
    std::fclose(file);
    return count == data.size();
}

template <class T>
static bool write(const char* path, const std::vector<T>& data) {
    std::FILE* file = std::fopen(path, "wb");
    if (file == nullptr) return false;
    const size_t count = std::fwrite(data.data(), sizeof(T), data.size(), file);
    return std::fclose(file) == 0 && count == data.size();
}
"""


def print_harness(kernel: Kernel, printed: PrintedFunction, *, threads: int = 2) -> str:
    """The source of a program that runs one kernel.

    Raises:
        TargetError: the kernel's buffers have sizes that the kernel itself does not know.
    """
    buffers = [b for b in printed.arguments if isinstance(b, Buffer)]
    sizes = list(dict.fromkeys([*printed.sizes, *sorted(
        {s for b in buffers for s in b.numel.free_symbols}, key=lambda s: s.name)]))  # fmt: skip
    if len(buffers) != len(printed.arguments):
        raise TargetError(f"{kernel.name} is no kernel of the IR: it takes more than buffers")
    count = len(sizes) + len(buffers)
    lines = [f"int main(int argc, char** argv) {{\n    if (argc != {count + 1}) return 2;"]
    lines += [f"    const int64_t {s.name} = std::atoll(argv[{i + 1}]);" for i, s in enumerate(sizes)]
    lines += [f"    (void){s.name};" for s in sizes]
    names = []
    for i, buffer in enumerate(buffers):
        name, path = f"buffer{i}", f"argv[{len(sizes) + i + 1}]"
        names.append(name)
        required = "false" if buffer in kernel.writes else "true"
        # Not std::vector<bool>, which packs bits.
        kind = "uint8_t" if buffer.dtype == "bool" else STORAGE_TYPES[buffer.dtype]
        lines.append(
            f"    std::vector<{kind}> {name}(static_cast<size_t>({size_text(buffer.numel, {})}));  // {buffer}"
        )
        lines.append(f"    if (!read({path}, {name}, {required})) return 3;")
    arguments = [
        f"reinterpret_cast<bool*>({n}.data())" if b.dtype == "bool" else f"{n}.data()"
        for n, b in zip(names, buffers, strict=True)
    ]
    lines.append(f"    irc::Pool pool({threads});")
    lines.append("    auto body = [&](irc::Worker& worker) {")
    lines.append(f"        {printed.call('kernel', arguments)}")
    lines.append("    };\n    pool.run(body);")
    for i, buffer in enumerate(buffers):
        if buffer in kernel.writes:
            lines.append(f"    if (!write(argv[{len(sizes) + i + 1}], buffer{i})) return 4;")
    lines.append("    return 0;\n}")
    return f"{_HEAD}namespace {{\n\n{printed.text('kernel')}\n}}  // namespace\n{_MAIN}\n" + "\n".join(lines) + "\n"
