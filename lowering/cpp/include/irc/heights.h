// The height of a tile as a constant, so that its sums are registers: one switch for all products.
#pragma once

#include <type_traits>

#include "irc/isa.h"

IRC_BEGIN

// Calls f(std::integral_constant<int, height>()) for a height from 1 to Most.
template <int Most, class F>
IRC_INLINE void with_height(int64_t height, const F& f) {
    static_assert(Most <= 14, "more heights need more cases");
    switch (height) {
#define IRC_HEIGHT(H) \
    case H: \
        if constexpr (H <= Most) f(std::integral_constant<int, H>()); \
        break
        IRC_HEIGHT(1);
        IRC_HEIGHT(2);
        IRC_HEIGHT(3);
        IRC_HEIGHT(4);
        IRC_HEIGHT(5);
        IRC_HEIGHT(6);
        IRC_HEIGHT(7);
        IRC_HEIGHT(8);
        IRC_HEIGHT(9);
        IRC_HEIGHT(10);
        IRC_HEIGHT(11);
        IRC_HEIGHT(12);
        IRC_HEIGHT(13);
        IRC_HEIGHT(14);
#undef IRC_HEIGHT
    }
}

IRC_END
