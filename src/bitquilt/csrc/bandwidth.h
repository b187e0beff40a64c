// Measures the memory's read bandwidth, the limit of decoding speed.
#pragma once

#include <cstdint>

namespace bitquilt {

// Bytes per second of reading `bytes` of memory once, the fastest of `rounds`.
double read_bandwidth(int64_t bytes, int threads, int rounds);

}  // namespace bitquilt
