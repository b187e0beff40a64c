// Reads 8 rows of a codebook segment together: a 64-bit word of each, 8 columns at a time, as 64 places in a register
// of 64 table entries.
#pragma once

#include "avx512.h"
#include "scalar.h"

namespace bitquilt {
namespace avx512 {
namespace {

// 64-bit words of 8 rows; safe at the tensor's end.
inline __m512i gather_rows(const uint8_t* at, __m512i rows, int64_t row_bytes, const uint8_t* end) {
    if (end - at >= 7 * row_bytes + 8) return _mm512_i64gather_epi64(rows, at, 1);
    alignas(64) uint64_t words[8];
    for (int i = 0; i < 8; ++i) words[i] = load_word(at + i * row_bytes, 0, end - at - i * row_bytes);
    return _mm512_load_si512(words);
}

template <int bits>
struct Lookup {
    static constexpr int steps = bits == 1 ? 8 : bits == 2 ? 4 : 2;  // of 8 columns in a 64-bit word
    static constexpr int per_table = bits == 4 ? 1 : 8 >> bits;      // steps that share a register of entries
    static constexpr int tables = bits == 4 ? 2 : 1;                 // registers of one step
    // At 4 bits columns 4 to 7 of a step use the second register: their places restart.
    static constexpr long long place = bits == 4 ? 0x3020100030201000 : 0x0706050403020100ll << bits;

    // Places of the codes of step k in their table: byte 8 i + j is row i, column j.
    static __m512i index(__m512i words, int k) {
        const __m512i mask = _mm512_set1_epi8((1 << bits) - 1);
        const __m512i shift = _mm512_set1_epi64(0x0706050403020100ll * bits);
        const __m512i shifts = _mm512_add_epi8(shift, _mm512_set1_epi8(static_cast<char>(8 * bits * k)));
        const __m512i places = _mm512_or_si512(
            _mm512_set1_epi64(place), _mm512_set1_epi8(static_cast<char>(bits == 4 ? 0 : (k % per_table) * (8 << bits))));
        // (shifted & mask) | places
        return _mm512_ternarylogic_epi64(_mm512_multishift_epi64_epi8(shifts, words), mask, places, 0xea);
    }

    // 64 entries; the second register of 4 bits is `second` bytes further.
    static __m512i entries(__m512i index, const void* table, int64_t second) {
        const char* at = static_cast<const char*>(table);
        const __m512i found = _mm512_permutexvar_epi8(index, _mm512_loadu_si512(at));
        if constexpr (tables == 1) return found;
        return _mm512_mask_permutexvar_epi8(found, 0xf0f0f0f0f0f0f0f0ull, index, _mm512_loadu_si512(at + second));
    }
};

}  // namespace
}  // namespace avx512
}  // namespace bitquilt
