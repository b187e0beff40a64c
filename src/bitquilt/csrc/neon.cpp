// NEON (every 64-bit Arm): four codes per register in fp32. Any width up to 8 bits: four codes are 32 bits at most, so one
// broadcast of them, a shift by lane, a mask, a conversion, an FMA: 4 operations per 4 weights and token.
#include <arm_neon.h>

#include "rows.h"

namespace bitquilt {
namespace {

struct Shifts {
    int32x4_t lanes;
    uint32x4_t mask;
    int half;  // bits of four codes
    explicit Shifts(int bits) : mask(vdupq_n_u32((1u << bits) - 1u)), half(4 * bits) {
        const int32_t right[] = {0, -bits, -2 * bits, -3 * bits};
        lanes = vld1q_s32(right);
    }
    float32x4_t four(uint64_t word) const {
        return vcvtq_f32_u32(vandq_u32(vshlq_u32(vdupq_n_u32(static_cast<uint32_t>(word)), lanes), mask));
    }
};

// T tokens at once: the accumulators stay in registers.
template <int T>
void dot_tile(const uint8_t* stream, int64_t bytes, int bits, int64_t first, int64_t count, const float* x,
              int64_t stride, float* sums) {
    const Shifts shifts(bits);
    float32x4_t low[T], high[T];
    for (int t = 0; t < T; ++t) low[t] = high[t] = vdupq_n_f32(0.0f);
    int64_t at = first / 8 * bits, j = 0;
    for (; j + 8 <= count; j += 8, at += bits) {
        const uint64_t word = load_word(stream, at, bytes);
        const float32x4_t a = shifts.four(word), b = shifts.four(word >> shifts.half);
        for (int t = 0; t < T; ++t) {
            low[t] = vfmaq_f32(low[t], a, vld1q_f32(x + t * stride + j));
            high[t] = vfmaq_f32(high[t], b, vld1q_f32(x + t * stride + j + 4));
        }
    }
    for (int t = 0; t < T; ++t) sums[t] = vaddvq_f32(vaddq_f32(low[t], high[t]));
    const uint64_t word = j < count ? load_word(stream, at, bytes) : 0;
    for (int k = 0; j + k < count; ++k) {
        const float code = static_cast<float>(word >> (bits * k) & ((1u << bits) - 1u));
        for (int t = 0; t < T; ++t) sums[t] += code * x[t * stride + j + k];
    }
}

void dot(const uint8_t* stream, int64_t bytes, int bits, int64_t first, int64_t count, const float* x,
         int64_t stride, int tokens, float* sums) {
    int t = 0;
    for (; t + 4 <= tokens; t += 4) dot_tile<4>(stream, bytes, bits, first, count, x + t * stride, stride, sums + t);
    for (; t < tokens; ++t) dot_tile<1>(stream, bytes, bits, first, count, x + t * stride, stride, sums + t);
}

int64_t no_planes(const Segment&, int) { return 0; }
int64_t no_scratch(const Weight&, const Inputs&) { return 0; }

}  // namespace

const Isa neon_isa = {
    "neon", false, no_planes, float_prepare, float_matmul<unpack_words, dot>, no_scratch, dequantize_rows<unpack_words>,
    pick_halves, nullptr,
};

}  // namespace bitquilt
