// Makes a checked Weight from tensors given as addresses and sizes: every number that a kernel indexes by is checked.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kernels.h"

namespace bitquilt {

// A contiguous tensor. dtype: 0 none (absent), then as in `ops/stored_weight.py`.
enum class Dtype : int64_t { none = 0, uint8 = 1, int16 = 2, int32 = 3, float16 = 4, bfloat16 = 5, float32 = 6 };

struct Array {
    const void* data;
    int64_t count;
    Dtype dtype;
};

// A Weight and what it points to. Throws std::invalid_argument naming what is wrong, with what was wanted.
class OwnedWeight {
  public:
    // `description`: out_features, segments, block, then arrays (address, count, dtype) of the permutation, outlier
    // values, columns and rows, then per segment grid, bits, group_size, width and arrays codes, scale, zero.
    explicit OwnedWeight(const std::vector<int64_t>& description);
    OwnedWeight(const OwnedWeight&) = delete;
    OwnedWeight& operator=(const OwnedWeight&) = delete;

    Weight view;
    int64_t groups = 0;      // floats per token in Inputs::unit
    int64_t code_bytes = 0;

  private:
    void add_segment(const int64_t* numbers, int index);
    void set_order(const Array& permutation, int64_t block);
    void set_outliers(const Array& values, const Array& columns, const Array& rows);

    std::vector<Segment> segments_;
    std::vector<std::vector<float>> levels_;
    std::vector<int32_t> order_, place_;
};

}  // namespace bitquilt
