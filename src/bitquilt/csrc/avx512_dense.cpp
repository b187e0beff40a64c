// Rows unpacked for a matrix product. Up to 5 bits a group has at most 32 levels: they are computed and rounded once,
// then looked up 32 at a time (`vpermw`), 3 operations per 32 weights; wider codes are computed one by one. Columns of
// codebooks: 8 of 8 rows per look-up of their levels' low bytes and of their high bytes, some 18 operations per 64
// weights; one by one (`vpgatherdd`) took 3 times as long.
#include "avx512_codebook.h"
#include "avx512_outliers.h"
#include "avx512_unpack.h"
#include "rows.h"

namespace bitquilt {
namespace avx512 {
namespace {

void unpack_wide(const uint8_t* stream, int64_t bytes, int bits, int64_t first, int64_t count, uint8_t* codes) {
    unpack_bytes(stream, bytes, bits, first, count, codes);
}

// The levels of one group of one row, rounded as the reference rounds.
struct Level {
    __m512 step, base;
    bool offset;
    __m512 operator()(__m512i codes) const {
        const __m512 q = _mm512_cvtepi32_ps(codes);
        return offset ? _mm512_add_ps(base, _mm512_mul_ps(step, q)) : _mm512_mul_ps(step, _mm512_sub_ps(q, base));
    }
};

template <Type type>
void group_values(const Level& level, int bits, const uint8_t* codes, int64_t count, uint16_t* out) {
    if (bits > 5) {
        for (int64_t j = 0; j < count; j += 16) {
            const __mmask16 keep = static_cast<__mmask16>(count - j >= 16 ? 0xffff : (1 << (count - j)) - 1);
            const __m128i narrow_codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + j));
            _mm256_mask_storeu_epi16(out + j, keep, narrow<type>(level(_mm512_cvtepu8_epi32(narrow_codes))));
        }
        return;
    }
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m512i table = _mm512_castsi256_si512(narrow<type>(level(first)));
    if (bits == 5) {
        const __m256i upper = narrow<type>(level(_mm512_add_epi32(first, _mm512_set1_epi32(16))));
        table = _mm512_inserti64x4(table, upper, 1);
    }
    for (int64_t j = 0; j < count; j += 32) {
        const __m512i index = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + j)));
        const __m512i values = _mm512_permutexvar_epi16(index, table);
        if (count - j >= 32) {
            _mm512_storeu_si512(out + j, values);
        } else {
            _mm512_mask_storeu_epi16(out + j, (1u << (count - j)) - 1u, values);
        }
    }
}

// Steps, and zeros or lower levels, of up to 16 groups of a row. Packed zeros of a row are at the same bit of each group.
void group_numbers(const Segment& s, int64_t row, int64_t group, int64_t count, float* steps, float* bases) {
    for (int64_t i = 0; i < count; ++i) steps[i] = load(s.scale, s.scale_type, row * s.groups + group + i);
    if (s.offset) {
        for (int64_t i = 0; i < count; ++i) bases[i] = load(s.offset, s.scale_type, row * s.groups + group + i);
    } else if (s.zero) {
        const int64_t bit = row * s.bits, shift = bit % 8, behind = shift + s.bits > 8 ? 1 : 0;
        const uint8_t* at = s.zero + group * s.zero_bytes + bit / 8;
        for (int64_t i = 0; i < count; ++i, at += s.zero_bytes) {
            bases[i] = static_cast<float>((at[0] | at[behind] << 8) >> shift & ((1 << s.bits) - 1));
        }
    } else {
        for (int64_t i = 0; i < count; ++i) bases[i] = zero_point(s, row, group + i);
    }
}

template <Type type>
void segment_values(const Segment& s, int64_t row, const uint8_t* codes, uint16_t* out) {
    if (s.grid == Grid::codebook) {
        const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        for (int64_t j = 0; j < s.width; j += 16) {
            const __mmask16 keep = static_cast<__mmask16>(s.width - j >= 16 ? 0xffff : (1 << (s.width - j)) - 1);
            const __m512i code = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + j)));
            const __m512i column = _mm512_add_epi32(first, _mm512_set1_epi32(static_cast<int>(j)));
            const __m512i place = _mm512_add_epi32(_mm512_sllv_epi32(column, _mm512_set1_epi32(s.bits)), code);
            const __m512 value = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), keep, place, s.levels, 4);
            _mm256_mask_storeu_epi16(out + j, keep, narrow<type>(value));
        }
        return;
    }
    for (int64_t g = 0; g < s.groups; g += 16) {
        alignas(64) float steps[16], bases[16];
        const int64_t count = s.groups - g < 16 ? s.groups - g : 16;
        group_numbers(s, row, g, count, steps, bases);
        for (int64_t i = 0; i < count; ++i) {
            const int64_t first = (g + i) * s.group_size, left = s.width - first;
            const Level level{_mm512_set1_ps(steps[i]), _mm512_set1_ps(bases[i]), s.offset != nullptr};
            group_values<type>(level, s.bits, codes + first, left < s.group_size ? left : s.group_size, out + first);
        }
    }
}

