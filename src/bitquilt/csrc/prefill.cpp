// Many tokens: some rows of the weight at a time are unpacked to bf16 and multiplied on the matrix units.
#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>

#include "amx.h"
#include "handle.h"
#include "pool.h"

namespace bitquilt {
namespace {

// Rows of a piece: their sums with 512 tokens take 0.75 of 2 MiB of L2 cache. From 256 to 512 all are equally fast.
constexpr int64_t most_rows = 384;

int64_t up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// As many pieces as a multiple of the threads.
int64_t rows_of_piece(int64_t rows, int threads) {
    const int64_t pieces = up((rows + most_rows - 1) / most_rows, threads);
    return std::max<int64_t>(up((rows + pieces - 1) / std::max<int64_t>(pieces, 1), amx::panel_rows), amx::panel_rows);
}

}  // namespace

int64_t Handle::prefill_bytes(int64_t tokens, int threads) const {
    check_threads(threads);
    const int64_t rows = rows_of_piece(this->rows(), threads);
    return amx::packed_bytes(tokens, columns()) + threads * (up(2 * rows * columns(), 64) + amx::sums_bytes(rows, tokens));
}

void Handle::prefill(const void* x, int64_t tokens, int64_t columns, const float* bias, void* out, void* memory,
                     int threads) const {
    check_threads(threads);
    if (!amx::usable()) throw std::invalid_argument("this processor, or its system, has no matrix units to use");
    if (columns != this->columns()) {
        throw std::invalid_argument("x has " + std::to_string(columns) + " features; the layer takes " +
                                    std::to_string(this->columns()));
    }
    if (tokens < 1) throw std::invalid_argument("x has " + std::to_string(tokens) + " tokens; wanted at least 1");
    const auto* from = static_cast<const uint16_t*>(x);
    char* const packed = static_cast<char*>(memory);
    const int64_t packed_bytes = amx::packed_bytes(tokens, columns);
    parallel_for_torch(static_cast<int>(up(tokens, 32) / 16), threads,
                       [&](int tile) { amx::pack(from, tokens, columns, tile, packed); });
    const int64_t rows = rows_of_piece(this->rows(), threads), pieces = (this->rows() + rows - 1) / rows;
    const int64_t slot_bytes = (prefill_bytes(tokens, threads) - packed_bytes) / threads;
    std::atomic<int64_t> next{0};
    parallel_for_torch(threads, threads, [&](int slot) {
        char* const weight = packed + packed_bytes + slot * slot_bytes;
        for (int64_t piece = next++; piece < pieces; piece = next++) {
            const int64_t first = piece * rows, last = std::min(first + rows, this->rows());
            dequantize(first, last, true, weight, Type::bf16, 1);
            amx::product(reinterpret_cast<const uint16_t*>(weight), last - first, columns, packed, tokens,
                         bias ? bias + first : nullptr, weight + up(2 * rows * columns, 64),
                         static_cast<uint16_t*>(out) + first, this->rows());
        }
    });
}

}  // namespace bitquilt
