// AVX-512 with VBMI and VNNI (Ice Lake, Zen 4 and later): integer dot products on the codes as they are stored.
//
// Activations become fixed-point numbers per token and column group, written as signed bytes: three of them (24 bits)
// for fp32 input, two (16 bits) for bf16 and fp16. Products with the codes are then exact integers, 64 per
// instruction and digit; one conversion to fp32 per group and digit follows. The same in fp32 arithmetic would
// take a conversion and an FMA per 16 weights: 3 times as many instructions, below memory speed at 2 bits.
#include <immintrin.h>

#include "avx512_unpack.h"
#include "rows.h"

namespace bitquilt {
namespace {

constexpr int tile = 4;  // tokens per pass over the codes: 4 x 3 digits of accumulators fit the 32 registers

inline __m512 load16(const void* data, Type type, int64_t index, __mmask16 keep) {
    if (type == Type::f32) return _mm512_maskz_loadu_ps(keep, static_cast<const float*>(data) + index);
    const __m256i raw = _mm256_maskz_loadu_epi16(keep, static_cast<const uint16_t*>(data) + index);
    if (type == Type::f16) return _mm512_cvtph_ps(raw);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}

// What one unit of code times one unit of activation is worth, per token and group; and the zeros' share of the row.
template <int T>
void coefficients(const Segment& s, const Inputs& in, int64_t row, int token, const uint8_t* zeros, float* factors,
                  int64_t stride, __m512* y) {
    const __m512 middle = _mm512_set1_ps(static_cast<float>((1 << s.bits) - 1) / 2.0f);
    for (int64_t g = 0; g < s.groups; g += 16) {
        const int64_t left = s.groups - g, entry = row * s.groups + g;
        const __mmask16 keep = static_cast<__mmask16>(left >= 16 ? 0xffff : (1 << left) - 1);
        const __m512 step = load16(s.scale, s.scale_type, entry, keep);
        __m512 base;
        if (s.offset) {
            base = load16(s.offset, s.scale_type, entry, keep);
        } else {
            const __m128i* packed = reinterpret_cast<const __m128i*>(zeros + g);
            const __m512 zero = s.zero ? _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(packed))) : middle;
            base = _mm512_sub_ps(_mm512_setzero_ps(), _mm512_mul_ps(step, zero));
        }
        for (int t = 0; t < T; ++t) {
            const int64_t at = (token + t) * in.groups + s.first_group + g;
            _mm512_storeu_ps(factors + t * stride + g, _mm512_mul_ps(step, _mm512_loadu_ps(in.unit + at)));
            y[t] = _mm512_fmadd_ps(base, _mm512_loadu_ps(in.sum + at), y[t]);
        }
    }
}

template <int D>
inline __m512 to_float(const __m512i* digits) {
    __m512 value = _mm512_cvtepi32_ps(digits[D - 1]);
    for (int d = D - 2; d >= 0; --d) {
        value = _mm512_fmadd_ps(value, _mm512_set1_ps(256.0f), _mm512_cvtepi32_ps(digits[d]));
    }
    return value;
}

template <class U, int T, int D, int k = 0>
inline void add_planes(const U& unpack, __m512i raw, const int8_t* x, int64_t token_bytes, __m512i (*sums)[D]) {
    const __m512i codes = unpack.template plane<k>(raw);
    for (int t = 0; t < T; ++t) {
        for (int d = 0; d < D; ++d) {
            const __m512i digit = _mm512_loadu_si512(x + t * token_bytes + (k * D + d) * wide_bytes);
            sums[t][d] = _mm512_dpbusd_epi32(sums[t][d], codes, digit);
        }
    }
    if constexpr (k + 1 < U::planes) add_planes<U, T, D, k + 1>(unpack, raw, x, token_bytes, sums);
}

// Groups of `per_group` chunks (a constant if it is not 0) that need no checks.
template <class U, int T, int D, int constant>
void whole_groups(const U& unpack, const uint8_t* at, const int8_t* x, int64_t token_bytes, int64_t per_group,
                         int64_t groups, const float* factors, int64_t stride, __m512* y) {
    constexpr int64_t chunk_bytes = wide_bytes * U::planes * D;
    const int64_t chunks = constant ? constant : per_group;
    __m512 totals[T];
    for (int t = 0; t < T; ++t) totals[t] = y[t];
    for (int64_t g = 0; g < groups; ++g) {
        __m512i sums[T][D];
        for (int t = 0; t < T; ++t) for (int d = 0; d < D; ++d) sums[t][d] = _mm512_setzero_si512();
        for (int64_t c = 0; c < chunks; ++c, at += unpack.step, x += chunk_bytes) {
            add_planes<U, T, D>(unpack, unpack.raw(at), x, token_bytes, sums);
        }
        for (int t = 0; t < T; ++t) {
            totals[t] = _mm512_fmadd_ps(to_float<D>(sums[t]), _mm512_set1_ps(factors[t * stride + g]), totals[t]);
        }
    }
    for (int t = 0; t < T; ++t) y[t] = totals[t];
}

