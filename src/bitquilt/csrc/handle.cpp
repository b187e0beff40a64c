#include "handle.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>

#include "clones.h"
#include "pool.h"
#include "scalar.h"

namespace bitquilt {
namespace {

// Below this much work (code bytes x tokens) waking the workers costs more than it saves.
constexpr int64_t threaded_bytes = 32 * 1024;
constexpr int most_threads = 1024;

std::vector<const Isa*> levels() {
    std::vector<const Isa*> found;
#if defined(BITQUILT_X86)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi") &&
        __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("gfni") &&
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        found.push_back(&avx512_isa);
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&avx2_isa);
#elif defined(__aarch64__)
    found.push_back(&neon_isa);
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

}  // namespace

void check_threads(int threads) {
    if (threads < 1 || threads > most_threads) {
        throw std::invalid_argument("threads is " + std::to_string(threads) + "; wanted 1 to " +
                                    std::to_string(most_threads));
    }
}

Type checked_type(const char* name, int64_t type) {
    if (type < 0 || type > 2) {
        throw std::invalid_argument(std::string(name) + " type is 0, 1 or 2, not " + std::to_string(type));
    }
    return static_cast<Type>(type);
}

namespace {

// Working memory of the calling thread, kept between calls; starts at a cache line.
class Scratch {
  public:
    float* floats(int64_t count) {
        constexpr int64_t line = 64 / sizeof(float);
        const int64_t wanted = (count + line - 1) / line * line;
        if (size_ < wanted) {
            memory_.reset(new (std::align_val_t{64}) float[static_cast<size_t>(wanted)]);
            size_ = wanted;
        }
        return memory_.get();
    }

  private:
    struct Free {
        void operator()(float* at) const { ::operator delete[](at, std::align_val_t{64}); }
    };
    std::unique_ptr<float[], Free> memory_;
    int64_t size_ = 0;
};

// Two memories per thread: a call's inputs are read while the same thread works on its rows.
enum Use { widened, reordered, prepared, results, of_rows, uses };

float* scratch_of(Use use, int64_t floats) {
    thread_local Scratch memory[uses];
    return memory[use].floats(floats);
}

BITQUILT_EVERY_ISA void widen_bfloat(const uint16_t* from, int64_t count, float* to) {
    for (int64_t i = 0; i < count; ++i) to[i] = from_bfloat(from[i]);
}

BITQUILT_EVERY_ISA void widen_half(const uint16_t* from, int64_t count, float* to) {
    for (int64_t i = 0; i < count; ++i) to[i] = from_half(from[i]);
}

// Any of the three types as fp32; the given memory itself where it is fp32.
const float* widen(const void* from, Type type, int64_t count, Use use) {
    if (type == Type::f32) return static_cast<const float*>(from);
    float* to = scratch_of(use, count);
    (type == Type::bf16 ? widen_bfloat : widen_half)(static_cast<const uint16_t*>(from), count, to);
    return to;
}

void store(const float* from, int64_t count, Type type, void* to, int64_t first) {
    if (type == Type::f32) {
        std::copy_n(from, count, static_cast<float*>(to) + first);
    } else if (type == Type::bf16) {
        for (int64_t i = 0; i < count; ++i) static_cast<uint16_t*>(to)[first + i] = to_bfloat(from[i]);
    } else {
        for (int64_t i = 0; i < count; ++i) static_cast<uint16_t*>(to)[first + i] = to_half(from[i]);
    }
}

BITQUILT_EVERY_ISA void pick(const float* from, const int32_t* order, int64_t count, float* to) {
    for (int64_t j = 0; j < count; ++j) to[j] = from[order[j]];
}

// In stored order; the given memory itself where that is the original order.
const float* stored_order(const Weight& w, const float* x, int tokens) {
    if (!w.order) return x;
    float* to = scratch_of(reordered, tokens * w.columns);
    for (int t = 0; t < tokens; ++t) pick(x + t * w.columns, w.order, w.columns, to + t * w.columns);
    return to;
}

// Sums of one row's outliers times their activations. 16 at a time: one by one, 0.5 % of outliers took as long as the
// rest of a layer.
BITQUILT_EVERY_ISA float outlier_sum(const uint16_t* values, const int16_t* columns, int64_t count, const float* x) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t e = 0; e < count; ++e) sum += from_half(values[e]) * x[columns[e]];
    return sum;
}

BITQUILT_EVERY_ISA float outlier_sum(const uint16_t* values, const int32_t* columns, int64_t count, const float* x) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t e = 0; e < count; ++e) sum += from_half(values[e]) * x[columns[e]];
    return sum;
}

float outlier_sum(const Outliers& outliers, int64_t row, const float* x) {
    const int64_t first = outliers.rows[row], count = outliers.rows[row + 1] - first;
    const uint16_t* values = outliers.values + first;
    if (outliers.wide) return outlier_sum(values, static_cast<const int32_t*>(outliers.columns) + first, count, x);
    return outlier_sum(values, static_cast<const int16_t*>(outliers.columns) + first, count, x);
}

void add_outliers_and_bias(const Isa& isa, const Weight& w, const Inputs& in, int64_t begin, int64_t end,
                           const float* bias, float* out) {
    float (*sum)(const Outliers&, int64_t, const float*) = outlier_sum;
    if (isa.outliers) sum = isa.outliers;
    for (int t = 0; t < in.tokens; ++t) {
        const float* x = in.x + t * w.columns;
        float* y = out + t * w.rows;
        for (int64_t row = begin; row < end; ++row) {
            y[row] += (bias ? bias[row] : 0.0f) + (w.outliers.values ? sum(w.outliers, row, x) : 0.0f);
        }
    }
}

}  // namespace

