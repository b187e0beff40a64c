// Small conversions, included by every instruction set: everything is static, so each file keeps its own copy.
#pragma once

#include <cstring>

#include "kernels.h"

namespace bitquilt {
namespace {

inline float from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline uint32_t to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

// fp16 -> fp32 without branches, so that loops over it become vector code. Multiplying by 2^112 moves the exponent
// from fp16's bias to fp32's and makes subnormals normal; Inf and NaN are recognised by their size.
inline float from_half(uint16_t half) {
    const uint32_t shifted = static_cast<uint32_t>(half & 0x7fff) << 13;
    const uint32_t special = shifted >= 0x0f800000u ? 0x7f800000u : 0u;
    const uint32_t value = to_bits(from_bits(shifted) * from_bits(0x77800000u)) | special;
    return from_bits(value | static_cast<uint32_t>(half & 0x8000) << 16);
}

inline float from_bfloat(uint16_t value) { return from_bits(static_cast<uint32_t>(value) << 16); }

// Round to nearest, ties to even, as torch does.
inline uint16_t to_bfloat(float value) {
    const uint32_t bits = to_bits(value);
    const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

inline uint16_t to_half(float value) {
    const uint32_t sign = to_bits(value) >> 16 & 0x8000u;
    const uint32_t bits = to_bits(value) & 0x7fffffffu;
    if (bits > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
    if (bits >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and above round to infinity
    if (bits < 0x38800000u) {  // subnormal: adding 0.5 leaves the rounded multiple of 2^-24 in the low bits
        return static_cast<uint16_t>(sign | (to_bits(from_bits(bits) + 0.5f) - 0x3f000000u));
    }
    return static_cast<uint16_t>(sign | ((bits - 0x38000000u + 0xfffu + (bits >> 13 & 1u)) >> 13));
}

inline float load(const void* data, Type type, int64_t index) {
    if (type == Type::f32) return static_cast<const float*>(data)[index];
    const uint16_t value = static_cast<const uint16_t*>(data)[index];
    return type == Type::f16 ? from_half(value) : from_bfloat(value);
}

// Up to eight bytes of a stream, little-endian; never reads past `bytes`.
inline uint64_t load_word(const uint8_t* stream, int64_t at, int64_t bytes) {
    uint64_t word = 0;
    const int64_t left = bytes - at;
    if (left >= 8) {
        std::memcpy(&word, stream + at, 8);
    } else if (left > 0) {
        std::memcpy(&word, stream + at, static_cast<size_t>(left));
    }
    return word;
}

// One integer zero: row `row` of group `group`.
inline int zero_at(const Segment& segment, int64_t row, int64_t group) {
    const int64_t bit = row * segment.bits;
    const uint8_t* stream = segment.zero + group * segment.zero_bytes;
    const uint64_t word = load_word(stream, bit / 8, segment.zero_bytes);
    return static_cast<int>(word >> (bit % 8) & ((1u << segment.bits) - 1u));
}

// The level of code 0 divided by the step, negated: what is subtracted from every code of the group.
inline float zero_point(const Segment& segment, int64_t row, int64_t group) {
    if (segment.zero) return static_cast<float>(zero_at(segment, row, group));
    return static_cast<float>((1 << segment.bits) - 1) / 2.0f;
}

}  // namespace
}  // namespace bitquilt
