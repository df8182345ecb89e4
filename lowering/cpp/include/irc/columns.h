// A template's epilogue without its type: templates are compiled once for all layers, not once a layer. The call
// through a pointer is paid once for 32 columns.
#pragma once

#include "irc/isa.h"

IRC_BEGIN

// Brings what an epilogue will touch next into the first-level cache. Reading ahead of the end is harmless.
template <class T>
IRC_INLINE void fetch_for_read(const T* from, int64_t count) {
    for (int64_t i = 0; i < count; i += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(from + i, 0, 3);
}
template <class T>
IRC_INLINE void fetch_for_write(T* to, int64_t count) {
    for (int64_t i = 0; i < count; i += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(to + i, 1, 3);
}

class Columns {
public:
    template <class Body>
    explicit Columns(const Body& body)
        : body_(&body), call_([](const void* one, int64_t m, int64_t n0, int64_t n1, const float* values) {
              (*static_cast<const Body*>(one))(m, n0, n1, values);
          }) {}
    void operator()(int64_t m, int64_t n0, int64_t n1, const float* values) const { call_(body_, m, n0, n1, values); }

private:
    const void* body_;
    void (*call_)(const void*, int64_t, int64_t, int64_t, const float*);
};

IRC_END
