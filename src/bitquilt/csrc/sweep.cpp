// Elementwise arithmetic is torch's, operation by operation, so that codes and values equal those of the Python sweep.
#include "sweep.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>

#include "clones.h"
#include "pool.h"
#include "scalar.h"

namespace bitquilt {
namespace {

// Rows of one slab: 128 columns of them take 32 KB and stay in the first cache.
constexpr int64_t slab = 64;
constexpr double tiny = 1e-30;
constexpr int gain_count = 127;

void check(const SweepBlock& block, int64_t first, int64_t last) {
    if (block.rows < 0 || block.width < 1 || block.stride < block.width || first < 0 || last < first ||
        last > block.width || !block.kept != !block.remainder) {
        throw std::invalid_argument("columns " + std::to_string(first) + " to " + std::to_string(last) + " of a block of " +
                                    std::to_string(block.width) + " columns of " + std::to_string(block.rows) +
                                    " rows; wanted columns inside the block, and a remainder where weights are kept");
    }
}

BITQUILT_EVERY_ISA
void round_steps(const float* __restrict w, const UniformSteps& grid, int64_t n, uint8_t* __restrict codes,
                 float* __restrict values) {
    const float top = static_cast<float>((1 << grid.bits) - 1), middle = top / 2.0f, ceiling = (top + 1.0f) / 2.0f;
    const float *scale = grid.scale, *zero = grid.zero;
    if (!zero) {
        for (int64_t i = 0; i < n; ++i) {
            const float code = std::min(std::max(std::floor(w[i] / scale[i] + ceiling), 0.0f), top);
            codes[i] = static_cast<uint8_t>(code);
            values[i] = scale[i] * (code - middle);
        }
    } else if (grid.two_levels) {
        for (int64_t i = 0; i < n; ++i) {
            const float code = w[i] >= zero[i] + 0.5f * scale[i] ? 1.0f : 0.0f;
            codes[i] = static_cast<uint8_t>(code);
            values[i] = zero[i] + scale[i] * code;
        }
    } else {
        for (int64_t i = 0; i < n; ++i) {
            const float code = std::min(std::max(std::nearbyint(w[i] / scale[i]) + zero[i], 0.0f), top);
            codes[i] = static_cast<uint8_t>(code);
            values[i] = scale[i] * (code - zero[i]);
        }
    }
}

BITQUILT_EVERY_ISA
void divide_errors(const float* __restrict w, const float* __restrict values, float pivot, int64_t n,
                   float* __restrict errors) {
    for (int64_t i = 0; i < n; ++i) errors[i] = (w[i] - values[i]) / pivot;
}

// Rounds rows begin..end of column j with round(weights, rows, codes, values), and finds their errors.
template <class Round>
void round_rows(const SweepBlock& block, int64_t j, int64_t begin, int64_t end, const Round& round) {
    const int64_t at = j * block.rows + begin, n = end - begin;
    const float* w = block.columns + at;
    float* values = block.quantized + at;
    if (!block.kept) {
        round(w, n, block.codes + at, values);
    } else {
        float masked[slab];
        const uint8_t* kept = block.kept + at;
        for (int64_t i = 0; i < n; ++i) masked[i] = kept[i] ? 0.0f : w[i];
        round(masked, n, block.codes + at, values);
        uint16_t* remainder = block.remainder + at;
        for (int64_t i = 0; i < n; ++i) {
            remainder[i] = to_half(kept[i] ? w[i] - values[i] : 0.0f);
            values[i] += from_half(remainder[i]);
        }
    }
    divide_errors(w, values, block.upper[j * block.stride + j], n, block.errors + at);
}

BITQUILT_EVERY_ISA
void feed_back_apart(const SweepBlock& block, int64_t column, int64_t begin, int64_t end) {
    const float* error = block.errors + column * block.rows;
    const float* upper = block.upper + column * block.stride;
    for (int64_t k = column + 1; k < block.width; ++k) {
        float* __restrict to = block.columns + k * block.rows;
        for (int64_t i = begin; i < end; ++i) to[i] -= upper[k] * error[i];
    }
}

// As torch's `addr_`: fused but for what is left of a row after its last whole pair of vectors.
void feed_back(const SweepBlock& block, int64_t column, int64_t begin, int64_t end) {
    const int64_t fused = std::clamp(block.fused, begin, end);
    feed_back_fused(block, column, begin, fused);
    if (fused < end) feed_back_apart(block, column, fused, end);
}

template <class Work>
void over_slabs(int64_t rows, int threads, const Work& work, int64_t size = slab) {
    const int count = static_cast<int>((rows + size - 1) / size);
    parallel_for_torch(count, threads, [&](int i) { work(i * size, std::min(rows, (i + 1) * size)); });
}

// Values as their nearest levels, the lower one of a tie; `middles` [count - 1]. Every level is compared: with 64 levels
// that takes a third of a binary search's time, which no vector does.
BITQUILT_EVERY_ISA
void nearest_levels(const float* __restrict values, int64_t n, const float* levels, const float* middles, int64_t count,
                    float* __restrict chosen) {
    for (int64_t i = 0; i < n; ++i) chosen[i] = levels[0];
    for (int64_t k = 0; k + 1 < count; ++k) {
        const float middle = middles[k], level = levels[k + 1];
        for (int64_t i = 0; i < n; ++i) chosen[i] = values[i] > middle ? level : chosen[i];
    }
}

BITQUILT_EVERY_ISA
void nearest_codes(const float* __restrict values, int64_t n, const float* middles, int64_t count,
                   uint8_t* __restrict codes) {
    for (int64_t i = 0; i < n; ++i) codes[i] = 0;
    for (int64_t k = 0; k + 1 < count; ++k) {
        const float middle = middles[k];
        for (int64_t i = 0; i < n; ++i) codes[i] = static_cast<uint8_t>(codes[i] + (values[i] > middle ? 1 : 0));
    }
}

void check_levels(int64_t count) {
    if (count < 2 || count > 256) {
        throw std::invalid_argument("a table of " + std::to_string(count) + " levels; wanted 2 to 256");
    }
}

void middles_of(const float* levels, int64_t count, float* middles) {
    for (int64_t k = 0; k + 1 < count; ++k) middles[k] = (levels[k + 1] + levels[k]) / 2.0f;
}

// Fits the gain of one column to a table. Terms are rounded to fp32 as in `SharedTable.fit`, sums are in double.
class GainFit {
  public:
    GainFit(int64_t rows, const float* gain_values)
        : rows_(rows),
          gain_values_(gain_values),
          scaled_(new float[static_cast<size_t>(rows)]),
          chosen_(new float[static_cast<size_t>(rows)]) {}

