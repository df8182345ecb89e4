// What every printed source begins with. Compilers keep this header in the form they read it into (`build.precompile`),
// which is valid only as the first thing of a source. It and what it includes have guards instead of `#pragma once`,
// which does not know a file again that was read from elsewhere.
#ifndef IRC_PROGRAM_H
#define IRC_PROGRAM_H

#include <chrono>
#include <cmath>
#include <cstring>
#include <limits>
#include <thread>
#include <type_traits>

#include "irc/isa.h"
#include "irc/pool.h"
#include "irc/elementwise.h"

#endif
