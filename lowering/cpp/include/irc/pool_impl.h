// Definitions of pool.h; include in exactly one translation unit.
#pragma once

#include <chrono>
#include <thread>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#include <condition_variable>
#include <mutex>
#endif

#include "irc/pool.h"

namespace irc {

namespace pool_detail {

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

// A number that threads wait on until it changes.
struct alignas(64) Gate {
    std::atomic<std::uint32_t> value{0};
    std::atomic<int> sleepers{0};
#if !defined(__linux__)
    std::mutex mutex;
    std::condition_variable changed;
#endif

    void wait(std::uint32_t seen, int spin_us) {
        for (int turn = 0; turn < 512; ++turn) {
            if (value.load(std::memory_order_acquire) != seen) return;
            relax();
        }
        // The others take long. Where another process has their cpu, they may be waiting for this one: offer it.
        const auto limit = std::chrono::steady_clock::now() + std::chrono::microseconds(spin_us);
        do {
            for (int turn = 0; turn < 8; ++turn) {
                if (value.load(std::memory_order_acquire) != seen) return;
                relax();
            }
            std::this_thread::yield();
        } while (std::chrono::steady_clock::now() < limit);
        sleepers.fetch_add(1);
        while (value.load() == seen) sleep(seen);
        sleepers.fetch_sub(1);
    }

    void open(std::uint32_t next) {
#if defined(__linux__)
        value.store(next);
        // Both sides are sequentially consistent: a sleeper either sees the new number or is counted here.
        if (sleepers.load() > 0) syscall(SYS_futex, &value, FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
#else
        { std::lock_guard<std::mutex> hold(mutex); value.store(next); }
        if (sleepers.load() > 0) changed.notify_all();
#endif
    }

private:
    void sleep(std::uint32_t seen) {
#if defined(__linux__)
        syscall(SYS_futex, &value, FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
#else
        std::unique_lock<std::mutex> hold(mutex);
        changed.wait(hold, [&] { return value.load() != seen; });
#endif
    }
};

// Phase in the high half, chunks handed out in the low half.
struct alignas(64) Cursor {
    std::atomic<std::uint64_t> value{0};
};

}  // namespace pool_detail

struct Pool::State {
    pool_detail::Gate start;
    pool_detail::Gate meet;
    alignas(64) std::atomic<int> arrived{0};
    pool_detail::Cursor* cursors = nullptr;
    std::thread* threads = nullptr;
    Worker* workers = nullptr;
    Body body = nullptr;
    void* context = nullptr;
    int count = 1;
    int spin_us = 0;
    bool stop = false;

    void work(int index) {
        std::uint32_t seen = 0;
        for (;;) {
            start.wait(seen, spin_us);
            seen = start.value.load(std::memory_order_acquire);
            if (stop) return;
            body(workers[index], context);
            workers[index].barrier();
        }
    }
};

Pool::Pool(int threads, int spin_us) : state_(new State), threads_(threads < 1 ? 1 : threads) {
    State& s = *state_;
    s.count = threads_;
    s.spin_us = spin_us;
    s.cursors = new pool_detail::Cursor[threads_];
    s.workers = new Worker[threads_];
    s.threads = new std::thread[threads_];
    for (int i = 0; i < threads_; ++i) {
        s.workers[i].index = i;
        s.workers[i].count = threads_;
        s.workers[i].pool = this;
    }
    for (int i = 1; i < threads_; ++i) s.threads[i] = std::thread([&s, i] { s.work(i); });
}

Pool::~Pool() {
    State& s = *state_;
    s.stop = true;
    s.start.open(s.start.value.load() + 1);
    for (int i = 1; i < threads_; ++i) s.threads[i].join();
    delete[] s.threads;
    delete[] s.workers;
    delete[] s.cursors;
    delete state_;
}

void Pool::run(Body body, void* context) {
    State& s = *state_;
    Worker& self = s.workers[0];
    if (threads_ == 1) {
        body(self, context);
        return;
    }
    s.body = body;
    s.context = context;
    s.start.open(s.start.value.load(std::memory_order_relaxed) + 1);
    body(self, context);
    self.barrier();
}

void Worker::barrier() {
    if (count == 1) return;
    Pool::State& s = *pool->state_;
    const std::uint32_t seen = s.meet.value.load(std::memory_order_relaxed);
    if (s.arrived.fetch_add(1, std::memory_order_acq_rel) == count - 1) {
        s.arrived.store(0, std::memory_order_relaxed);
        s.meet.open(seen + 1);
        return;
    }
    s.meet.wait(seen, s.spin_us);
}

std::int64_t Worker::take(int owner, std::int64_t first, std::int64_t last) {
    std::atomic<std::uint64_t>& cursor = pool->state_->cursors[owner].value;
    std::uint64_t seen = cursor.load(std::memory_order_relaxed);
    for (;;) {
        const std::int32_t ahead = static_cast<std::int32_t>(static_cast<std::uint32_t>(seen >> 32) - phase);
        // Somebody who has left this phase saw every share of it used up.
        if (ahead > 0) return -1;
        const std::uint32_t taken = ahead == 0 ? static_cast<std::uint32_t>(seen) : 0;
        if (first + taken >= last) return -1;
        const std::uint64_t next = static_cast<std::uint64_t>(phase) << 32 | (taken + 1);
        if (cursor.compare_exchange_weak(seen, next, std::memory_order_relaxed)) return first + taken;
    }
}

}  // namespace irc
