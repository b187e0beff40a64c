// Activations as the AVX-512 kernels read them, once per call.
#include "avx512_unpack.h"
#include "scalar.h"

namespace bitquilt {
namespace avx512 {
namespace {

// Largest magnitude as its bits: above 0x7f800000 if there is a NaN, equal to it if there is an infinity.
uint32_t magnitude(const float* x, int64_t count) {
    const __m512i positive = _mm512_set1_epi32(0x7fffffff);
    __m512i largest = _mm512_setzero_si512();
    for (int64_t j = 0; j < count; j += 16) {
        const __mmask16 keep = static_cast<__mmask16>(count - j >= 16 ? 0xffff : (1 << (count - j)) - 1);
        const __m512i bits = _mm512_maskz_loadu_epi32(keep, x + j);
        largest = _mm512_max_epi32(largest, _mm512_and_si512(bits, positive));
    }
    return static_cast<uint32_t>(_mm512_reduce_max_epi32(largest));
}

// One digit of every activation of a chunk, in the order in which the codes are unpacked.
inline void store_plane(const int8_t* digits, int64_t planes, int64_t k, int8_t* to) {
    const __m128i shift = _mm_cvtsi64_si128(8 * k);
    for (int64_t j = 0; j < wide_bytes; j += 64 / planes) {
        const __m512i columns = _mm512_load_si512(digits + j * planes);
        if (planes == 1) {
            _mm512_storeu_si512(to, columns);
        } else if (planes == 2) {
            const __m256i bytes = _mm512_cvtepi16_epi8(_mm512_srl_epi16(columns, shift));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + j), bytes);
        } else if (planes == 4) {
            const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_srl_epi32(columns, shift));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(to + j), bytes);
        } else {
            const __m128i bytes = _mm512_cvtepi64_epi8(_mm512_srl_epi64(columns, shift));
            _mm_storel_epi64(reinterpret_cast<__m128i*>(to + j), bytes);
        }
    }
}

// A little below 127 * (1 + 256 + ...), the largest value the digits hold, so that rounding cannot leave it.
float largest_of(int digits) { return digits == 1 ? 127.0f : digits == 2 ? 32630.0f : 8355000.0f; }

// 16 numbers' low bytes, signed; what is left in `q` is the rest, divided by 256.
inline void next_digit(int32_t* q, int8_t* to) {
    const __m512i rest = _mm512_load_si512(q);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(rest));
    _mm512_store_si512(q, _mm512_srai_epi32(_mm512_add_epi32(rest, _mm512_set1_epi32(128)), 8));
}

// The value of one unit of each group; `sum` is set to the factor of its activations.
void set_units(const Segment& s, const float* x, float largest, float* unit, float* sum) {
    for (int64_t g = 0; g < s.groups; ++g) {
        const int64_t first = g * s.group_size, left = s.width - first;
        unit[g] = from_bits(magnitude(x + first, s.groups == 1 || left < s.group_size ? left : s.group_size));
    }
    const __m512 most = _mm512_set1_ps(largest);
    for (int64_t g = 0; g < s.groups; g += 16) {
        const __m512 value = _mm512_loadu_ps(unit + g);
        const __mmask16 bad = _mm512_cmpge_epu32_mask(_mm512_castps_si512(value), _mm512_set1_epi32(0x7f800000));
        // Below 1e-30 the inverse would leave fp32: such activations count as zero.
        const __mmask16 usable = _mm512_cmp_ps_mask(value, _mm512_set1_ps(1e-30f), _CMP_GE_OQ) & ~bad;
        const __m512 nan = _mm512_castsi512_ps(_mm512_set1_epi32(0x7fc00000));
        _mm512_storeu_ps(unit + g, _mm512_mask_mov_ps(_mm512_div_ps(value, most), bad, nan));
        _mm512_storeu_ps(sum + g, _mm512_maskz_div_ps(usable, most, value));
    }
}

// A sum of fixed-point numbers, in two parts that 32 bits hold for 2^20 of them.
struct Total {
    __m512i low = _mm512_setzero_si512(), high = _mm512_setzero_si512();
    void add(__m512i fixed) {
        low = _mm512_add_epi32(low, _mm512_and_si512(fixed, _mm512_set1_epi32(4095)));
        high = _mm512_add_epi32(high, _mm512_srai_epi32(fixed, 12));
    }
    float value() const { return static_cast<float>(lanes(low) + 4096 * lanes(high)); }
    static int64_t lanes(__m512i a) {
        return _mm512_reduce_add_epi64(_mm512_add_epi64(_mm512_cvtepi32_epi64(_mm512_castsi512_si256(a)),
                                                        _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(a, 1))));
    }
};

