// AVX2 and FMA: eight codes per step in fp32. Widths up to 4 bits: one 32-bit broadcast, shift, mask, convert, FMA
// (4 operations per 8 weights); wider: two shifts of a 64-bit broadcast and a shuffle (6 operations).
#include <immintrin.h>

#include "rows.h"

namespace bitquilt {
namespace {

struct Shifts {
    __m256i narrow, low, high, mask;
    explicit Shifts(int b)
        : narrow(_mm256_mullo_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(b))),
          // after the shuffle below: 0 1 2 3 | 4 5 6 7
          low(_mm256_cvtepi32_epi64(_mm_mullo_epi32(_mm_setr_epi32(0, 1, 4, 5), _mm_set1_epi32(b)))),
          high(_mm256_cvtepi32_epi64(_mm_mullo_epi32(_mm_setr_epi32(2, 3, 6, 7), _mm_set1_epi32(b)))),
          mask(_mm256_set1_epi32((1 << b) - 1)) {}
};

template <bool narrow>
inline __m256 unpack8(uint64_t word, const Shifts& shifts) {
    __m256i codes;
    if constexpr (narrow) {
        codes = _mm256_srlv_epi32(_mm256_set1_epi32(static_cast<int>(word)), shifts.narrow);
    } else {
        const __m256i all = _mm256_set1_epi64x(static_cast<long long>(word));
        const __m256 low = _mm256_castsi256_ps(_mm256_srlv_epi64(all, shifts.low));
        const __m256 high = _mm256_castsi256_ps(_mm256_srlv_epi64(all, shifts.high));
        codes = _mm256_castps_si256(_mm256_shuffle_ps(low, high, 0x88));
    }
    return _mm256_cvtepi32_ps(_mm256_and_si256(codes, shifts.mask));
}

inline float sum_lanes(__m256 v) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

// T tokens at once: the accumulators stay in registers.
template <bool narrow, int T>
void dot_tile(const uint8_t* stream, int64_t bytes, int bits, int64_t first, int64_t count, const float* x,
              int64_t stride, float* sums) {
    const Shifts shifts(bits);
    __m256 lanes[T];
    for (int t = 0; t < T; ++t) lanes[t] = _mm256_setzero_ps();
    int64_t at = first / 8 * bits, j = 0;
    for (; j + 8 <= count; j += 8, at += bits) {
        const __m256 codes = unpack8<narrow>(load_word(stream, at, bytes), shifts);
        for (int t = 0; t < T; ++t) lanes[t] = _mm256_fmadd_ps(codes, _mm256_loadu_ps(x + t * stride + j), lanes[t]);
    }
    if (j < count) {
        const __m256i keep = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count - j)),
                                                _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
        const __m256 codes = unpack8<narrow>(load_word(stream, at, bytes), shifts);
        for (int t = 0; t < T; ++t) {
            lanes[t] = _mm256_fmadd_ps(codes, _mm256_maskload_ps(x + t * stride + j, keep), lanes[t]);
        }
    }
    for (int t = 0; t < T; ++t) sums[t] = sum_lanes(lanes[t]);
}

template <bool narrow>
void dot_tiles(const uint8_t* stream, int64_t bytes, int bits, int64_t first, int64_t count, const float* x,
               int64_t stride, int tokens, float* sums) {
    int t = 0;
    for (; t + 4 <= tokens; t += 4) {
        dot_tile<narrow, 4>(stream, bytes, bits, first, count, x + t * stride, stride, sums + t);
    }
    for (; t < tokens; ++t) dot_tile<narrow, 1>(stream, bytes, bits, first, count, x + t * stride, stride, sums + t);
}

void dot(const uint8_t* stream, int64_t bytes, int bits, int64_t first, int64_t count, const float* x,
         int64_t stride, int tokens, float* sums) {
    const auto run = bits <= 4 ? dot_tiles<true> : dot_tiles<false>;
    run(stream, bytes, bits, first, count, x, stride, tokens, sums);
}

int64_t no_planes(const Segment&, int) { return 0; }
int64_t no_scratch(const Weight&, const Inputs&) { return 0; }

}  // namespace

const Isa avx2_isa = {
    "avx2", false, no_planes, float_prepare, float_matmul<unpack_words, dot>, no_scratch,
    dequantize_rows<unpack_words>, pick_halves, nullptr,
};

}  // namespace bitquilt
