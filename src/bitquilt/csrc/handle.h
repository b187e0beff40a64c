// Products with one stored weight, which is checked once and then called with addresses. This file knows no Python.
#pragma once

#include <string>
#include <vector>

#include "weight.h"

namespace bitquilt {

// The instruction sets of this processor, the fastest first.
std::vector<std::string> level_names();

// Throws std::invalid_argument unless `threads` is 1 to 1024.
void check_threads(int threads);

// Throws std::invalid_argument unless `type` is 0, 1 or 2.
Type checked_type(const char* name, int64_t type);

// A weight that was checked once, for one instruction set. The caller keeps the tensors alive and unchanged.
// Sizes that do not fit throw std::invalid_argument.
class Handle {
  public:
    Handle(const std::string& level, const std::vector<int64_t>& description);

    int64_t rows() const { return owned_.view.rows; }
    int64_t columns() const { return owned_.view.columns; }

    // x [tokens, columns] -> out [tokens, rows], both of `type`; `bias` fp32 or null. digits: see Inputs.
    void matmul(const void* x, Type type, int64_t tokens, int64_t columns, const float* bias, void* out, int digits,
                int threads) const;

    // Whether the columns are stored in another order than their channels'.
    bool reordered() const { return owned_.view.order != nullptr; }

    // x [tokens, columns] of `item` bytes each -> out, in stored order.
    void reorder(const void* x, int64_t item, int64_t tokens, void* out, int threads) const;

    // Rows first..last of the weight into out [last - first, columns], with the columns in stored or original order.
    void dequantize(int64_t first, int64_t last, bool as_stored, void* out, Type type, int threads) const;

    // The product for many tokens on the matrix units, x in stored order, all in bf16; only where
    // amx::usable(). memory: prefill_bytes(tokens, threads), at a cache line.
    void prefill(const void* x, int64_t tokens, int64_t columns, const float* bias, void* out, void* memory,
                 int threads) const;
    int64_t prefill_bytes(int64_t tokens, int threads) const;

  private:
    static constexpr int most_digits = 3;

    const Isa& isa_;
    const OwnedWeight owned_;
    std::vector<Segment> segments_[most_digits];  // with the places of their activations
    int64_t plane_bytes_[most_digits] = {};
};

}  // namespace bitquilt
