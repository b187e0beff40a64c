// Codebook columns: y = sum_j x_j * level[j][code_j] without a multiplication. A register holds the products of
// 64 >> bits columns with all their levels, as bytes of one digit; a byte permutation looks up 64 codes at once, 8
// columns of 8 rows, or 4 of 16 rows at 4 bits; `vpdpbusd` with ones sums them. Per 64 weights: a multishift, a mask,
// and per digit a permutation and an addition, plus a gather of 8 rows per 16 to 64 columns.
#include "avx512_codebook.h"

namespace bitquilt {
namespace avx512 {
namespace {

template <int bits, int D>
void strip_rows(const uint8_t* at, __m512i rows, int64_t row_bytes, const uint8_t* end, int64_t columns,
                const int8_t* table, __m512i* sums) {
    using Look = Lookup<bits>;
    const __m512i ones = _mm512_set1_epi8(1);
    for (int64_t j = 0; j < columns; j += 8 * Look::steps, at += Look::steps * bits) {
        const __m512i words = gather_rows(at, rows, row_bytes, end);
        for (int k = 0; k < Look::steps; ++k) {
            const __m512i index = Look::index(words, k);
            for (int d = 0; d < D; ++d) {
                const __m512i found = Look::entries(index, table + d * wide_bytes, D * wide_bytes);
                sums[d] = _mm512_dpbusd_epi32(sums[d], ones, found);
            }
            if ((k + 1) % Look::per_table == 0) table += wide_bytes * D * Look::tables;
        }
    }
}

// 4 bits, 16 rows: 4 columns fill a register of products, and a 64-bit word holds 8 columns of two rows, 8 rows apart.
// With 8 columns of 8 rows every look-up took two permutations, on the one port that has them.
template <int D>
void strip_of_four(const uint8_t* at, __m512i rows, int64_t row_bytes, const uint8_t* end, int64_t columns,
                   const int8_t* table, __m512i* sums) {
    const __m512i place = _mm512_set1_epi64(0x3020100030201000), mask = _mm512_set1_epi8(15);
    const __m512i ones = _mm512_set1_epi8(1);
    const __m512i shifts[] = {_mm512_set1_epi64(0x2c2824200c080400), _mm512_set1_epi64(0x3c3834301c181410)};
    for (int64_t j = 0; j < columns; j += 16, at += 8) {
        const __m512i a = gather_rows(at, rows, row_bytes, end), b = gather_rows(at + 8 * row_bytes, rows, row_bytes, end);
        const __m512i words[] = {_mm512_mask_blend_epi32(0xaaaa, a, _mm512_slli_epi64(b, 32)),
                                 _mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(a, 32), b)};
        for (int k = 0; k < 4; ++k, table += wide_bytes * D) {
            const __m512i codes = _mm512_multishift_epi64_epi8(shifts[k % 2], words[k / 2]);
            const __m512i index = _mm512_ternarylogic_epi64(codes, mask, place, 0xea);  // (codes & mask) | place
            for (int d = 0; d < D; ++d) {
                const __m512i found = _mm512_permutexvar_epi8(index, _mm512_loadu_si512(table + d * wide_bytes));
                sums[d] = _mm512_dpbusd_epi32(sums[d], ones, found);
            }
        }
    }
}

template <int bits, int D>
void block_of(const Segment& s, const Inputs& in, int64_t begin, int64_t end, float* totals) {
    constexpr int64_t height = bits == 4 ? 16 : 8;  // rows at once
    const int64_t strip_bytes = strip_columns / 8 * bits;
    const __m512i rows = _mm512_mullo_epi64(_mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7), _mm512_set1_epi64(s.row_bytes));
    for (int t = 0; t < in.tokens; ++t) {
        const int8_t* tables = in.planes + t * in.plane_bytes + s.first_plane;
        const float* units = in.unit + t * in.groups + s.first_group;
        __m512 lanes[row_block / height];
        for (auto& y : lanes) y = _mm512_setzero_ps();
        for (int64_t strip = 0; strip < s.groups; ++strip) {
            const int64_t left = s.width - strip * strip_columns;
            const int64_t columns = up(left < strip_columns ? left : strip_columns, 64);
            for (int64_t row = begin; row < end; row += height) {
                const uint8_t* at = s.codes + row * s.row_bytes + strip * strip_bytes;
                // the same rows' next strip, or the next rows' first
                const int64_t further = row_block * s.row_bytes - strip * strip_bytes;
                const uint8_t* next = at + (strip + 1 < s.groups ? strip_bytes : further);
                for (int64_t i = 0; i < height; ++i) {
                    for (int64_t b = 0; b < strip_bytes; b += 64) fetch(next + i * s.row_bytes + b);
                }
                __m512i sums[D];
                for (auto& sum : sums) sum = _mm512_setzero_si512();
                if constexpr (bits == 4) {
                    strip_of_four<D>(at, rows, s.row_bytes, s.codes_end, columns, tables, sums);
                } else {
                    strip_rows<bits, D>(at, rows, s.row_bytes, s.codes_end, columns, tables, sums);
                }
                __m512& y = lanes[(row - begin) / height];
                y = _mm512_fmadd_ps(to_float<D>(sums), _mm512_set1_ps(units[strip]), y);
            }
            tables += (columns << bits) * D;
        }
        for (int64_t row = begin; row < end; row += height) {  // lanes 2 i and 2 i + 1: rows i and i + 8, or both row i
            alignas(64) float pairs[16];
            _mm512_store_ps(pairs, lanes[(row - begin) / height]);
            float* to = totals + t * row_block + row - begin;
            for (int64_t i = 0; i < height && row + i < end; ++i) {
                to[i] += bits == 4 ? pairs[2 * (i % 8) + i / 8] : pairs[2 * i] + pairs[2 * i + 1];
            }
        }
    }
}

template <int bits>
void block_bits(const Segment& s, const Inputs& in, int64_t begin, int64_t end, float* totals) {
    const auto run = in.digits == 1 ? block_of<bits, 1> : in.digits == 2 ? block_of<bits, 2> : block_of<bits, 3>;
    run(s, in, begin, end, totals);
}

}  // namespace

void codebook_block(const Segment& s, const Inputs& in, int64_t begin, int64_t end, float* totals) {
    constexpr decltype(&block_bits<1>) by_bits[] = {block_bits<1>, block_bits<2>, block_bits<3>, block_bits<4>};
    by_bits[s.bits - 1](s, in, begin, end, totals);
}

}  // namespace avx512
}  // namespace bitquilt
