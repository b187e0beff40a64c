// Declarations that the AVX-512 kernels share. Every file that includes this is compiled with that instruction set's flags.
//
// Activations become fixed-point numbers per token and column group, written as signed bytes ("digits"): three of
// them (24 bits) for fp32 input, two (16 bits) for bf16 and fp16, one in the int8 mode. Products with the codes are
// then exact integers, 64 per instruction and digit; one conversion to fp32 per group and digit follows. fp32
// arithmetic would take a conversion and an FMA per 16 weights: 3 times as many instructions.
#pragma once

#include <immintrin.h>

#include "kernels.h"

namespace bitquilt {
namespace avx512 {

constexpr int tile = 4;         // tokens per pass over the codes: 4 x 3 digits of accumulators fit the 32 registers
constexpr int wide_bytes = 64;  // of a register
// Prefetch distance in bytes. The processor's own prefetcher stops at every 4 KiB; measured at
// 2 bits on one thread, share of the read bandwidth: none 60 %, 2 KiB 85 %, 4 KiB 94 %.
constexpr int64_t ahead = 4096;

// Fill unit, sum and planes.
void prepare(const Weight&, const Inputs&);
int64_t plane_bytes(const Segment&, int digits);
// Rows begin..end, at most row_block, of all uniform segments: totals[t * row_block + row - begin] += their share.
void uniform_block(const Weight&, const Inputs&, int64_t begin, int64_t end, float* scratch, float* totals);
int64_t uniform_scratch(const Weight&, const Inputs&);
// The same for one codebook segment of up to 4 bits.
void codebook_block(const Segment&, const Inputs&, int64_t begin, int64_t end, float* totals);
void dequantize(const Weight&, int64_t begin, int64_t end, bool as_stored, float* scratch, void* out, Type type);

namespace {

[[maybe_unused]] inline int64_t up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// Whether codebook_block knows the segment: 64 bytes hold the levels of at least 4 columns.
[[maybe_unused]] inline bool has_tables(const Segment& s) { return s.grid == Grid::codebook && s.bits <= 4; }

[[maybe_unused]] inline void fetch(const void* at) { _mm_prefetch(static_cast<const char*>(at), _MM_HINT_T0); }

template <int D>
inline __m512 to_float(const __m512i* digits) {
    __m512 value = _mm512_cvtepi32_ps(digits[D - 1]);
    for (int d = D - 2; d >= 0; --d) {
        value = _mm512_fmadd_ps(value, _mm512_set1_ps(256.0f), _mm512_cvtepi32_ps(digits[d]));
    }
    return value;
}

}  // namespace
}  // namespace avx512
}  // namespace bitquilt
