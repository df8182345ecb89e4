// The pool under the thread sanitizer (`make kernels-sanitized`): shared loops, barriers, sleeping and waking.
#include <chrono>
#include <cstdio>
#include <vector>

#include "irc/pool_impl.h"

int main() {
    constexpr int64_t chunks = 37, rounds = 300;
    for (int threads = 1; threads <= 4; ++threads) {
        irc::Pool pool(threads, 20);
        std::vector<int64_t> hits(chunks), sums(chunks);
        for (int run = 0; run < 5; ++run) {
            auto body = [&](irc::Worker& worker) {
                for (int64_t round = 0; round < rounds; ++round) {
                    irc::for_chunks(worker, chunks, [&](int64_t chunk) { hits[chunk] += 1; });
                    worker.barrier();
                    irc::for_chunks(worker, chunks, [&](int64_t chunk) { sums[chunk] += hits[chunks - 1 - chunk]; });
                    irc::for_chunks(worker, 2, [&](int64_t) {});
                    worker.barrier();
                }
            };
            pool.run(body);
            std::this_thread::sleep_for(std::chrono::milliseconds(2));
        }
        const int64_t total = 5 * rounds;
        for (int64_t chunk = 0; chunk < chunks; ++chunk)
            if (hits[chunk] != total || sums[chunk] != total * (total + 1) / 2) {
                std::printf("%d threads: chunk %lld has %lld, %lld\n", threads, (long long)chunk, (long long)hits[chunk],
                            (long long)sums[chunk]);
                return 1;
            }
    }
    std::printf("the pool is clean\n");
    return 0;
}