// One row of one segment for T tokens: y[t] += its share, spread over the lanes.
template <class U, int T, int D>
void segment_row(const Segment& s, const Inputs& in, int64_t row, int token, const uint8_t* zeros, float* factors,
                 int64_t stride, __m512* y) {
    constexpr int64_t chunk = wide_bytes * U::planes;
    constexpr int64_t chunk_bytes = chunk * D;
    coefficients<T>(s, in, row, token, zeros, factors, stride, y);
    const U unpack(s.bits);
    const int8_t* x = in.planes + token * in.plane_bytes + s.first_plane;
    const uint8_t* at = s.codes + row * s.row_bytes;
    const int64_t chunks = (s.width + chunk - 1) / chunk;
    if (s.groups == 1 || s.group_size % chunk == 0) {  // a chunk belongs to one group
        const int64_t per_group = s.groups == 1 ? chunks : s.group_size / chunk;
        // Groups whose loads stay inside the tensor: no checks, and the usual 1 or 2 chunks without a loop.
        const int64_t room = s.codes_end - at - U::bytes_read + unpack.step;
        int64_t whole = room > 0 ? room / (per_group * unpack.step) : 0;
        if (whole > chunks / per_group) whole = chunks / per_group;
        const auto run = per_group == 1 ? whole_groups<U, T, D, 1>
                         : per_group == 2 ? whole_groups<U, T, D, 2> : whole_groups<U, T, D, 0>;
        run(unpack, at, x, in.plane_bytes, per_group, whole, factors, stride, y);
        int64_t g = whole;
        at += g * per_group * unpack.step;
        x += g * per_group * chunk_bytes;
        for (int64_t c = g * per_group; c < chunks; ++g) {
            __m512i sums[T][D];
            for (int t = 0; t < T; ++t) for (int d = 0; d < D; ++d) sums[t][d] = _mm512_setzero_si512();
            const int64_t last = c + per_group < chunks ? c + per_group : chunks;
            for (; c < last; ++c, at += unpack.step, x += chunk_bytes) {
                add_planes<U, T, D>(unpack, unpack.raw(at, s.codes_end - at), x, in.plane_bytes, sums);
            }
            for (int t = 0; t < T; ++t) {
                y[t] = _mm512_fmadd_ps(to_float<D>(sums[t]), _mm512_set1_ps(factors[t * stride + g]), y[t]);
            }
        }
        return;
    }
    // A lane belongs to one group: which one, from its first column. The half keeps quotients off whole numbers:
    // below 2^20 columns the error of the fp32 quotient is under half of the half's share.
    const bool regular = chunk % s.group_size == 0;
    const __m512 inverse = _mm512_set1_ps(1.0f / static_cast<float>(s.group_size));
    const __m512 lanes = _mm512_cvtepi32_ps(_mm512_mullo_epi32(
        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), _mm512_set1_epi32(4 * U::planes)));
    const __m512 half = _mm512_add_ps(lanes, _mm512_set1_ps(0.5f));
    __m512i lane_group = _mm512_cvttps_epi32(_mm512_mul_ps(half, inverse));
    for (int64_t c = 0; c < chunks; ++c, at += unpack.step, x += chunk_bytes) {
        const int64_t first = c * chunk / s.group_size;
        if (!regular) {
            const float offset = static_cast<float>(c * chunk - first * s.group_size);
            lane_group = _mm512_cvttps_epi32(_mm512_mul_ps(_mm512_add_ps(half, _mm512_set1_ps(offset)), inverse));
        }
        __m512i sums[T][D];
        for (int t = 0; t < T; ++t) for (int d = 0; d < D; ++d) sums[t][d] = _mm512_setzero_si512();
        add_planes<U, T, D>(unpack, unpack.raw(at, s.codes_end - at), x, in.plane_bytes, sums);
        for (int t = 0; t < T; ++t) {
            const __m512 factor = _mm512_permutexvar_ps(lane_group, _mm512_loadu_ps(factors + t * stride + first));
            y[t] = _mm512_fmadd_ps(to_float<D>(sums[t]), factor, y[t]);
        }
    }
}

using SegmentRow = void (*)(const Segment&, const Inputs&, int64_t, int, const uint8_t*, float*, int64_t, __m512*);

