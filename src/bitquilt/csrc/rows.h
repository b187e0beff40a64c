// Rows at every instruction set: dequantization, codebook columns, and the product in floating point. Each instruction
// set's file includes this and compiles it with its flags; the compiler vectorizes the plain loops.
#pragma once

#include "scalar.h"

namespace bitquilt {
namespace {

using Unpack = void (*)(const uint8_t* stream, int64_t bytes, int bits, int64_t first, int64_t count, uint8_t* codes);

// `count` codes from code `first` on, a multiple of 8, into bytes; writes up to the next multiple of 64.
[[maybe_unused]] void unpack_words(const uint8_t* stream, int64_t bytes, int bits, int64_t first, int64_t count, uint8_t* codes) {
    const uint64_t mask = (1u << bits) - 1u;
    int64_t at = first / 8 * bits;
    for (int64_t j = 0; j < count; j += 8, at += bits) {
        const uint64_t word = load_word(stream, at, bytes);
        for (int k = 0; k < 8; ++k) codes[j + k] = static_cast<uint8_t>(word >> (bits * k) & mask);
    }
}

// Codebook columns of one row: total[t] += sum_j levels[j][code_j] * x[t][j]. A table look-up per weight.
template <Unpack unpack>
void codebook_row(const Segment& segment, const Inputs& inputs, int64_t columns, int64_t row, float* total) {
    constexpr int64_t piece = 64;
    const uint8_t* stream = segment.codes + row * segment.row_bytes;
    const int bits = segment.bits;
    alignas(64) uint8_t codes[piece];
    alignas(64) float values[piece];
    for (int64_t start = 0; start < segment.width; start += piece) {
        const int64_t count = segment.width - start < piece ? segment.width - start : piece;
        unpack(stream, segment.row_bytes, bits, start, count, codes);
        const float* levels = segment.levels + (start << bits);
        for (int64_t j = 0; j < count; ++j) values[j] = levels[(j << bits) + codes[j]];
        for (int t = 0; t < inputs.tokens; ++t) {
            const float* x = inputs.stored + t * columns + segment.first_column + start;
            float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
            for (int64_t j = 0; j < count; ++j) sum += values[j] * x[j];
            total[t] += sum;
        }
    }
}

// sum_j code_j * x[t][j] of one group for T tokens: sums[t].
using GroupDot = void (*)(const uint8_t* stream, int64_t bytes, int bits, int64_t first, int64_t count,
                          const float* x, int64_t stride, int tokens, float* sums);

// Rows begin..end in floating point: each code is unpacked once for all tokens.
template <Unpack unpack, GroupDot dot>
void float_matmul(const Weight& weight, const Inputs& inputs, int64_t begin, int64_t end, float*, float* out) {
    const int tokens = inputs.tokens;
    for (int64_t row = begin; row < end; ++row) {
        float total[max_tokens] = {};
        for (int s = 0; s < weight.count; ++s) {
            const Segment& segment = weight.segments[s];
            if (segment.grid == Grid::codebook) {
                codebook_row<unpack>(segment, inputs, weight.columns, row, total);
                continue;
            }
            const uint8_t* stream = segment.codes + row * segment.row_bytes;
            for (int64_t g = 0; g < segment.groups; ++g) {
                const int64_t first = g * segment.group_size, left = segment.width - first;
                const int64_t count = left < segment.group_size ? left : segment.group_size;
                float sums[max_tokens];
                dot(stream, segment.row_bytes, segment.bits, first, count,
                    inputs.stored + segment.first_column + first, weight.columns, tokens, sums);
                const int64_t entry = row * segment.groups + g;
                const float step = load(segment.scale, segment.scale_type, entry);
                const float base = segment.offset ? load(segment.offset, segment.scale_type, entry)
                                                  : -step * zero_point(segment, row, g);
                const float* x_sum = inputs.sum + segment.first_group + g;
                for (int t = 0; t < tokens; ++t) total[t] += step * sums[t] + base * x_sum[t * inputs.groups];
            }
        }
        for (int t = 0; t < tokens; ++t) out[t * weight.rows + row] = total[t];
    }
}

// The sums of the activations of each group: what a zero or a lower level is multiplied by.
[[maybe_unused]] void float_prepare(const Weight& weight, const Inputs& inputs) {
    for (int t = 0; t < inputs.tokens; ++t) {
        for (int s = 0; s < weight.count; ++s) {
            const Segment& segment = weight.segments[s];
            if (segment.grid == Grid::codebook) continue;
            const float* x = inputs.stored + t * weight.columns + segment.first_column;
            for (int64_t g = 0; g < segment.groups; ++g) {
                const int64_t end = (g + 1) * segment.group_size;
                double sum = 0.0;
                for (int64_t j = g * segment.group_size; j < end && j < segment.width; ++j) sum += x[j];
                inputs.sum[t * inputs.groups + segment.first_group + g] = static_cast<float>(sum);
            }
        }
    }
}

[[maybe_unused]] void pick_halves(const uint16_t* from, const int32_t* order, int64_t count, bool, uint16_t* to) {
    for (int64_t j = 0; j < count; ++j) to[j] = from[order[j]];
}

// One segment of one row as fp32 in stored order, rounded exactly as the reference rounds.
template <Unpack unpack>
void decode_segment(const Segment& segment, int64_t row, uint8_t* codes, float* out) {
    unpack(segment.codes + row * segment.row_bytes, segment.row_bytes, segment.bits, 0, segment.width, codes);
    if (segment.grid == Grid::codebook) {
        for (int64_t j = 0; j < segment.width; ++j) out[j] = segment.levels[(j << segment.bits) + codes[j]];
        return;
    }
    for (int64_t g = 0; g < segment.groups; ++g) {
        const int64_t first = g * segment.group_size, left = segment.width - first;
        const int64_t end = first + (left < segment.group_size ? left : segment.group_size);
        const int64_t entry = row * segment.groups + g;
        const float step = load(segment.scale, segment.scale_type, entry);
        if (segment.offset) {
            const float base = load(segment.offset, segment.scale_type, entry);
            for (int64_t j = first; j < end; ++j) out[j] = base + step * static_cast<float>(codes[j]);
        } else {
            const float zero = zero_point(segment, row, g);
            for (int64_t j = first; j < end; ++j) out[j] = step * (static_cast<float>(codes[j]) - zero);
        }
    }
}

int64_t outlier_column(const Outliers& outliers, int64_t entry) {
    return outliers.wide ? static_cast<const int32_t*>(outliers.columns)[entry]
                         : static_cast<const int16_t*>(outliers.columns)[entry];
}

template <Unpack unpack>
void dequantize_rows(const Weight& weight, int64_t begin, int64_t end, bool as_stored, float* scratch, void* out,
                     Type type) {
    const bool moves = weight.order && !as_stored;
    const int32_t* place = as_stored ? weight.place : nullptr;
    float* stored = scratch;
    float* original = scratch + weight.columns;
    // The codes of a segment fit behind its floats' end: `original` is free until the row is decoded.
    uint8_t* codes = reinterpret_cast<uint8_t*>(original);
    for (int64_t row = begin; row < end; ++row) {
        for (int s = 0; s < weight.count; ++s) {
            decode_segment<unpack>(weight.segments[s], row, codes, stored + weight.segments[s].first_column);
        }
        float* values = stored;
        if (moves) {
            values = original;
            for (int64_t j = 0; j < weight.columns; ++j) original[weight.order[j]] = stored[j];
        }
        if (weight.outliers.values) {
            for (int64_t e = weight.outliers.rows[row]; e < weight.outliers.rows[row + 1]; ++e) {
                const int64_t column = outlier_column(weight.outliers, e);
                values[place ? place[column] : column] += from_half(weight.outliers.values[e]);
            }
        }
        if (type == Type::f32) {
            std::memcpy(static_cast<float*>(out) + row * weight.columns, values, sizeof(float) * weight.columns);
            continue;
        }
        uint16_t* to = static_cast<uint16_t*>(out) + row * weight.columns;
        if (type == Type::bf16) {
            for (int64_t j = 0; j < weight.columns; ++j) to[j] = to_bfloat(values[j]);
        } else {
            for (int64_t j = 0; j < weight.columns; ++j) to[j] = to_half(values[j]);
        }
    }
}

}  // namespace
}  // namespace bitquilt