std::vector<std::string> level_names() {
    std::vector<std::string> names;
    for (const Isa* isa : levels()) names.emplace_back(isa->name);
    return names;
}

Handle::Handle(const std::string& level, const std::vector<int64_t>& description)
    : isa_(level_named(level)), owned_(description) {
    const Weight& w = owned_.view;
    for (int digits = 1; digits <= most_digits; ++digits) {
        std::vector<Segment>& segments = segments_[digits - 1];
        segments.assign(w.segments, w.segments + w.count);
        for (Segment& s : segments) {
            s.first_plane = plane_bytes_[digits - 1];
            plane_bytes_[digits - 1] += (isa_.plane_bytes(s, digits) + 63) / 64 * 64;
        }
    }
}

void Handle::matmul(const void* x, Type type, int64_t tokens, int64_t columns, const float* bias, void* out,
                    int digits, int threads) const {
    check_threads(threads);
    if (tokens < 1 || tokens > max_tokens) {
        throw std::invalid_argument("x has " + std::to_string(tokens) + " tokens; the kernels take 1 to " +
                                    std::to_string(max_tokens));
    }
    if (digits < 1 || digits > most_digits) {
        throw std::invalid_argument("digits is 1, 2 or 3, not " + std::to_string(digits));
    }
    Weight w = owned_.view;
    if (columns != w.columns) {
        throw std::invalid_argument("x has " + std::to_string(columns) + " features; the layer takes " +
                                    std::to_string(w.columns));
    }
    w.segments = segments_[digits - 1].data();
    const int64_t sums = tokens * owned_.groups + group_padding, plane_bytes = plane_bytes_[digits - 1];
    Inputs in{};
    in.tokens = static_cast<int>(tokens);
    in.digits = digits;
    in.x = widen(x, type, tokens * columns, widened);
    in.stored = stored_order(w, in.x, in.tokens);
    in.groups = owned_.groups;
    float* memory = scratch_of(prepared, plane_bytes * tokens / 4 + 2 * sums);
    in.plane_bytes = plane_bytes;
    in.planes = reinterpret_cast<int8_t*>(memory);
    in.unit = memory + plane_bytes * tokens / 4;
    in.sum = in.unit + sums;
    std::fill_n(in.unit, 2 * sums, 0.0f);  // the gaps between segments are read and must be finite
    isa_.prepare(w, in);
    const int pieces = static_cast<int>((w.rows + row_block - 1) / row_block);
    if (owned_.code_bytes * tokens < threaded_bytes) threads = 1;
    float* y = type == Type::f32 ? static_cast<float*>(out) : scratch_of(results, tokens * w.rows);
    parallel_for(pieces, threads, [&](int piece) {
        const int64_t begin = int64_t{piece} * row_block, end = std::min<int64_t>(begin + row_block, w.rows);
        isa_.matmul(w, in, begin, end, scratch_of(of_rows, isa_.scratch_floats(w, in)), y);
        add_outliers_and_bias(isa_, w, in, begin, end, bias, y);
        if (type == Type::f32) return;
        for (int64_t t = 0; t < tokens; ++t) {
            store(y + t * w.rows + begin, end - begin, type, out, t * w.rows + begin);
        }
    });
}

void Handle::reorder(const void* x, int64_t item, int64_t tokens, void* out, int threads) const {
    check_threads(threads);
    if (item != 2 && item != 4) throw std::invalid_argument("activations take 2 or 4 bytes, not " + std::to_string(item));
    const Weight& w = owned_.view;
    parallel_for_torch(static_cast<int>(tokens), threads, [&](int token) {
        const int64_t at = token * w.columns * item;
        const char* from = static_cast<const char*>(x) + at;
        char* to = static_cast<char*>(out) + at;
        if (!w.order) {
            std::memcpy(to, from, static_cast<size_t>(w.columns * item));
        } else if (item == 4) {
            pick(reinterpret_cast<const float*>(from), w.order, w.columns, reinterpret_cast<float*>(to));
        } else {
            isa_.pick_halves(reinterpret_cast<const uint16_t*>(from), w.order, w.columns, token + 1 < tokens,
                             reinterpret_cast<uint16_t*>(to));
        }
    });
}

void Handle::dequantize(int64_t first, int64_t last, bool as_stored, void* out, Type type, int threads) const {
    check_threads(threads);
    const Weight& w = owned_.view;
    if (first < 0 || first > last || last > w.rows) {
        throw std::invalid_argument("rows " + std::to_string(first) + " to " + std::to_string(last) +
                                    " are not among the layer's " + std::to_string(w.rows));
    }
    // Tables of codebook columns are made again for each piece.
    const int64_t rows = std::any_of(w.segments, w.segments + w.count,
                                     [](const Segment& s) { return s.grid == Grid::codebook; }) ? 128 : 16;
    const int pieces = static_cast<int>((last - first + rows - 1) / rows);
    if (owned_.code_bytes < threaded_bytes) threads = 1;
    const int64_t before = first * w.columns * (type == Type::f32 ? 4 : 2);
    void* const start = reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(out) - static_cast<uintptr_t>(before));
    parallel_for_torch(pieces, threads, [&](int piece) {
        const int64_t begin = first + piece * rows, end = std::min(begin + rows, last);
        float* scratch = scratch_of(of_rows, dense_scratch(w.columns, w.count));
        isa_.dequantize(w, begin, end, as_stored, scratch, start, type);  // it counts rows from the first of the weight
    });
}

}  // namespace bitquilt