template <int T, int D>
SegmentRow choose(const Segment& s) {
    if (plane_count(s) == 8) return segment_row<Planes<1>, T, D>;
    if (plane_count(s) == 4) return segment_row<Planes<2>, T, D>;
    if (plane_count(s) == 2) return segment_row<Planes<4>, T, D>;
    if (s.bits <= 2) return segment_row<Words<16>, T, D>;
    return s.bits <= 4 ? segment_row<Words<32>, T, D> : segment_row<Words<64>, T, D>;
}

// Zeros are packed along the rows: 64 rows x 16 groups at a time become bytes and are transposed, 4 rounds of
// interleaving register i with i + 8. About 130 operations for 1024 zeros, so 1 per 1000 weights at group size 128.
void load_zeros(const Segment& s, int64_t row, uint8_t* out, int64_t stride) {
    const WordControl control(s.bits);
    const int64_t first = row / 8 * s.bits;
    for (int64_t g = 0; g < s.groups; g += 16) {
        __m512i a[16], b[16];
        for (int i = 0; i < 16; ++i) {
            const int64_t group = g + i < s.groups ? g + i : s.groups - 1;
            a[i] = control.codes(load_bytes(s.zero + group * s.zero_bytes + first, s.zero_bytes - first));
        }
        for (int round = 0; round < 4; ++round) {
            for (int i = 0; i < 8; ++i) {
                b[2 * i] = _mm512_unpacklo_epi8(a[i], a[i + 8]);
                b[2 * i + 1] = _mm512_unpackhi_epi8(a[i], a[i + 8]);
            }
            for (int i = 0; i < 16; ++i) a[i] = b[i];
        }
        for (int i = 0; i < 16; ++i) {  // register i, 128-bit lane l: row 16 l + i
            uint8_t* to = out + i * stride + g;
            _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_extracti32x4_epi32(a[i], 0));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 16 * stride), _mm512_extracti32x4_epi32(a[i], 1));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 32 * stride), _mm512_extracti32x4_epi32(a[i], 2));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 48 * stride), _mm512_extracti32x4_epi32(a[i], 3));
        }
    }
}

void unpack_wide(const uint8_t* stream, int64_t bytes, int bits, int64_t first, int64_t count, uint8_t* codes) {
    const WordControl control(bits);
    int64_t at = first / 8 * bits;
    for (int64_t j = 0; j < count; j += 64, at += 8 * bits) {
        _mm512_storeu_si512(codes + j, control.codes(load_bytes(stream + at, bytes - at)));
    }
}

template <int T, int D>
void tokens_of_row(const Weight& w, const Inputs& in, int64_t row, int64_t block, int token, const uint8_t* zeros,
                   float* factors, float* total) {
    const int64_t stride = in.groups + 2 * group_padding;
    __m512 y[T];
    for (int t = 0; t < T; ++t) y[t] = _mm512_setzero_ps();
    for (int i = 0; i < w.count; ++i) {
        const Segment& s = w.segments[i];
        if (s.grid != Grid::uniform) continue;
        const uint8_t* row_zeros = zeros + s.first_group * row_block + (row - block) * up(s.groups, group_padding);
        choose<T, D>(s)(s, in, row, token, row_zeros, factors + s.first_group, stride, y);
    }
    for (int t = 0; t < T; ++t) total[token + t] += _mm512_reduce_add_ps(y[t]);
}

template <int D>
void matmul_digits(const Weight& w, const Inputs& in, int64_t begin, int64_t end, float* scratch, float* out) {
    // Lanes past the last group multiply a sum of zero: their factors must be finite.
    std::memset(scratch, 0, sizeof(float) * tile * (in.groups + 2 * group_padding));
    uint8_t* zeros = reinterpret_cast<uint8_t*>(scratch + tile * (in.groups + 2 * group_padding));
    for (int64_t block = begin; block < end; block += row_block) {
        for (int i = 0; i < w.count; ++i) {
            const Segment& s = w.segments[i];
            if (s.zero) load_zeros(s, block, zeros + s.first_group * row_block, up(s.groups, group_padding));
        }
        const int64_t last = block + row_block < end ? block + row_block : end;
        for (int64_t row = block; row < last; ++row) {
            float total[max_tokens] = {};
            for (int i = 0; i < w.count; ++i) {
                if (w.segments[i].grid == Grid::codebook) {
                    codebook_row<unpack_wide>(w.segments[i], in, w.columns, row, total);
                }
            }
            int token = 0;
            for (; token + tile <= in.tokens; token += tile) {
                tokens_of_row<tile, D>(w, in, row, block, token, zeros, scratch, total);
            }
            for (; token < in.tokens; ++token) {
                tokens_of_row<1, D>(w, in, row, block, token, zeros, scratch, total);
            }
            for (int t = 0; t < in.tokens; ++t) out[t * w.rows + row] = total[t];
        }
    }
}

