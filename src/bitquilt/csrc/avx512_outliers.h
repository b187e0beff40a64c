// Weights with an outlier, in unpacked rows. Weight and outlier are added before rounding, so these are written again.
#pragma once

#include "avx512.h"
#include "scalar.h"

namespace bitquilt {
namespace avx512 {
namespace {

template <Type type>
inline __m256i narrow(__m512 value) {
    if constexpr (type == Type::f16) return _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(_mm512_srli_epi32(sum, 16), nan, _mm512_set1_epi32(0x7fc0)));
}

// One entry of a segment.
[[maybe_unused]] float stored_value(const Segment& s, int64_t row, int64_t column) {
    const uint64_t word = load_word(s.codes + row * s.row_bytes, column / 8 * s.bits, s.row_bytes);
    const int code = static_cast<int>(word >> (column % 8 * s.bits) & ((1u << s.bits) - 1u));
    if (s.grid == Grid::codebook) return s.levels[(column << s.bits) + code];
    const int64_t g = s.groups == 1 ? 0 : column / s.group_size;
    const float step = load(s.scale, s.scale_type, row * s.groups + g);
    if (s.offset) return load(s.offset, s.scale_type, row * s.groups + g) + step * static_cast<float>(code);
    return step * (static_cast<float>(code) - zero_point(s, row, g));
}

// Up to 8 segments of codebooks, a lane each: their entries are gathered 16 at a time. One by one an entry took 40 ns on
// one thread, 9 ms for 0.5 % of 4096 x 11008, as long as everything else.
struct Together {
    bool usable;
    __m256i bits, first;                  // 32-bit lanes; first: the column
    __m512i codes, row_bytes, last, levels;  // addresses; last: the four bytes at the end of the codes

    explicit Together(const Weight& w) : usable(w.outliers.values && w.count <= 8) {
        alignas(64) int32_t numbers[2][8] = {};
        alignas(64) int64_t addresses[4][8] = {};
        for (int i = 0; usable && i < w.count; ++i) {
            const Segment& s = w.segments[i];
            usable = s.grid == Grid::codebook && s.codes_end - s.codes >= 4;
            numbers[0][i] = s.bits;
            numbers[1][i] = static_cast<int32_t>(s.first_column);
            addresses[0][i] = reinterpret_cast<int64_t>(s.codes);
            addresses[1][i] = s.row_bytes;
            addresses[2][i] = reinterpret_cast<int64_t>(s.codes_end - 4);
            addresses[3][i] = reinterpret_cast<int64_t>(s.levels);
        }
        bits = _mm256_load_si256(reinterpret_cast<const __m256i*>(numbers[0]));
        first = _mm256_load_si256(reinterpret_cast<const __m256i*>(numbers[1]));
        codes = _mm512_load_si512(addresses[0]);
        row_bytes = _mm512_load_si512(addresses[1]);
        last = _mm512_load_si512(addresses[2]);
        levels = _mm512_load_si512(addresses[3]);
    }

    // 8 entries of the row whose codes begin at `begin`; lanes without one are any of the first segment's.
    __m256 values(__m512i begin, __m256i segment, __m256i column, __mmask8 keep) const {
        const __m512i wide = _mm512_cvtepu32_epi64(segment);
        const __m256i width = _mm256_permutevar8x32_epi32(bits, segment);
        const __m256i own = _mm256_sub_epi32(column, _mm256_permutevar8x32_epi32(first, segment));
        const __m256i bit = _mm256_mullo_epi32(own, width);
        const __m512i wanted = _mm512_add_epi64(_mm512_permutexvar_epi64(wide, begin),
                                                _mm512_cvtepu32_epi64(_mm256_srli_epi32(bit, 3)));
        const __m512i at = _mm512_min_epu64(wanted, _mm512_permutexvar_epi64(wide, last));
        const __m256i moved = _mm256_slli_epi32(_mm512_cvtepi64_epi32(_mm512_sub_epi64(wanted, at)), 3);
        const __m256i shift = _mm256_add_epi32(_mm256_and_si256(bit, _mm256_set1_epi32(7)), moved);
        const __m256i word = _mm512_mask_i64gather_epi32(_mm256_setzero_si256(), keep, at, nullptr, 1);
        const __m256i mask = _mm256_sub_epi32(_mm256_sllv_epi32(_mm256_set1_epi32(1), width), _mm256_set1_epi32(1));
        const __m256i code = _mm256_and_si256(_mm256_srlv_epi32(word, shift), mask);
        const __m256i entry = _mm256_add_epi32(_mm256_sllv_epi32(own, width), code);
        const __m512i level = _mm512_add_epi64(_mm512_permutexvar_epi64(wide, levels),
                                               _mm512_slli_epi64(_mm512_cvtepu32_epi64(entry), 2));
        return _mm512_mask_i64gather_ps(_mm256_setzero_ps(), keep, level, nullptr, 1);
    }
};

// out: the first column of the row.
template <Type type>
void outlier_values(const Weight& w, const Together& together, int64_t row, uint16_t* out) {
    const Outliers& o = w.outliers;
    const __m512i begin = _mm512_add_epi64(together.codes, _mm512_mullo_epi64(together.row_bytes, _mm512_set1_epi64(row)));
    for (int64_t e = o.rows[row]; e < o.rows[row + 1]; e += 16) {
        const int64_t left = o.rows[row + 1] - e, count = left < 16 ? left : 16;
        const __mmask16 keep = static_cast<__mmask16>((1 << count) - 1);
        __m512i column;
        if (o.wide) {
            column = _mm512_maskz_loadu_epi32(keep, static_cast<const int32_t*>(o.columns) + e);
        } else {
            column = _mm512_cvtepi16_epi32(_mm256_maskz_loadu_epi16(keep, static_cast<const int16_t*>(o.columns) + e));
        }
        if (w.place) column = _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), keep, column, w.place, 4);
        __m512i segment = _mm512_setzero_si512();  // counted, not searched: which one comes next cannot be guessed
        for (int k = 1; k < w.count; ++k) {
            const __m512i first = _mm512_set1_epi32(static_cast<int>(w.segments[k].first_column));
            const __mmask16 behind = _mm512_cmpge_epi32_mask(column, first);
            segment = _mm512_mask_add_epi32(segment, behind, segment, _mm512_set1_epi32(1));
        }
        alignas(64) int32_t columns[16];
        _mm512_store_si512(columns, column);
        __m512 stored;
        if (together.usable) {
            const __m256 low = together.values(begin, _mm512_castsi512_si256(segment), _mm512_castsi512_si256(column),
                                               static_cast<__mmask8>(keep));
            const __m256 high = together.values(begin, _mm512_extracti64x4_epi64(segment, 1),
                                                _mm512_extracti64x4_epi64(column, 1), static_cast<__mmask8>(keep >> 8));
            stored = _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
        } else {
            alignas(64) int32_t segments[16];
            alignas(64) float values[16] = {};
            _mm512_store_si512(segments, segment);
            for (int64_t i = 0; i < count; ++i) {
                const Segment& s = w.segments[segments[i]];
                values[i] = stored_value(s, row, columns[i] - s.first_column);
            }
            stored = _mm512_load_ps(values);
        }
        const __m512 added = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(keep, o.values + e));
        alignas(32) uint16_t rounded[16];
        _mm256_store_si256(reinterpret_cast<__m256i*>(rounded), narrow<type>(_mm512_add_ps(stored, added)));
        for (int64_t i = 0; i < count; ++i) out[columns[i]] = rounded[i];
    }
}

}  // namespace
}  // namespace avx512
}  // namespace bitquilt
