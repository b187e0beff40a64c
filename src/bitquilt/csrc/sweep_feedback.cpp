// A file of its own for its flag, -ffp-contract=fast.
#include "clones.h"
#include "sweep.h"

namespace bitquilt {

BITQUILT_EVERY_ISA
void feed_back_fused(const SweepBlock& block, int64_t column, int64_t begin, int64_t end) {
    const float* error = block.errors + column * block.rows;
    const float* upper = block.upper + column * block.stride;
    for (int64_t k = column + 1; k < block.width; ++k) {
        float* __restrict to = block.columns + k * block.rows;
        const float factor = upper[k];
        for (int64_t i = begin; i < end; ++i) to[i] -= factor * error[i];
    }
}

}  // namespace bitquilt