// All levels as `type`; 64 low bytes and 64 high bytes alternate.
template <Type type>
void narrow_levels(const float* levels, int64_t entries, uint8_t* tables) {
    for (int64_t e = 0; e < entries; e += wide_bytes, tables += 2 * wide_bytes) {
        for (int64_t i = 0; i < wide_bytes; i += 16) {
            const int64_t left = entries - e - i;
            const __mmask16 keep = static_cast<__mmask16>(left >= 16 ? 0xffff : left > 0 ? (1 << left) - 1 : 0);
            const __m256i words = narrow<type>(_mm512_maskz_loadu_ps(keep, levels + e + i));
            const __m128i high = _mm256_cvtepi16_epi8(_mm256_srli_epi16(words, 8));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(tables + i), _mm256_cvtepi16_epi8(words));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(tables + wide_bytes + i), high);
        }
    }
}

// Bytes of the tables before those of segment i.
int64_t table_bytes(const Weight& w, int i) {
    int64_t bytes = 0;
    for (int k = 0; k < i; ++k) {
        if (has_tables(w.segments[k])) bytes += 2 * up(w.segments[k].width << w.segments[k].bits, wide_bytes);
    }
    return bytes;
}

// 8 rows from `row` on, of which `count` are wanted; out: the first column of the first.
template <int bits>
void rows_values(const Segment& s, int64_t row, const uint8_t* tables, uint16_t* out, int64_t stride, int64_t count) {
    using Look = Lookup<bits>;
    const __m512i rows = _mm512_mullo_epi64(_mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7), _mm512_set1_epi64(s.row_bytes));
    const uint8_t* at = s.codes + row * s.row_bytes;
    for (int64_t j = 0; j < s.width; j += 8 * Look::steps, at += Look::steps * bits) {
        const __m512i words = gather_rows(at, rows, s.row_bytes, s.codes_end);
        for (int k = 0; k < Look::steps; ++k) {
            const int64_t column = j + 8 * k, left = s.width - column;
            if (left <= 0) return;
            const __m512i index = Look::index(words, k);
            const __m512i low = Look::entries(index, tables, 2 * wide_bytes);
            const __m512i high = Look::entries(index, tables + wide_bytes, 2 * wide_bytes);
            if ((k + 1) % Look::per_table == 0) tables += 2 * wide_bytes * Look::tables;
            // Lane i: the columns of row 2 i; of row 2 i + 1.
            const __m512i even = _mm512_unpacklo_epi8(low, high), odd = _mm512_unpackhi_epi8(low, high);
            const __m128i values[] = {
                _mm512_castsi512_si128(even), _mm512_castsi512_si128(odd),
                _mm512_extracti32x4_epi32(even, 1), _mm512_extracti32x4_epi32(odd, 1),
                _mm512_extracti32x4_epi32(even, 2), _mm512_extracti32x4_epi32(odd, 2),
                _mm512_extracti32x4_epi32(even, 3), _mm512_extracti32x4_epi32(odd, 3),
            };
            if (left >= 8 && count >= 8) {
                for (int i = 0; i < 8; ++i) {
                    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i * stride + column), values[i]);
                }
                continue;
            }
            const __mmask8 keep = static_cast<__mmask8>(left >= 8 ? 0xff : (1 << left) - 1);
            for (int i = 0; i < 8 && i < count; ++i) _mm_mask_storeu_epi16(out + i * stride + column, keep, values[i]);
        }
    }
}

// Eight whole rows together. Strips of columns would keep the tables in the L1 cache, but the prefetcher would miss every
// row's piece of memory (24 ms instead of 8 for 4096 x 11008). Outliers follow while the rows are in the L2 cache.
template <Type type>
void dense_rows(const Weight& w, int64_t begin, int64_t end, float* scratch, uint16_t* out) {
    uint8_t* tables = reinterpret_cast<uint8_t*>(scratch);
    for (int i = 0; i < w.count; ++i) {
        const Segment& s = w.segments[i];
        if (has_tables(s)) narrow_levels<type>(s.levels, s.width << s.bits, tables + table_bytes(w, i));
    }
    uint8_t* codes = tables + table_bytes(w, w.count);  // of the widest other segment, and 63 more
    const Together together(w);
    for (int64_t row = begin; row < end; row += 8) {
        const int64_t last = row + 8 < end ? row + 8 : end;
        for (int i = 0; i < w.count; ++i) {
            const Segment& s = w.segments[i];
            uint16_t* to = out + row * w.columns + s.first_column;
            if (has_tables(s)) {
                constexpr decltype(&rows_values<1>) by_bits[] = {
                    rows_values<1>, rows_values<2>, rows_values<3>, rows_values<4>,
                };
                by_bits[s.bits - 1](s, row, tables + table_bytes(w, i), to, w.columns, end - row);
                continue;
            }
            for (int64_t r = row; r < last; ++r, to += w.columns) {
                fetch(s.codes + r * s.row_bytes + ahead);
                unpack_bytes(s.codes + r * s.row_bytes, s.row_bytes, s.bits, 0, s.width, codes);
                segment_values<type>(s, r, codes, to);
            }
        }
        if (!w.outliers.values) continue;
        for (int64_t r = row; r < last; ++r) outlier_values<type>(w, together, r, out + r * w.columns);
    }
}

}  // namespace

void dequantize(const Weight& w, int64_t begin, int64_t end, bool as_stored, float* scratch, void* out, Type type) {
    const bool moves = w.order && !as_stored;
    if (type == Type::f32 || moves || (w.outliers.values && !w.outliers.rising)) {
        dequantize_rows<unpack_wide>(w, begin, end, as_stored, scratch, out, type);
    } else {
        (type == Type::f16 ? dense_rows<Type::f16> : dense_rows<Type::bf16>)(w, begin, end, scratch,
                                                                            static_cast<uint16_t*>(out));
    }
}

}  // namespace avx512
}  // namespace bitquilt
