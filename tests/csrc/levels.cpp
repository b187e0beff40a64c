// Every instruction set of the processor that runs this against sums in double precision: no Python, so that it can be
// compiled for another processor and run by an emulator. Prints what it checked; exits with 1 at the first difference.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "handle.h"

namespace {

std::mt19937 random_bits(1);

int64_t address(const void* at) { return static_cast<int64_t>(reinterpret_cast<uintptr_t>(at)); }

struct Case {
    int bits;
    int64_t width, group_size;
    bool codebook, zeros, reordered, outliers;
};

// One segment with its channels in reverse, if `reordered`, and an outlier per row; x [tokens, width] -> false if wrong.
bool agrees(const std::string& level, const Case& c, int64_t rows, int64_t tokens) {
    const int64_t groups = (c.width + c.group_size - 1) / c.group_size, row_bytes = (c.width * c.bits + 7) / 8;
    const int64_t zero_bytes = (rows * c.bits + 7) / 8;
    std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);
    std::vector<uint8_t> codes(static_cast<size_t>(rows * row_bytes)), zeros(static_cast<size_t>(groups * zero_bytes));
    for (auto& byte : codes) byte = static_cast<uint8_t>(random_bits());
    for (auto& byte : zeros) byte = static_cast<uint8_t>(random_bits());
    std::vector<float> scale(static_cast<size_t>(c.codebook ? c.width << c.bits : rows * groups));
    for (auto& value : scale) value = uniform(random_bits);
    std::vector<float> x(static_cast<size_t>(tokens * c.width)), y(static_cast<size_t>(tokens * rows));
    for (auto& value : x) value = uniform(random_bits);
    std::vector<int32_t> order, columns, row_starts{0};
    std::vector<uint16_t> ones;
    for (int64_t j = 0; j < c.width; ++j) order.push_back(static_cast<int32_t>(c.reordered ? c.width - 1 - j : j));
    for (int64_t row = 0; row < rows && c.outliers; ++row) {
        columns.push_back(static_cast<int32_t>(row % c.width));
        ones.push_back(0x3c00);  // 1 in fp16
        row_starts.push_back(static_cast<int32_t>(row + 1));
    }
    const bool integer_zeros = c.zeros && !c.codebook && c.bits > 1;
    std::vector<int64_t> numbers{rows, 1, 1};
    const auto array = [&](const void* at, size_t count, int64_t type) {
        numbers.insert(numbers.end(), {address(at), static_cast<int64_t>(count), type});
    };
    array(order.data(), order.size(), c.reordered ? 3 : 0);
    array(ones.data(), ones.size(), c.outliers ? 4 : 0);
    array(columns.data(), columns.size(), c.outliers ? 3 : 0);
    array(row_starts.data(), row_starts.size(), c.outliers ? 3 : 0);
    numbers.insert(numbers.end(), {c.codebook ? 1 : 0, c.bits, c.codebook ? 1 : c.group_size, c.width});
    array(codes.data(), codes.size(), 1);
    array(scale.data(), scale.size(), 6);
    array(zeros.data(), integer_zeros ? zeros.size() : 0, integer_zeros ? 1 : 6);
    const bitquilt::Handle handle(level, numbers);
    std::vector<float> dense(static_cast<size_t>(rows * c.width));
    handle.dequantize(0, rows, false, dense.data(), bitquilt::Type::f32, 2);
    const auto field = [&](const std::vector<uint8_t>& bytes, int64_t start, int64_t i) {
        int code = 0;
        for (int b = 0; b < c.bits; ++b) {
            const int64_t bit = i * c.bits + b;
            code |= (bytes[static_cast<size_t>(start + bit / 8)] >> (bit % 8) & 1) << b;
        }
        return code;
    };
    handle.matmul(x.data(), bitquilt::Type::f32, tokens, c.width, nullptr, y.data(), 3, 2);
    for (int64_t row = 0; row < rows; ++row) {
        std::vector<double> sums(static_cast<size_t>(tokens)), sizes(sums);
        for (int64_t j = 0; j < c.width; ++j) {
            const int code = field(codes, row * row_bytes, j);
            const int64_t g = j / c.group_size, channel = order[static_cast<size_t>(j)];
            float value;
            if (c.codebook) {
                value = scale[static_cast<size_t>((j << c.bits) + code)];
            } else {
                const float zero = integer_zeros ? static_cast<float>(field(zeros, g * zero_bytes, row))
                                                 : static_cast<float>((1 << c.bits) - 1) / 2.0f;
                value = scale[static_cast<size_t>(row * groups + g)] * (static_cast<float>(code) - zero);
            }
            if (c.outliers && channel == row % c.width) value += 1.0f;
            if (dense[static_cast<size_t>(row * c.width + channel)] != value) return false;
            for (int64_t t = 0; t < tokens; ++t) {
                const double product = static_cast<double>(value) * x[static_cast<size_t>(t * c.width + channel)];
                sums[static_cast<size_t>(t)] += product;
                sizes[static_cast<size_t>(t)] += std::fabs(product) + std::fabs(x[static_cast<size_t>(t * c.width + channel)]);
            }
        }
        for (int64_t t = 0; t < tokens; ++t) {
            const double distance = std::fabs(y[static_cast<size_t>(t * rows + row)] - sums[static_cast<size_t>(t)]);
            if (!(distance <= 1e-5 * (1 << c.bits) * sizes[static_cast<size_t>(t)])) return false;
        }
    }
    return true;
}

}  // namespace

int main() {
    for (const std::string& level : bitquilt::level_names()) {
        int checked = 0;
        for (int bits = 1; bits <= 8; ++bits) {
            for (int64_t width : {64, 203}) {
                for (int kind = 0; kind < 8; ++kind) {
                    const Case c{bits, width, width == 64 ? 16 : 72, kind % 2 == 1, kind % 4 < 2, kind >= 4, kind >= 4};
                    for (int64_t tokens : {1, 3, 6}) {
                        if (!agrees(level, c, 67, tokens)) {
                            std::printf("%s: %d bits, width %d, kind %d, %d tokens: wrong\n", level.c_str(), bits,
                                        static_cast<int>(width), kind, static_cast<int>(tokens));
                            return 1;
                        }
                        ++checked;
                    }
                }
            }
        }
        std::printf("%s: %d products right\n", level.c_str(), checked);
    }
    return 0;
}
