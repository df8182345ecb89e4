// A template's epilogue without its type: templates are compiled once for all layers, not once a layer. The call
// through a pointer is paid once for 32 columns.
#pragma once

#include "irc/isa.h"

IRC_BEGIN

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
