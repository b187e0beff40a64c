// Unpacks stored codes into bytes in AVX-512 registers, in one of three ways, always 16 lanes of 4 bytes:
//   planes  1, 2, 4 bits: one GFNI bit matrix product (shift and mask at once) turns 64 stored bytes into 64 codes,
//           every 8/bits-th column of the chunk; the activations are stored in that order once per call.
//   triplets 3 bits: eight codes are three bytes; six of the codes are inside a byte. The first, second and third bytes of
//           64 triplets are put into a register each; then every code is one GFNI product, of two merged registers for
//           the two that cross bytes. 19 operations per 512 codes, every eighth column of the chunk.
//   words   any width: a byte permutation gives each 64-bit word its 8 codes, `vpmultishiftqb` shifts each to its
//           byte, a mask. 3 operations per 64 codes, columns in order.
#pragma once

#include "avx512.h"

namespace bitquilt {
namespace avx512 {
namespace {

// Planes of a chunk: a lane adds 4 * planes neighbouring columns, which must share a group. Triplets are worth it where
// no more than a third of their columns is padding.
[[maybe_unused]] inline int plane_count(const Segment& s) {
    const bool triplets = s.bits == 3 && 2 * up(s.width, 8 * wide_bytes) <= 3 * s.width;
    const int planes = s.bits == 1 || s.bits == 2 || s.bits == 4 ? 8 / s.bits : triplets ? 8 : 1;
    return s.groups == 1 || s.group_size % (4 * planes) == 0 ? planes : 1;
}

inline __m512i load_bytes(const uint8_t* at, int64_t left) {
    if (left >= wide_bytes) return _mm512_loadu_si512(at);
    return left > 0 ? _mm512_maskz_loadu_epi8((1ull << left) - 1ull, at) : _mm512_setzero_si512();
}

// For each width: which byte of a chunk goes where, and by how many bits the codes are shifted.
struct WordTables {
    alignas(64) uint8_t spread[9][64];
    alignas(64) uint8_t shift[9][64];
};

constexpr WordTables make_word_tables() {
    WordTables tables{};
    for (int bits = 1; bits <= 8; ++bits) {
        for (int i = 0; i < 64; ++i) {
            const int source = i / 8 * bits + i % 8;
            tables.spread[bits][i] = static_cast<uint8_t>(source < 64 ? source : 63);
            tables.shift[bits][i] = static_cast<uint8_t>(bits * (i % 8));
        }
    }
    return tables;
}

constexpr WordTables word_tables = make_word_tables();

struct WordControl {
    __m512i spread, shift, mask;
    explicit WordControl(int bits)
        : spread(_mm512_load_si512(word_tables.spread[bits])),
          shift(_mm512_load_si512(word_tables.shift[bits])),
          mask(_mm512_set1_epi8(static_cast<char>((1 << bits) - 1))) {}
    __m512i codes(__m512i raw) const {
        return _mm512_and_si512(_mm512_multishift_epi64_epi8(shift, _mm512_permutexvar_epi8(spread, raw)), mask);
    }
};

// A chunk of 64 codes at any width. `load`: the smallest of 16, 32, 64 bytes that holds it, since a load that
// crosses a cache line costs two.
template <int load>
struct Words : WordControl {
    static constexpr int planes = 1;
    int64_t step;
    explicit Words(int bits) : WordControl(bits), step(8 * bits) {}
    __m512i raw(const uint8_t* at, int64_t left) const {
        return left < load ? load_bytes(at, left) : raw(at);
    }
    __m512i raw(const uint8_t* at) const {
        if constexpr (load == 16) return _mm512_castsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
        if constexpr (load == 32) {
            return _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
        }
        return _mm512_loadu_si512(at);
    }
    static constexpr int bytes_read = load;
    template <int k>
    __m512i plane(__m512i raw) const { return codes(raw); }
};

// `count` codes from code `first` on, a multiple of 8, into bytes; writes up to the next multiple of 64.
[[maybe_unused]] inline void unpack_bytes(const uint8_t* stream, int64_t bytes, int bits, int64_t first, int64_t count,
                                          uint8_t* codes) {
    const WordControl control(bits);
    int64_t at = first / 8 * bits;
    for (int64_t j = 0; j < count; j += 64, at += 8 * bits) {
        _mm512_storeu_si512(codes + j, control.codes(load_bytes(stream + at, bytes - at)));
    }
}

// The matrix that moves bits first .. first + count of each byte to its low end: byte 7 - i selects the bits that make bit i.
constexpr long long bit_field(int first, int count) {
    unsigned long long matrix = 0;
    for (int i = 0; i < count; ++i) matrix |= (1ull << (first + i)) << (8 * (7 - i));
    return static_cast<long long>(matrix);
}

template <int bits>
struct Planes {
    static constexpr int planes = 8 / bits;
    static constexpr int64_t step = wide_bytes;
    static constexpr int bytes_read = wide_bytes;
    explicit Planes(int) {}
    __m512i raw(const uint8_t* at, int64_t left) const { return load_bytes(at, left); }
    __m512i raw(const uint8_t* at) const { return _mm512_loadu_si512(at); }
    template <int k>
    __m512i plane(__m512i raw) const {
        if constexpr (k == 0) return _mm512_and_si512(raw, _mm512_set1_epi8(static_cast<char>((1 << bits) - 1)));
        return _mm512_gf2p8affine_epi64_epi8(raw, _mm512_set1_epi64(bit_field(k * bits, bits)), 0);
    }
};

// The place of byte `part` of triplet i: byte 3 i + part of three registers one after the other.
struct TripletTables {
    alignas(64) uint8_t place[3][64];
    uint64_t from_second[3], from_third[3];
};

constexpr TripletTables make_triplet_tables() {
    TripletTables tables{};
    for (int part = 0; part < 3; ++part) {
        for (int i = 0; i < 64; ++i) {
            const int at = 3 * i + part;
            tables.place[part][i] = static_cast<uint8_t>(at % 64);
            if (at >= 64) tables.from_second[part] |= 1ull << i;
            if (at >= 128) tables.from_third[part] |= 1ull << i;
        }
    }
    return tables;
}

constexpr TripletTables triplet_tables = make_triplet_tables();

// Codes a to h of eight columns, as three bytes hold them: c c b b b a a a, f e e e d d d c, h h h g g g f f.
struct Triplets {
    static constexpr int planes = 8;
    static constexpr int64_t step = 3 * wide_bytes;
    static constexpr int64_t bytes_read = step;
    struct Raw {
        __m512i first, second, third;
    };
    __m512i place[3];
    explicit Triplets(int) {
        for (int part = 0; part < 3; ++part) place[part] = _mm512_load_si512(triplet_tables.place[part]);
    }
    __m512i sorted(int part, __m512i a, __m512i b, __m512i c) const {
        const __m512i one = _mm512_permutexvar_epi8(place[part], a);
        const __m512i two = _mm512_mask_permutexvar_epi8(one, triplet_tables.from_second[part], place[part], b);
        return _mm512_mask_permutexvar_epi8(two, triplet_tables.from_third[part], place[part], c);
    }
    Raw sorted(__m512i a, __m512i b, __m512i c) const {
        return {sorted(0, a, b, c), sorted(1, a, b, c), sorted(2, a, b, c)};
    }
    Raw raw(const uint8_t* at, int64_t left) const {
        return sorted(load_bytes(at, left), load_bytes(at + 64, left - 64), load_bytes(at + 128, left - 128));
    }
    Raw raw(const uint8_t* at) const {
        __m512i a = _mm512_loadu_si512(at), b = _mm512_loadu_si512(at + 64), c = _mm512_loadu_si512(at + 128);
        asm("" : "+v"(a), "+v"(b), "+v"(c));  // gcc 12 would load each three times
        return sorted(a, b, c);
    }
    template <int k>
    __m512i plane(const Raw& raw) const {
        // Bits 6 and 7 of the first byte and bit 0 of the second; bit 7 of the second and bits 0 and 1 of the third.
        constexpr long long third_code = 0x4080010000000000, sixth_code = static_cast<long long>(0x8001020000000000);
        constexpr int select = 0xca;  // the second argument's bits where the first has ones, else the third's
        if constexpr (k == 0) return _mm512_and_si512(raw.first, _mm512_set1_epi8(7));
        if constexpr (k == 1) return field(raw.first, bit_field(3, 3));
        if constexpr (k == 2) {
            const __m512i high = _mm512_set1_epi8(static_cast<char>(0xc0));
            return field(_mm512_ternarylogic_epi64(high, raw.first, raw.second, select), third_code);
        }
        if constexpr (k == 3) return field(raw.second, bit_field(1, 3));
        if constexpr (k == 4) return field(raw.second, bit_field(4, 3));
        if constexpr (k == 5) {
            const __m512i high = _mm512_set1_epi8(static_cast<char>(0x80));
            return field(_mm512_ternarylogic_epi64(high, raw.second, raw.third, select), sixth_code);
        }
        if constexpr (k == 6) return field(raw.third, bit_field(2, 3));
        return field(raw.third, bit_field(5, 3));
    }
    static __m512i field(__m512i bytes, long long matrix) {
        return _mm512_gf2p8affine_epi64_epi8(bytes, _mm512_set1_epi64(matrix), 0);
    }
};

}  // namespace
}  // namespace avx512
}  // namespace bitquilt
