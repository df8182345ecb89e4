// Where a step spends its time: built into a program only when its option `profile` is on.
#pragma once

#include <chrono>
#include <cstdint>

namespace irc {

// Nanoseconds by numbered part, as worker 0 sees them; parts end at a barrier, so that the others' work is in them.
template <int parts>
class PartTimes {
public:
    // Nanoseconds since `restart`, by part.
    std::int64_t totals[parts] = {};

    void start(int worker) {
        if (worker == 0) last_ = now();
    }
    void mark(int worker, int part) {
        if (worker != 0) return;
        const std::int64_t moment = now();
        totals[part] += moment - last_;
        last_ = moment;
    }

private:
    static std::int64_t now() {
        const auto moment = std::chrono::steady_clock::now().time_since_epoch();
        return std::chrono::duration_cast<std::chrono::nanoseconds>(moment).count();
    }
    std::int64_t last_ = 0;
};

}  // namespace irc
