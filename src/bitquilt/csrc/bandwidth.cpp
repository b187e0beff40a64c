#include "bandwidth.h"

#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <memory>
#include <new>
#include <stdexcept>
#include <vector>

#include "handle.h"
#include "pool.h"

namespace bitquilt {

double read_bandwidth(int64_t bytes, int threads, int rounds) {
    check_threads(threads);
    if (bytes < 1 << 20 || rounds < 1) throw std::invalid_argument("wanted at least one round over at least 1 MiB");
    const int64_t piece = 1 << 18, pieces = bytes / (8 * piece);
    // In large pages where the system has them: with small ones a read loop is half as fast, which is not the limit.
    constexpr size_t large = 1 << 21;
    const size_t size = static_cast<size_t>(pieces * piece * 8) + large;
    void* const mapped = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) throw std::bad_alloc();
    const auto unmap = [size](void* at) { munmap(at, size); };
    const std::unique_ptr<void, decltype(unmap)> owner(mapped, unmap);
#if defined(MADV_HUGEPAGE)
    madvise(mapped, size, MADV_HUGEPAGE);
#endif
    auto* const memory = reinterpret_cast<uint64_t*>((reinterpret_cast<uintptr_t>(mapped) + large - 1) / large * large);
    std::fill_n(memory, pieces * piece, uint64_t{1});  // untouched pages would all be the same zeros
    double best = 0.0;
    std::vector<uint64_t> totals(static_cast<size_t>(pieces));
    for (int i = 0; i < rounds; ++i) {
        const auto started = std::chrono::steady_clock::now();
        parallel_for(static_cast<int>(pieces), threads, [&](int index) {
            const uint64_t* from = memory + index * piece;
            uint64_t sums[32] = {};
            for (int64_t j = 0; j < piece; j += 32) for (int k = 0; k < 32; ++k) sums[k] += from[j + k];
            uint64_t total = 0;
            for (const uint64_t sum : sums) total += sum;
            totals[static_cast<size_t>(index)] = total;
        });
        const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - started;
        for (const uint64_t total : totals) {
            if (total != static_cast<uint64_t>(piece)) throw std::runtime_error("memory does not hold what was written");
        }
        best = std::max(best, static_cast<double>(pieces * piece * 8) / seconds.count());
    }
    return best;
}

}  // namespace bitquilt
