// A persistent pool of threads for steps written in SPMD style: every worker runs the same function, shares
// loops by `for_chunks` and meets the others at `barrier`. One fork and one join a step, not a call a loop.
//
// Waiting spins for some microseconds, then offers the cpu to others for a short while, and then sleeps on a futex, so
// that a step still makes progress when another process takes one of the cpus away. Declarations only, so that units compiled for different instruction sets
// share one pool; exactly one unit includes pool_impl.h.
#ifndef IRC_POOL_H
#define IRC_POOL_H

#include <atomic>
#include <cstdint>
#include <new>
#include <type_traits>
#include <utility>

namespace irc {

class Pool;

// Bytes of `Worker::memory`: the largest block of a template (linear_rows.h).
constexpr std::int64_t worker_bytes = 768 * 1024;

// One thread's view of the pool. `index` runs from 0 (the caller of `run`) to `count` - 1.
struct Worker {
    int index = 0;
    int count = 1;
    std::uint32_t phase = 0;  // number of shared loops so far; equal on all workers between two barriers
    Pool* pool = nullptr;
    // Where templates keep their blocks, `worker_bytes` on a 64-byte boundary, given by the step: stacks may be small.
    std::uint8_t* memory = nullptr;

    // Returns when all workers have called it; what they wrote before is visible after.
    void barrier();

    // One chunk of the range that belongs to `owner` in this phase: its number, or -1 when none is left.
    std::int64_t take(int owner, std::int64_t first, std::int64_t last);
};

class Pool {
public:
    using Body = void (*)(Worker&, void*);

    // `threads` includes the calling thread; waiting spins for about `spin_us` microseconds before it sleeps.
    explicit Pool(int threads, int spin_us = 100);
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    int size() const { return threads_; }

    // Runs `body` on every worker and returns when all are done. One caller at a time.
    void run(Body body, void* context);

    template <class Function>
    void run(Function& function) {
        run([](Worker& worker, void* context) { (*static_cast<Function*>(context))(worker); }, &function);
    }

private:
    friend struct Worker;
    struct State;
    State* state_;
    int threads_;
};

// A template's block in the worker's memory, which is free again when the next one is made there. Without arguments its
// numbers are whatever was there.
template <class Block, class... Arguments>
inline Block& in_worker_memory(const Worker& worker, Arguments&&... arguments) {
    static_assert(sizeof(Block) <= worker_bytes && alignof(Block) <= 64 && std::is_trivially_destructible_v<Block>);
    if constexpr (sizeof...(Arguments) == 0)
        return *new (worker.memory) Block;
    else
        return *new (worker.memory) Block(std::forward<Arguments>(arguments)...);
}

// Calls body(chunk) once for each chunk in [0, chunks), each on one of the workers. Every worker has to call it,
// in the same order. A worker takes its own contiguous share in ascending order (one stream of memory a thread)
// and then helps the others, so a worker whose cpu is taken away does not hold up the rest. No barrier at the end.
template <class Body>
inline void for_chunks(Worker& worker, std::int64_t chunks, Body&& body) {
    if (worker.count == 1) {
        for (std::int64_t chunk = 0; chunk < chunks; ++chunk) body(chunk);
        return;
    }
    ++worker.phase;
    for (int step = 0; step < worker.count; ++step) {
        const int owner = (worker.index + step) % worker.count;
        const std::int64_t first = chunks * owner / worker.count;
        const std::int64_t last = chunks * (owner + 1) / worker.count;
        for (;;) {
            const std::int64_t chunk = worker.take(owner, first, last);
            if (chunk < 0) break;
            body(chunk);
        }
    }
}

// Calls body(first, last) for blocks of up to `step` units of [0, units). Shares are cut at whole units, so that they
// are even where blocks would be few; a worker's blocks follow each other in memory. Otherwise as for_chunks.
template <class Body>
inline void for_blocks(Worker& worker, std::int64_t units, std::int64_t step, Body&& body) {
    if (worker.count > 1) ++worker.phase;
    for (int turn = 0; turn < worker.count; ++turn) {
        const int owner = (worker.index + turn) % worker.count;
        const std::int64_t begin = units * owner / worker.count, end = units * (owner + 1) / worker.count;
        const std::int64_t blocks = (end - begin + step - 1) / step;
        for (std::int64_t next = 0;; ++next) {
            const std::int64_t block = worker.count == 1 ? (next < blocks ? next : -1) : worker.take(owner, 0, blocks);
            if (block < 0) break;
            const std::int64_t first = begin + block * step;
            body(first, first + step < end ? first + step : end);
        }
    }
}

}  // namespace irc

#endif
