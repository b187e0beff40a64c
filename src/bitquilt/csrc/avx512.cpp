// AVX-512 with VBMI, VNNI and GFNI (Ice Lake, Zen 4 and later): the table of its functions, and the rows of one block.
#include "avx512_unpack.h"
#include "rows.h"

namespace bitquilt {
namespace {

void unpack_wide(const uint8_t* stream, int64_t bytes, int bits, int64_t first, int64_t count, uint8_t* codes) {
    avx512::unpack_bytes(stream, bytes, bits, first, count, codes);
}

void matmul(const Weight& w, const Inputs& in, int64_t begin, int64_t end, float* scratch, float* out) {
    for (int64_t block = begin; block < end; block += row_block) {
        const int64_t last = block + row_block < end ? block + row_block : end;
        alignas(64) float totals[max_tokens * row_block];
        std::memset(totals, 0, sizeof(float) * row_block * in.tokens);
        avx512::uniform_block(w, in, block, last, scratch, totals);
        for (int i = 0; i < w.count; ++i) {
            const Segment& s = w.segments[i];
            if (avx512::has_tables(s)) avx512::codebook_block(s, in, block, last, totals);
            if (s.grid != Grid::codebook || avx512::has_tables(s)) continue;
            for (int64_t row = block; row < last; ++row) {
                float total[max_tokens] = {};
                codebook_row<unpack_wide>(s, in, w.columns, row, total);
                for (int t = 0; t < in.tokens; ++t) totals[t * row_block + row - block] += total[t];
            }
        }
        for (int t = 0; t < in.tokens; ++t) {
            std::memcpy(out + t * w.rows + block, totals + t * row_block, sizeof(float) * (last - block));
        }
    }
}

// 16 at a time as 32-bit words, of which the low half counts: 3 times as fast as one by one.
void pick(const uint16_t* from, const int32_t* order, int64_t count, bool beyond, uint16_t* to) {
    int64_t j = 0;
    for (; beyond && j + 16 <= count; j += 16) {
        const __m512i words = _mm512_i32gather_epi32(_mm512_loadu_si512(order + j), from, 2);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + j), _mm512_cvtepi32_epi16(words));
    }
    pick_halves(from, order + j, count - j, beyond, to + j);
}

// 55 of a row of 11008: 0.07 us by plain loops, which finish the last seven one by one.
float outliers(const Outliers& o, int64_t row, const float* x) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t e = o.rows[row]; e < o.rows[row + 1]; e += 16) {
        const int64_t left = o.rows[row + 1] - e;
        const __mmask16 keep = static_cast<__mmask16>(left >= 16 ? 0xffff : (1 << left) - 1);
        const __m512i column =
            o.wide ? _mm512_maskz_loadu_epi32(keep, static_cast<const int32_t*>(o.columns) + e)
                   : _mm512_cvtepi16_epi32(_mm256_maskz_loadu_epi16(keep, static_cast<const int16_t*>(o.columns) + e));
        const __m512 value = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(keep, o.values + e));
        sum = _mm512_fmadd_ps(value, _mm512_mask_i32gather_ps(_mm512_setzero_ps(), keep, column, x, 4), sum);
    }
    return _mm512_reduce_add_ps(sum);
}

}  // namespace

const Isa avx512_isa = {
    "avx512", true, avx512::plane_bytes, avx512::prepare, matmul, avx512::uniform_scratch, avx512::dequantize, pick,
    outliers,
};

}  // namespace bitquilt
