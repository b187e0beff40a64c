// The body for any processor: plain C++, eight codes (one 64-bit word) at a time.
#include "rows.h"

namespace bitquilt {
namespace {

void dot(const uint8_t* stream, int64_t bytes, int bits, int64_t first, int64_t count, const float* x,
         int64_t stride, int tokens, float* sums) {
    const uint64_t mask = (1u << bits) - 1u;
    float lanes[max_tokens][8] = {};
    for (int64_t j = 0; j < count; j += 8) {
        const uint64_t word = load_word(stream, (first + j) / 8 * bits, bytes);
        const int width = count - j < 8 ? static_cast<int>(count - j) : 8;
        float codes[8];
        for (int k = 0; k < 8; ++k) codes[k] = static_cast<float>(static_cast<int>(word >> (bits * k) & mask));
        for (int t = 0; t < tokens; ++t) {
            for (int k = 0; k < width; ++k) lanes[t][k] += codes[k] * x[t * stride + j + k];
        }
    }
    for (int t = 0; t < tokens; ++t) {
        sums[t] = ((lanes[t][0] + lanes[t][4]) + (lanes[t][1] + lanes[t][5])) +
                  ((lanes[t][2] + lanes[t][6]) + (lanes[t][3] + lanes[t][7]));
    }
}

int64_t no_planes(const Segment&, int) { return 0; }
int64_t no_scratch(const Weight&, const Inputs&) { return 0; }

}  // namespace

const Isa portable_isa = {
    "portable", false, no_planes, float_prepare, float_matmul<unpack_words, dot>, no_scratch,
    dequantize_rows<unpack_words>, pick_halves, nullptr,
};

}  // namespace bitquilt