    uint8_t fit(const float* w, const float* counted, const SharedLevels& table) {
        float middles[256];
        middles_of(table.levels, table.count, middles);
        float gain = root_mean_square(w, counted, rows_) / table.spread;
        for (int refit = 0; refit < 2; ++refit) {
            choose(w, gain, table, middles);
            gain *= static_cast<float>(least_squares(w, counted, chosen_.get(), gain, rows_));
        }
        const int nearest = nearest_gain(gain);
        double least = std::numeric_limits<double>::infinity();
        int best = 0;
        for (int offset : {0, -1, 1, -2, 2}) {
            const int candidate = std::clamp(nearest + offset, 0, gain_count - 1);
            const float value = gain_values_[candidate];
            choose(w, value, table, middles);
            const double error = squared_error(w, counted, chosen_.get(), value, rows_);
            if (error < least) {
                least = error;
                best = candidate;
            }
        }
        return static_cast<uint8_t>(best);
    }

  private:
    // The levels nearest to the column over its gain.
    void choose(const float* w, float gain, const SharedLevels& table, const float* middles) {
        scale_down(w, gain, rows_, scaled_.get());
        nearest_levels(scaled_.get(), rows_, table.levels, middles, table.count, chosen_.get());
    }

    BITQUILT_EVERY_ISA
    static float root_mean_square(const float* w, const float* counted, int64_t n) {
        double total = 0.0, mass = 0.0;
#pragma omp simd reduction(+ : total, mass)
        for (int64_t i = 0; i < n; ++i) {
            total += static_cast<double>(w[i] * w[i] * counted[i]);
            mass += static_cast<double>(counted[i]);
        }
        return static_cast<float>(std::sqrt(total / std::max(mass, tiny)));
    }

    BITQUILT_EVERY_ISA
    static void scale_down(const float* w, float gain, int64_t n, float* __restrict to) {
        const float divisor = std::max(gain, static_cast<float>(tiny));
        for (int64_t i = 0; i < n; ++i) to[i] = w[i] / divisor;
    }

    // What the gain is to be multiplied by, for levels chosen with it.
    BITQUILT_EVERY_ISA
    static double least_squares(const float* w, const float* counted, const float* levels, float gain, int64_t n) {
        double above = 0.0, below = 0.0;
#pragma omp simd reduction(+ : above, below)
        for (int64_t i = 0; i < n; ++i) {
            const float value = levels[i] * gain;
            above += static_cast<double>(counted[i] * w[i] * value);
            below += static_cast<double>(counted[i] * (value * value));
        }
        return std::max(above / std::max(below, tiny), 0.0);
    }

    BITQUILT_EVERY_ISA
    static double squared_error(const float* w, const float* counted, const float* levels, float gain, int64_t n) {
        double total = 0.0;
#pragma omp simd reduction(+ : total)
        for (int64_t i = 0; i < n; ++i) {
            const float error = w[i] - levels[i] * gain;
            total += static_cast<double>(error * error * counted[i]);
        }
        return total;
    }

