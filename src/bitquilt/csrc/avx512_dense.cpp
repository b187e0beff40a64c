// Rows unpacked for a matrix product. Up to 5 bits a group has at most 32 levels: they are computed and rounded once,
// then looked up 32 at a time (`vpermw`), 3 operations per 32 weights; wider codes are computed one by one.
#include "avx512_unpack.h"
#include "rows.h"

namespace bitquilt {
namespace avx512 {
namespace {

void unpack_wide(const uint8_t* stream, int64_t bytes, int bits, int64_t first, int64_t count, uint8_t* codes) {
    unpack_bytes(stream, bytes, bits, first, count, codes);
}

template <Type type>
inline __m256i narrow(__m512 value) {
    if constexpr (type == Type::f16) return _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(_mm512_srli_epi32(sum, 16), nan, _mm512_set1_epi32(0x7fc0)));
}

// What codes mean in one group of one row, rounded as the reference rounds.
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
    for (int64_t g = 0; g < s.groups; ++g) {
        const int64_t first = g * s.group_size, left = s.width - first;
        const int64_t entry = row * s.groups + g;
        Level level;
        level.step = _mm512_set1_ps(load(s.scale, s.scale_type, entry));
        level.offset = s.offset != nullptr;
        level.base = _mm512_set1_ps(s.offset ? load(s.offset, s.scale_type, entry) : zero_point(s, row, g));
        group_values<type>(level, s.bits, codes + first, left < s.group_size ? left : s.group_size, out + first);
    }
}

template <Type type>
void dense_rows(const Weight& w, int64_t begin, int64_t end, float* scratch, uint16_t* out) {
    uint16_t* stored = reinterpret_cast<uint16_t*>(scratch);
    uint8_t* codes = reinterpret_cast<uint8_t*>(scratch + w.columns);  // of the widest segment, and 63 more
    for (int64_t row = begin; row < end; ++row) {
        uint16_t* to = out + row * w.columns;
        uint16_t* values = w.run_count == 1 ? to : stored;
        for (int i = 0; i < w.count; ++i) {
            const Segment& s = w.segments[i];
            fetch(s.codes + row * s.row_bytes + ahead);
            unpack_bytes(s.codes + row * s.row_bytes, s.row_bytes, s.bits, 0, s.width, codes);
            segment_values<type>(s, row, codes, values + s.first_column);
        }
        if (w.run_count == 1) continue;
        for (int64_t i = 0; i < w.run_count; ++i) {
            const Run& run = w.runs[i];
            std::memcpy(to + run.original, stored + run.stored, sizeof(uint16_t) * run.length);
        }
    }
}

}  // namespace

void dequantize(const Weight& w, int64_t begin, int64_t end, float* scratch, void* out, Type type) {
    if (type == Type::f32 || w.outliers.values) {  // outliers are added before anything is rounded
        dequantize_rows<unpack_wide>(w, begin, end, scratch, out, type);
    } else {
        (type == Type::f16 ? dense_rows<Type::f16> : dense_rows<Type::bf16>)(w, begin, end, scratch,
                                                                            static_cast<uint16_t*>(out));
    }
}

}  // namespace avx512
}  // namespace bitquilt