// Fixed-point activations of one segment and token. Digits are signed: q = d0 + 256 d1 + 65536 d2.
void prepare_segment(const Segment& s, const float* x, int digits, float* unit, float* sum, int8_t* planes) {
    set_units(s, x, largest_of(digits), unit, sum);
    const int64_t count = plane_count(s), chunk = wide_bytes * count;
    const int64_t step = s.groups == 1 || s.group_size % 16 == 0 ? 16 : 8;  // columns that share a group
    int64_t group_end = 0, g = -1;
    Total total;
    alignas(64) int8_t bytes[3][512 + wide_bytes];  // with 8 columns at a time 8 more are written
    for (int64_t start = 0; start < s.width; start += chunk, planes += chunk * digits) {
        for (int64_t j = 0; j < chunk; j += step) {
            const int64_t column = start + j, left = s.width - column;
            if (column >= group_end && left > 0) {
                if (g >= 0) sum[g] = unit[g] * total.value();
                ++g;
                total = Total();
                group_end = s.groups == 1 || left < s.group_size ? s.width : column + s.group_size;
            }
            const int used = left <= 0 ? 0 : left >= step ? (1 << step) - 1 : (1 << left) - 1;
            const __mmask16 keep = static_cast<__mmask16>(sum[g] == 0.0f ? 0 : used);
            const __m512 value = _mm512_mul_ps(_mm512_maskz_loadu_ps(keep, x + column), _mm512_set1_ps(sum[g]));
            __m512i fixed = _mm512_cvtps_epi32(value);
            total.add(fixed);
            for (int d = 0; d < digits; ++d) {
                _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes[d] + j), _mm512_cvtepi32_epi8(fixed));
                fixed = _mm512_srai_epi32(_mm512_add_epi32(fixed, _mm512_set1_epi32(128)), 8);
            }
        }
        for (int d = 0; d < digits; ++d) {
            for (int64_t k = 0; k < count; ++k) store_plane(bytes[d], count, k, planes + (k * digits + d) * wide_bytes);
        }
    }
    sum[g] = unit[g] * total.value();
}

// 16 levels times the activations of their columns; zeros past `left` levels.
struct Products {
    const float *levels, *x;
    int bits;
    __m512i column;  // of each lane, from the first

    Products(const Segment& s, const float* activations, int64_t first)
        : levels(s.levels + (first << s.bits)), x(activations + first), bits(s.bits),
          column(_mm512_srlv_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                   _mm512_set1_epi32(s.bits))) {}
    __m512 at(int64_t entry, int64_t left) const {
        if (left <= 0) return _mm512_setzero_ps();
        const __mmask16 keep = static_cast<__mmask16>(left >= 16 ? 0xffff : (1 << left) - 1);
        const int64_t columns = ((left < 16 ? left : 16) + (1 << bits) - 1) >> bits;
        const __m512 values = _mm512_maskz_loadu_ps(static_cast<__mmask16>((1 << columns) - 1), x + (entry >> bits));
        return _mm512_maskz_mul_ps(keep, _mm512_maskz_loadu_ps(keep, levels + entry),
                                   _mm512_permutexvar_ps(column, values));
    }
};

// One codebook segment and token: per strip of columns the products of activation and level as fixed-point numbers, a
// register of them per digit. Their order is the levels' own: 64 >> bits columns, each with its levels.
void prepare_tables(const Segment& s, const float* x, int digits, float* unit, int8_t* tables) {
    const float largest = largest_of(digits);
    const __m512i positive = _mm512_set1_epi32(0x7fffffff);
    alignas(64) int32_t q[wide_bytes];
    for (int64_t strip = 0; strip < s.groups; ++strip) {
        const int64_t begin = strip * strip_columns;
        const int64_t left = s.width - begin, count = left < strip_columns ? left : strip_columns;
        const int64_t entries = count << s.bits;
        const Products products(s, x, begin);
        __m512i most = _mm512_setzero_si512();
        for (int64_t e = 0; e < entries; e += 16) {
            const __m512i bits = _mm512_castps_si512(products.at(e, entries - e));
            most = _mm512_max_epi32(most, _mm512_and_si512(bits, positive));
        }
        const uint32_t bits = static_cast<uint32_t>(_mm512_reduce_max_epi32(most));
        const bool usable = bits < 0x7f800000u && from_bits(bits) >= 1e-30f;
        unit[strip] = bits >= 0x7f800000u ? from_bits(0x7fc00000u) : from_bits(bits) / largest;
        const __m512 inverse = _mm512_set1_ps(usable ? largest / from_bits(bits) : 0.0f);
        for (int64_t e = 0; e < up(count, 64) << s.bits; e += wide_bytes) {
            for (int64_t i = 0; i < wide_bytes; i += 16) {
                const __m512 fixed = _mm512_mul_ps(products.at(e + i, usable ? entries - e - i : 0), inverse);
                _mm512_store_si512(q + i, _mm512_cvtps_epi32(fixed));
            }
            for (int d = 0; d < digits; ++d, tables += wide_bytes) {
                for (int64_t i = 0; i < wide_bytes; i += 16) next_digit(q + i, tables + i);
            }
        }
    }
}

}  // namespace

int64_t plane_bytes(const Segment& s, int digits) {
    if (has_tables(s)) return (up(s.width, 64) << s.bits) * digits;
    return s.grid == Grid::codebook ? 0 : up(s.width, wide_bytes * plane_count(s)) * digits;
}

void prepare(const Weight& w, const Inputs& in) {
    for (int t = 0; t < in.tokens; ++t) {
        for (int i = 0; i < w.count; ++i) {
            const Segment& s = w.segments[i];
            const int64_t at = t * in.groups + s.first_group;
            const float* x = in.stored + t * w.columns + s.first_column;
            int8_t* planes = in.planes + t * in.plane_bytes + s.first_plane;
            if (has_tables(s)) prepare_tables(s, x, in.digits, in.unit + at, planes);
            if (s.grid == Grid::uniform) prepare_segment(s, x, in.digits, in.unit + at, in.sum + at, planes);
        }
    }
}

}  // namespace avx512
}  // namespace bitquilt