    // The nearest of the gains' values, the even one of a tie, which is how torch rounds.
    int nearest_gain(float gain) const {
        const float* end = gain_values_ + gain_count;
        const int above = static_cast<int>(std::lower_bound(gain_values_, end, gain) - gain_values_);
        if (above == gain_count) return gain_count - 1;
        if (above == 0) return 0;
        const double low = gain_values_[above - 1], high = gain_values_[above], middle = (low + high) / 2.0;
        if (gain == middle) return above % 2 ? above - 1 : above;
        return gain < middle ? above - 1 : above;
    }

    int64_t rows_;
    const float* gain_values_;
    std::unique_ptr<float[]> scaled_, chosen_;
};

}  // namespace

void sweep_uniform(const SweepBlock& block, int64_t first, int64_t last, const UniformSteps& grid, int threads) {
    check(block, first, last);
    if (grid.bits < 1 || grid.bits > 8) {
        throw std::invalid_argument("codes of " + std::to_string(grid.bits) + " bits; wanted 1 to 8");
    }
    over_slabs(block.rows, threads, [&](int64_t begin, int64_t end) {
        const UniformSteps steps{grid.scale + begin, grid.zero ? grid.zero + begin : nullptr, grid.two_levels, grid.bits};
        const auto round = [&](const float* w, int64_t n, uint8_t* codes, float* values) {
            round_steps(w, steps, n, codes, values);
        };
        for (int64_t j = first; j < last; ++j) {
            round_rows(block, j, begin, end, round);
            feed_back(block, j, begin, end);
        }
    });
}

void fit_gains(const float* columns, const float* counted, int64_t width, int64_t rows, const SharedLevels& table,
               const float* gain_values, uint8_t* gains, int threads) {
    check_levels(table.count);
    // One piece per thread, so that the working memory is allocated here, where a failure can be reported.
    const int pieces = static_cast<int>(std::min<int64_t>(std::max(threads, 1), std::max<int64_t>(width, 1)));
    std::vector<GainFit> fits;
    for (int piece = 0; piece < pieces; ++piece) fits.emplace_back(rows, gain_values);
    parallel_for_torch(pieces, pieces, [&](int piece) {
        for (int64_t j = width * piece / pieces; j < width * (piece + 1) / pieces; ++j) {
            gains[j] = fits[static_cast<size_t>(piece)].fit(columns + j * rows, counted + j * rows, table);
        }
    });
}

void sweep_shared(const SweepBlock& block, const std::vector<SharedLevels>& tables, const int32_t* table_of,
                  const float* counted, const float* gain_values, uint8_t* gains, int threads) {
    check(block, 0, block.width);
    for (const SharedLevels& table : tables) check_levels(table.count);
    for (int64_t j = 0; j < block.width; ++j) {
        if (table_of[j] < 0 || static_cast<size_t>(table_of[j]) >= tables.size()) {
            throw std::invalid_argument("column " + std::to_string(j) + " has table " + std::to_string(table_of[j]) +
                                        " of " + std::to_string(tables.size()) + "; wanted one of them");
        }
    }
    GainFit fit(block.rows, gain_values);
    for (int64_t j = 0; j < block.width; ++j) {
        const SharedLevels& table = tables[static_cast<size_t>(table_of[j])];
        gains[j] = fit.fit(block.columns + j * block.rows, counted + j * block.rows, table);
        float levels[256], middles[256];
        for (int64_t k = 0; k < table.count; ++k) levels[k] = gain_values[gains[j]] * table.levels[k];
        middles_of(levels, table.count, middles);
        const auto round = [&](const float* w, int64_t n, uint8_t* codes, float* values) {
            nearest_codes(w, n, middles, table.count, codes);
            for (int64_t i = 0; i < n; ++i) values[i] = levels[codes[i]];
        };
        over_slabs(block.rows, threads, [&](int64_t begin, int64_t end) {
            round_rows(block, j, begin, end, round);
            feed_back(block, j, begin, end);
        });
    }
}

void nearest(const float* values, int64_t n, const float* levels, int64_t count, float* chosen, int threads) {
    check_levels(count);
    float middles[256];
    middles_of(levels, count, middles);
    over_slabs(n, threads, [&](int64_t begin, int64_t end) {
        nearest_levels(values + begin, end - begin, levels, middles, count, chosen + begin);
    }, 1024);
}

void encode(const float* columns, int64_t width, int64_t rows, const float* levels, int64_t count, uint8_t* codes,
            int threads) {
    check_levels(count);
    over_slabs(width, threads, [&](int64_t first, int64_t last) {
        float middles[256];
        for (int64_t j = first; j < last; ++j) {
            middles_of(levels + j * count, count, middles);
            nearest_codes(columns + j * rows, rows, middles, count, codes + j * rows);
        }
    }, 8);
}

}  // namespace bitquilt
