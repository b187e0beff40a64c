// Uniform grids on the stored codes: integer dot products, a scale and a zero per group.
#include <cstring>

#include "avx512_unpack.h"

namespace bitquilt {
namespace avx512 {
namespace {

inline __m512 load16(const void* data, Type type, int64_t index, __mmask16 keep) {
    if (type == Type::f32) return _mm512_maskz_loadu_ps(keep, static_cast<const float*>(data) + index);
    const __m256i raw = _mm256_maskz_loadu_epi16(keep, static_cast<const uint16_t*>(data) + index);
    if (type == Type::f16) return _mm512_cvtph_ps(raw);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}

// The value of one unit of code times one unit of activation, per token and group, and the zeros' share of the row.
template <int T>
void coefficients(const Segment& s, const Inputs& in, int64_t row, int token, const uint8_t* zeros, float* factors,
                  int64_t stride, __m512* y) {
    const __m512 middle = _mm512_set1_ps(static_cast<float>((1 << s.bits) - 1) / 2.0f);
    const int64_t item = s.scale_type == Type::f32 ? 4 : 2;
    for (int64_t g = 0; g < s.groups; g += 16) {
        const int64_t left = s.groups - g, entry = row * s.groups + g;
        fetch(static_cast<const char*>(s.scale) + entry * item + ahead / 8);
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

template <class U>
inline void fetch_chunk(const U& unpack, const uint8_t* at) {
    fetch(at + ahead);
    for (int64_t b = wide_bytes; b < unpack.step; b += wide_bytes) fetch(at + ahead + b);
}

template <class U, int T, int D, int k = 0, class Raw>
inline void add_planes(const U& unpack, const Raw& raw, const int8_t* x, int64_t token_bytes, __m512i (*sums)[D]) {
    const __m512i codes = unpack.template plane<k>(raw);
    for (int t = 0; t < T; ++t) {
        for (int d = 0; d < D; ++d) {
            const __m512i digit = _mm512_loadu_si512(x + t * token_bytes + (k * D + d) * wide_bytes);
            sums[t][d] = _mm512_dpbusd_epi32(sums[t][d], codes, digit);
        }
    }
    if constexpr (k + 1 < U::planes) add_planes<U, T, D, k + 1>(unpack, raw, x, token_bytes, sums);
}

template <class U, int k = 0, class Raw>
inline void unpack_planes(const U& unpack, const Raw& raw, __m512i* codes) {
    codes[k] = unpack.template plane<k>(raw);
    if constexpr (k + 1 < U::planes) unpack_planes<U, k + 1>(unpack, raw, codes);
}

// Products of `count` registers of codes, per token and lane. A chain of dependent products waits 6 cycles for each of
// them and fills the processor's queue, so a chain has at most four.
template <int T, int D, int count>
inline void few_products(const __m512i* codes, const int8_t* x, int64_t token_bytes, __m512* values) {
    constexpr int chains = count > 4 ? 2 : 1;
    for (int t = 0; t < T; ++t, x += token_bytes) {
        __m512i sums[chains][D];
        for (auto& chain : sums) for (auto& sum : chain) sum = _mm512_setzero_si512();
        for (int i = 0; i < count; ++i) {
            for (int d = 0; d < D; ++d) {
                __m512i& sum = sums[i % chains][d];
                sum = _mm512_dpbusd_epi32(sum, codes[i], _mm512_loadu_si512(x + (i * D + d) * wide_bytes));
            }
        }
        for (int d = 0; d < D && chains == 2; ++d) sums[0][d] = _mm512_add_epi32(sums[0][d], sums[chains - 1][d]);
        values[t] = to_float<D>(sums[0]);
    }
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
            fetch_chunk(unpack, at);
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
    const __m512 inverse = _mm512_set1_ps(1.0f / static_cast<float>(s.group_size));
    const __m512 lanes = _mm512_cvtepi32_ps(_mm512_mullo_epi32(
        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), _mm512_set1_epi32(4 * U::planes)));
    const __m512 half = _mm512_add_ps(lanes, _mm512_set1_ps(0.5f));
    __m512i lane_group = _mm512_cvttps_epi32(_mm512_mul_ps(half, inverse));
    const auto add = [&](const auto& raw, int64_t first) {
        __m512i codes[U::planes];
        __m512 values[T];
        unpack_planes(unpack, raw, codes);
        few_products<T, D, U::planes>(codes, x, in.plane_bytes, values);
        for (int t = 0; t < T; ++t) {
            const __m512 factor = _mm512_permutexvar_ps(lane_group, _mm512_loadu_ps(factors + t * stride + first));
            y[t] = _mm512_fmadd_ps(values[t], factor, y[t]);
        }
    };
    int64_t c = 0;
    if (chunk % s.group_size == 0) {  // the same lanes for every chunk; no checks while loads stay inside the tensor
        const int64_t groups = chunk / s.group_size, room = s.codes_end - at - U::bytes_read + unpack.step;
        const int64_t whole = room > 0 ? (room / unpack.step < chunks ? room / unpack.step : chunks) : 0;
        if (whole > 0) {  // the next chunk is loaded and sorted before this one's products: 10 % at 3 bits
            auto next = unpack.raw(at);
            for (; c < whole; ++c, x += chunk_bytes) {
                const auto raw = next;
                fetch_chunk(unpack, at);
                at += unpack.step;
                if (c + 1 < whole) next = unpack.raw(at);
                add(raw, c * groups);
            }
        }
    }
    for (; c < chunks; ++c, at += unpack.step, x += chunk_bytes) {
        const int64_t first = c * chunk / s.group_size;
        const float offset = static_cast<float>(c * chunk - first * s.group_size);
        lane_group = _mm512_cvttps_epi32(_mm512_mul_ps(_mm512_add_ps(half, _mm512_set1_ps(offset)), inverse));
        add(unpack.raw(at, s.codes_end - at), first);
    }
}

using SegmentRow = void (*)(const Segment&, const Inputs&, int64_t, int, const uint8_t*, float*, int64_t, __m512*);

template <int T, int D>
SegmentRow choose(const Segment& s) {
    if (plane_count(s) == 8) return s.bits == 1 ? segment_row<Planes<1>, T, D> : segment_row<Triplets, T, D>;
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
            fetch(s.zero + group * s.zero_bytes + first + row_block / 8 * s.bits);  // the next block's
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

struct Choice {
    const Segment* segment;
    SegmentRow one, several;
};

template <int D>
void block_digits(const Weight& w, const Inputs& in, int64_t begin, int64_t end, float* factors, float* totals) {
    // Lanes past the last group multiply a sum of zero: their factors must be finite.
    const int64_t stride = in.groups + 2 * group_padding;
    std::memset(factors, 0, sizeof(float) * tile * stride);
    uint8_t* zeros = reinterpret_cast<uint8_t*>(factors + tile * stride);
    Choice choices[max_segments];
    int count = 0;
    for (int i = 0; i < w.count; ++i) {
        const Segment& s = w.segments[i];
        if (s.grid != Grid::uniform) continue;
        choices[count++] = {&s, choose<1, D>(s), choose<tile, D>(s)};
        if (s.zero) load_zeros(s, begin, zeros + s.first_group * row_block, up(s.groups, group_padding));
    }
    for (int64_t row = begin; row < end; ++row) {
        for (int token = 0; token < in.tokens;) {
            const int tokens = token + tile <= in.tokens ? tile : 1;
            __m512 y[tile];
            for (int t = 0; t < tokens; ++t) y[t] = _mm512_setzero_ps();
            for (int i = 0; i < count; ++i) {
                const Segment& s = *choices[i].segment;
                const int64_t padded = up(s.groups, group_padding);
                const uint8_t* row_zeros = zeros + s.first_group * row_block + (row - begin) * padded;
                (tokens == tile ? choices[i].several : choices[i].one)(s, in, row, token, row_zeros,
                                                                       factors + s.first_group, stride, y);
            }
            for (int t = 0; t < tokens; ++t, ++token) {
                totals[token * row_block + row - begin] += _mm512_reduce_add_ps(y[t]);
            }
        }
    }
}

}  // namespace

void uniform_block(const Weight& w, const Inputs& in, int64_t begin, int64_t end, float* scratch, float* totals) {
    const auto run = in.digits == 1 ? block_digits<1> : in.digits == 2 ? block_digits<2> : block_digits<3>;
    run(w, in, begin, end, scratch, totals);
}

int64_t uniform_scratch(const Weight&, const Inputs& in) {
    return tile * (in.groups + 2 * group_padding) + in.groups * row_block / 4 + group_padding;
}

}  // namespace avx512
}  // namespace bitquilt
