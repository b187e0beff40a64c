// bitquilt._kernels: addresses and sizes in, results in the caller's memory. No torch, no numpy; the GIL is released.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <chrono>
#include <memory>
#include <stdexcept>

#include "kmeans.h"
#include "pool.h"
#include "scalar.h"
#include "weight.h"

namespace nb = nanobind;

namespace bitquilt {
namespace {

// Below this much work (code bytes x tokens) waking the workers costs more than it saves.
constexpr int64_t threaded_bytes = 128 * 1024;
constexpr int most_threads = 1024;

std::vector<const Isa*> levels() {
    std::vector<const Isa*> found;
#if defined(BITQUILT_X86)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi") &&
        __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        found.push_back(&avx512_isa);
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&avx2_isa);
#endif
    found.push_back(&portable_isa);
    return found;
}

const Isa& level_named(const std::string& name) {
    static const std::vector<const Isa*> known = levels();
    std::string names;
    for (const Isa* isa : known) {
        if (name == isa->name) return *isa;
        names += std::string(" ") + isa->name;
    }
    throw std::invalid_argument("instruction set '" + name + "' is not one this processor has; it has" + names);
}

void check_threads(int threads) {
    if (threads < 1 || threads > most_threads) {
        throw std::invalid_argument("threads is " + std::to_string(threads) + "; wanted 1 to " +
                                    std::to_string(most_threads));
    }
}

// Working memory of the calling thread, kept between calls.
float* scratch_of(int64_t floats) {
    thread_local std::vector<float> memory;
    if (static_cast<int64_t>(memory.size()) < floats) memory.resize(static_cast<size_t>(floats));
    return memory.data();
}

// fp32 in stored order; the given memory itself where the order is the original one.
const float* reorder(const Weight& w, const float* x, int tokens, std::vector<float>& memory) {
    if (w.run_count == 1) return x;
    memory.resize(static_cast<size_t>(tokens * w.columns));
    for (int t = 0; t < tokens; ++t) {
        for (int64_t i = 0; i < w.run_count; ++i) {
            const Run& run = w.runs[i];
            std::copy_n(x + t * w.columns + run.original, run.length, memory.data() + t * w.columns + run.stored);
        }
    }
    return memory.data();
}

void add_outliers_and_bias(const Weight& w, const Inputs& in, int64_t begin, int64_t end, const float* bias,
                           float* out) {
    for (int t = 0; t < in.tokens; ++t) {
        const float* x = in.x + t * w.columns;
        float* y = out + t * w.rows;
        for (int64_t row = begin; row < end; ++row) {
            float sum = bias ? bias[row] : 0.0f;
            if (w.outliers.values) {
                for (int64_t e = w.outliers.rows[row]; e < w.outliers.rows[row + 1]; ++e) {
                    const int64_t column = w.outliers.wide ? static_cast<const int32_t*>(w.outliers.columns)[e]
                                                           : static_cast<const int16_t*>(w.outliers.columns)[e];
                    sum += from_half(w.outliers.values[e]) * x[column];
                }
            }
            y[row] += sum;
        }
    }
}

void matmul(const std::string& level, const std::vector<int64_t>& description, uintptr_t x, int64_t tokens,
            int64_t columns, uintptr_t bias, uintptr_t out, int digits, int threads) {
    const Isa& isa = level_named(level);
    check_threads(threads);
    if (tokens < 1 || tokens > max_tokens) {
        throw std::invalid_argument("x has " + std::to_string(tokens) + " tokens; the kernels take 1 to " +
                                    std::to_string(max_tokens));
    }
    if (digits != 2 && digits != 3) throw std::invalid_argument("digits is 2 or 3, not " + std::to_string(digits));
    nb::gil_scoped_release released;
    const OwnedWeight owned(description);
    const Weight& w = owned.view;
    if (columns != w.columns) {
        throw std::invalid_argument("x has " + std::to_string(columns) + " features; the layer takes " +
                                    std::to_string(w.columns));
    }
    std::vector<float> stored, sums(static_cast<size_t>(2 * (tokens * owned.groups + group_padding)));
    std::vector<Segment> segments(w.segments, w.segments + w.count);
    int64_t plane_bytes = 0;
    for (Segment& s : segments) {
        s.first_plane = plane_bytes;
        plane_bytes += isa.plane_bytes(s, digits);
    }
    Weight planned = w;
    planned.segments = segments.data();
    std::vector<int8_t> planes(static_cast<size_t>(plane_bytes * tokens + 64));
    Inputs in{};
    in.tokens = static_cast<int>(tokens);
    in.digits = digits;
    in.x = reinterpret_cast<const float*>(x);
    in.stored = reorder(w, in.x, in.tokens, stored);
    in.groups = owned.groups;
    in.unit = sums.data();
    in.sum = sums.data() + tokens * owned.groups + group_padding;
    in.plane_bytes = plane_bytes;
    in.planes = reinterpret_cast<int8_t*>((reinterpret_cast<uintptr_t>(planes.data()) + 63) / 64 * 64);
    isa.prepare(planned, in);
    const int pieces = static_cast<int>((w.rows + row_block - 1) / row_block);
    if (owned.code_bytes * tokens < threaded_bytes) threads = 1;
    float* y = reinterpret_cast<float*>(out);
    parallel_for(pieces, threads, [&](int piece) {
        const int64_t begin = int64_t{piece} * row_block, end = std::min<int64_t>(begin + row_block, w.rows);
        isa.matmul(planned, in, begin, end, scratch_of(isa.scratch_floats(planned, in)), y);
        add_outliers_and_bias(w, in, begin, end, reinterpret_cast<const float*>(bias), y);
    });
}

// Rows first..last of the weight into out [last - first, columns].
void dequantize(const std::string& level, const std::vector<int64_t>& description, int64_t first, int64_t last,
                uintptr_t out, int64_t type, int threads) {
    const Isa& isa = level_named(level);
    check_threads(threads);
    if (type < 0 || type > 2) throw std::invalid_argument("output type is 0, 1 or 2, not " + std::to_string(type));
    nb::gil_scoped_release released;
    const OwnedWeight owned(description);
    const Weight& w = owned.view;
    if (first < 0 || first > last || last > w.rows) {
        throw std::invalid_argument("rows " + std::to_string(first) + " to " + std::to_string(last) +
                                    " are not among the layer's " + std::to_string(w.rows));
    }
    constexpr int64_t rows = 16;
    const int pieces = static_cast<int>((last - first + rows - 1) / rows);
    if (owned.code_bytes < threaded_bytes) threads = 1;
    const auto start = out - static_cast<uintptr_t>(first * w.columns * (type == 0 ? 4 : 2));  // where row 0 would be
    parallel_for(pieces, threads, [&](int piece) {
        const int64_t begin = first + piece * rows, end = std::min(begin + rows, last);
        isa.dequantize(w, begin, end, scratch_of(2 * w.columns + 64), reinterpret_cast<void*>(start),
                       static_cast<Type>(type));
    });
}

// Bytes per second of reading `bytes` of memory once, the fastest of `rounds`: the limit that decoding is held against.
double read_bandwidth(int64_t bytes, int threads, int rounds) {
    check_threads(threads);
    if (bytes < 1 << 20 || rounds < 1) throw std::invalid_argument("wanted at least one round over at least 1 MiB");
    nb::gil_scoped_release released;
    const int64_t piece = 1 << 18, pieces = bytes / (8 * piece);
    const std::unique_ptr<uint64_t[]> memory(new uint64_t[static_cast<size_t>(pieces * piece)]);
    std::fill_n(memory.get(), pieces * piece, uint64_t{1});  // untouched pages would all be the same zeros
    double best = 0.0;
    std::vector<uint64_t> totals(static_cast<size_t>(pieces));
    for (int i = 0; i < rounds; ++i) {
        const auto started = std::chrono::steady_clock::now();
        parallel_for(static_cast<int>(pieces), threads, [&](int index) {
            const uint64_t* from = memory.get() + index * piece;
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

void kmeans_at(uintptr_t x, uintptr_t w, int64_t columns, int64_t n, int64_t k, uintptr_t centroids,
               uintptr_t boundaries, int threads) {
    check_threads(threads);
    nb::gil_scoped_release released;
    kmeans(reinterpret_cast<const double*>(x), reinterpret_cast<const double*>(w), columns, n, k,
           reinterpret_cast<double*>(centroids), reinterpret_cast<int64_t*>(boundaries), threads);
}

}  // namespace

NB_MODULE(_kernels, m) {
    m.def("levels", [] {
        std::vector<std::string> names;
        for (const Isa* isa : levels()) names.emplace_back(isa->name);
        return names;
    });
    m.def("matmul", &matmul);
    m.def("dequantize", &dequantize);
    m.def("read_bandwidth", &read_bandwidth);
    m.def("kmeans", &kmeans_at);
    m.attr("MAX_TOKENS") = max_tokens;
}

}  // namespace bitquilt