void matmul(const Weight& w, const Inputs& in, int64_t begin, int64_t end, float* scratch, float* out) {
    (in.digits == 2 ? matmul_digits<2> : matmul_digits<3>)(w, in, begin, end, scratch, out);
}

int64_t scratch_floats(const Weight&, const Inputs& in) {
    return tile * (in.groups + 2 * group_padding) + in.groups * row_block / 4 + group_padding;
}

int64_t plane_bytes(const Segment& s, int digits) {
    return s.grid == Grid::codebook ? 0 : up(s.width, wide_bytes * plane_count(s)) * digits;
}

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

// Fixed-point activations of one segment and token. Digits are signed: q = d0 + 256 d1 + 65536 d2.
void prepare_segment(const Segment& s, const float* x, int digits, float* unit, float* sum, int8_t* planes) {
    // A little below 127 * (1 + 256 + ...), the largest value the digits hold, so that rounding cannot leave it.
    const float largest = digits == 2 ? 32630.0f : 8355000.0f;
    const int64_t count = plane_count(s), chunk = wide_bytes * count;
    int64_t group_end = 0, g = -1;
    float inverse = 0.0f;
    __m512i total = _mm512_setzero_si512();
    alignas(64) int32_t q[512];
    alignas(64) int8_t bytes[512];
    for (int64_t start = 0; start < s.width; start += chunk, planes += chunk * digits) {
        for (int64_t j = 0; j < chunk; j += 8) {  // 8 columns share a group
            const int64_t column = start + j;
            if (column >= group_end && column < s.width) {
                if (g >= 0) sum[g] = unit[g] * static_cast<float>(_mm512_reduce_add_epi64(total));
                ++g;
                total = _mm512_setzero_si512();
                group_end = s.groups == 1 || column + s.group_size > s.width ? s.width : column + s.group_size;
                const uint32_t bits = magnitude(x + column, group_end - column);
                unit[g] = bits >= 0x7f800000u ? from_bits(0x7fc00000u) : from_bits(bits) / largest;
                // Below 1e-30 the inverse would leave fp32: such activations count as zero.
                inverse = bits >= 0x7f800000u || from_bits(bits) < 1e-30f ? 0.0f : largest / from_bits(bits);
            }
            const int64_t left = s.width - column;
            const int used = left <= 0 || inverse == 0.0f ? 0 : left >= 8 ? 0xff : (1 << left) - 1;
            const __m256 value = _mm256_maskz_loadu_ps(static_cast<__mmask8>(used), x + column);
            const __m256i fixed = _mm256_cvtps_epi32(_mm256_mul_ps(value, _mm256_set1_ps(inverse)));
            _mm256_store_si256(reinterpret_cast<__m256i*>(q + j), fixed);
            total = _mm512_add_epi64(total, _mm512_cvtepi32_epi64(fixed));
        }
        for (int d = 0; d < digits; ++d) {
            for (int64_t j = 0; j < chunk; j += 16) {  // the low byte, signed; what is left is a multiple of 256
                const __m512i rest = _mm512_load_si512(q + j);
                _mm_store_si128(reinterpret_cast<__m128i*>(bytes + j), _mm512_cvtepi32_epi8(rest));
                _mm512_store_si512(q + j, _mm512_srai_epi32(_mm512_add_epi32(rest, _mm512_set1_epi32(128)), 8));
            }
            for (int64_t k = 0; k < count; ++k) store_plane(bytes, count, k, planes + (k * digits + d) * wide_bytes);
        }
    }
    sum[g] = unit[g] * static_cast<float>(_mm512_reduce_add_epi64(total));
}

void prepare(const Weight& w, const Inputs& in) {
    for (int t = 0; t < in.tokens; ++t) {
        for (int i = 0; i < w.count; ++i) {
            const Segment& s = w.segments[i];
            if (s.grid != Grid::uniform) continue;
            const int64_t at = t * in.groups + s.first_group;
            prepare_segment(s, in.stored + t * w.columns + s.first_column, in.digits, in.unit + at, in.sum + at,
                            in.planes + t * in.plane_bytes + s.first_plane);
        }
    }
}

}  // namespace

const Isa avx512_isa = {
    "avx512", true, plane_bytes, prepare, matmul, scratch_floats, dequantize_rows<unpack_wide>,
};

}  // namespace bitquilt
