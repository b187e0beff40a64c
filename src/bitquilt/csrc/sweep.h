// The GPTQ sweep inside one block of columns; `sweep` in layer/gptq_sweep.py is the definition. Rows are independent
// given U and the grids: threads take slabs of rows through many columns.
#pragma once

#include <cstdint>
#include <vector>

namespace bitquilt {

// Matrices are [width, rows]: a column of the weight is contiguous. Row `i` of U's block begins at upper + i * stride.
struct SweepBlock {
    float* columns;           // errors of earlier columns added
    float* quantized;
    uint8_t* codes;
    float* errors;            // what later columns repair: (columns - quantized) / U_jj
    const float* upper;
    int64_t stride, width, rows;
    const uint8_t* kept;      // weights kept in fp16 with the value that they have then, 0 or 1; or null
    uint16_t* remainder;      // fp16: what the code leaves of them; null where `kept` is
    int64_t fused;            // rows whose feedback rounds product and difference at once where the processor can
};

// Equal steps per row. `zero` null: steps around 0. `two_levels`: zero + scale * code.
struct UniformSteps {
    const float* scale;
    const float* zero;
    bool two_levels;
    int bits;
};

// A table of `count` ascending levels that columns share, and the root mean square of a column whose gain is about 1.
struct SharedLevels {
    const float* levels;
    int64_t count;
    float spread;
};

// The columns first..last of the block, one group, and their effect on the rest of the block.
// Throws std::invalid_argument for impossible sizes.
void sweep_uniform(const SweepBlock& block, int64_t first, int64_t last, const UniformSteps& grid, int threads);

// The gains of columns [width, rows] that hold the table times a gain, which is gain_values[gains[j]]: `gain_values` are
// the 127 values of float8 from 0 to 448, ascending. `counted` [width, rows] >= 0 weighs the squared errors.
// `SharedTable.fit` in layer/grids/shared_levels.py is the definition. Throws std::invalid_argument for impossible tables.
void fit_gains(const float* columns, const float* counted, int64_t width, int64_t rows, const SharedLevels& table,
               const float* gain_values, uint8_t* gains, int threads);

// All columns of the block; column j holds tables[table_of[j]] times a gain, which is fitted as by `fit_gains` when j is
// reached. Throws std::invalid_argument for impossible sizes or tables.
void sweep_shared(const SweepBlock& block, const std::vector<SharedLevels>& tables, const int32_t* table_of,
                  const float* counted, const float* gain_values, uint8_t* gains, int threads);

// Values [n] as the nearest of `count` ascending levels, the lower one of a tie.
void nearest(const float* values, int64_t n, const float* levels, int64_t count, float* chosen, int threads);

// Codes of columns [width, rows]; each has its own `count` ascending levels, [width, count].
void encode(const float* columns, int64_t width, int64_t rows, const float* levels, int64_t count, uint8_t* codes,
            int threads);

// Subtracts upper[k] * errors of the column from every later column k of the block, over rows begin..end; compiled so
// that product and difference are rounded at once.
void feed_back_fused(const SweepBlock& block, int64_t column, int64_t begin, int64_t end);

}  // namespace bitquilt
