#include "weight.h"

#include <algorithm>
#include <stdexcept>

#include "scalar.h"

namespace bitquilt {
namespace {

constexpr int64_t array_fields = 3, head_fields = 3 + 4 * array_fields, segment_fields = 4 + 3 * array_fields;
constexpr int64_t widest = int64_t{1} << 20;  // columns: sums of 8-bit codes times a digit stay within 32 bits

[[noreturn]] void fail(const std::string& message) { throw std::invalid_argument(message); }

Array array_at(const int64_t* numbers) {
    return {reinterpret_cast<const void*>(numbers[0]), numbers[1], static_cast<Dtype>(numbers[2])};
}

void want_count(const std::string& name, const Array& array, int64_t wanted, const std::string& why) {
    if (array.count != wanted) {
        fail(name + " holds " + std::to_string(array.count) + " entries; " + why + " take " + std::to_string(wanted));
    }
}

void want_dtype(const std::string& name, bool right, const char* wanted) {
    if (!right) fail(name + " has the wrong dtype; wanted " + wanted);
}

int64_t packed_bytes(int64_t count, int64_t bits) { return (count * bits + 7) / 8; }

Type float_type(const std::string& name, const Array& array) {
    if (array.dtype == Dtype::float16) return Type::f16;
    if (array.dtype == Dtype::bfloat16) return Type::bf16;
    if (array.dtype != Dtype::float32) fail(name + " has the wrong dtype; wanted float16, bfloat16 or float32");
    return Type::f32;
}

}  // namespace

OwnedWeight::OwnedWeight(const std::vector<int64_t>& description) : view{} {
    const auto size = static_cast<int64_t>(description.size());
    if (size < head_fields) fail("a weight's description has at least " + std::to_string(head_fields) + " numbers");
    const int64_t* head = description.data();
    view.rows = head[0];
    const int64_t count = head[1];
    if (view.rows < 0 || count < 1 || count > max_segments || size != head_fields + count * segment_fields) {
        fail("out_features is " + std::to_string(view.rows) + " and there are " + std::to_string(count) +
             " segments, described by " + std::to_string(size) + " numbers: they do not go together");
    }
    segments_.reserve(static_cast<size_t>(count));
    levels_.reserve(static_cast<size_t>(count));
    for (int64_t i = 0; i < count; ++i) {
        add_segment(head + head_fields + i * segment_fields, static_cast<int>(i));
    }
    view.segments = segments_.data();
    view.count = static_cast<int>(count);
    set_order(array_at(head + 3), head[2]);
    set_outliers(array_at(head + 6), array_at(head + 9), array_at(head + 12));
}

void OwnedWeight::add_segment(const int64_t* numbers, int index) {
    std::string place(1, '_');  // not "_" + ...: gcc 12 warns of an overlap that is not there
    place += std::to_string(index);
    const int64_t grid = numbers[0], bits = numbers[1], group_size = numbers[2], width = numbers[3];
    const Array codes = array_at(numbers + 4), scale = array_at(numbers + 7), zero = array_at(numbers + 10);
    if (grid != 0 && grid != 1) fail("segment" + place + ": grid is " + std::to_string(grid) + "; known are 0 and 1");
    if (bits < 1 || bits > 8) fail("codes" + place + ": a code takes 1 to 8 bits, not " + std::to_string(bits));
    if (width < 1 || group_size < 1 || view.columns + width > widest) {
        fail("segment" + place + ": width is " + std::to_string(width) + ", group_size " + std::to_string(group_size) +
             "; wanted at least 1 and at most " + std::to_string(widest) + " columns");
    }
    Segment s{};
    s.grid = static_cast<Grid>(grid);
    s.bits = static_cast<int>(bits);
    s.width = width;
    s.first_column = view.columns;
    s.row_bytes = packed_bytes(width, bits);
    s.codes = static_cast<const uint8_t*>(codes.data);
    const std::string rows = std::to_string(view.rows) + " rows of ";
    want_dtype("codes" + place, codes.dtype == Dtype::uint8, "uint8");
    want_count("codes" + place, codes, view.rows * s.row_bytes,
               rows + std::to_string(width) + " " + std::to_string(bits) + "-bit codes");
    s.codes_end = s.codes + codes.count;
    const Type type = float_type("scale" + place, scale);
    if (s.grid == Grid::codebook) {
        want_count("scale" + place, scale, width << bits, std::to_string(width) + " codebooks");
        levels_.emplace_back(static_cast<size_t>(width << bits));
        for (int64_t i = 0; i < width << bits; ++i) levels_.back()[static_cast<size_t>(i)] = load(scale.data, type, i);
        s.levels = levels_.back().data();
        s.groups = (width + strip_columns - 1) / strip_columns;
    } else {
        s.group_size = group_size;
        s.groups = (width + group_size - 1) / group_size;
        if (s.groups > 1 && group_size % 8 != 0) {
            fail("segment" + place + ": group_size is " + std::to_string(group_size) + "; the kernels want a multiple of 8");
        }
        s.scale = scale.data;
        s.scale_type = type;
        const std::string groups = rows + std::to_string(s.groups) + " groups";
        want_count("scale" + place, scale, view.rows * s.groups, groups);
        if (zero.count > 0 && bits == 1) {
            want_dtype("zero" + place, zero.dtype == scale.dtype, "that of scale");
            want_count("zero" + place, zero, view.rows * s.groups, groups);
            s.offset = zero.data;
        } else if (zero.count > 0) {
            s.zero_bytes = packed_bytes(view.rows, bits);
            want_dtype("zero" + place, zero.dtype == Dtype::uint8, "uint8");
            want_count("zero" + place, zero, s.groups * s.zero_bytes, "packed zeros of " + groups);
            s.zero = static_cast<const uint8_t*>(zero.data);
        }
    }
    s.first_group = groups;
    groups += (s.groups + group_padding - 1) / group_padding * group_padding;
    code_bytes += codes.count;
    view.columns += width;
    segments_.push_back(s);
}

void OwnedWeight::set_order(const Array& permutation, int64_t block) {
    if (permutation.dtype == Dtype::none) return;
    const int64_t columns = view.columns;
    if (block < 1) fail("permutation: blocks of " + std::to_string(block) + " channels; wanted at least 1");
    const int64_t blocks = (columns + block - 1) / block;
    std::vector<int64_t> order;
    order.reserve(static_cast<size_t>(blocks));
    if (permutation.dtype == Dtype::uint8) {  // the segment of each block
        int bits = 1;
        while (int64_t{1} << bits < view.count) ++bits;
        want_count("permutation", permutation, packed_bytes(blocks, bits), std::to_string(blocks) + " blocks");
        const auto* stream = static_cast<const uint8_t*>(permutation.data);
        for (int segment = 0; segment < 1 << bits; ++segment) {
            for (int64_t i = 0; i < blocks; ++i) {
                const uint64_t word = load_word(stream, i * bits / 8, permutation.count);
                if (static_cast<int>(word >> (i * bits % 8) & ((1u << bits) - 1u)) == segment) order.push_back(i);
            }
        }
    } else {
        want_count("permutation", permutation, blocks, std::to_string(blocks) + " blocks");
        const bool narrow = permutation.dtype == Dtype::int16;
        want_dtype("permutation", narrow || permutation.dtype == Dtype::int32, "uint8, int16 or int32");
        for (int64_t i = 0; i < blocks; ++i) {
            order.push_back(narrow ? static_cast<const int16_t*>(permutation.data)[i]
                                   : static_cast<const int32_t*>(permutation.data)[i]);
        }
    }
    order_.reserve(static_cast<size_t>(columns));
    place_.assign(static_cast<size_t>(columns), -1);
    for (const int64_t from : order) {
        if (from < 0 || from >= blocks || place_[static_cast<size_t>(from * block)] >= 0) {
            fail("permutation: block " + std::to_string(from) + " of " + std::to_string(blocks) +
                 " is out of range or stored twice");
        }
        for (int64_t channel = from * block; channel < std::min(columns, (from + 1) * block); ++channel) {
            place_[static_cast<size_t>(channel)] = static_cast<int32_t>(order_.size());
            order_.push_back(static_cast<int32_t>(channel));
        }
    }
    if (std::is_sorted(order_.begin(), order_.end())) return;  // an order that moves nothing
    view.order = order_.data();
    view.place = place_.data();
}

void OwnedWeight::set_outliers(const Array& values, const Array& columns, const Array& rows) {
    if (values.dtype == Dtype::none) return;
    const std::string entries = std::to_string(values.count) + " outliers";
    want_dtype("outlier_values", values.dtype == Dtype::float16, "float16");
    want_dtype("outlier_columns", columns.dtype == Dtype::int16 || columns.dtype == Dtype::int32, "int16 or int32");
    want_dtype("outlier_rows", rows.dtype == Dtype::int32, "int32");
    want_count("outlier_columns", columns, values.count, entries);
    want_count("outlier_rows", rows, view.rows + 1, std::to_string(view.rows) + " rows");
    view.outliers = {static_cast<const uint16_t*>(values.data), columns.data, columns.dtype == Dtype::int32,
                     static_cast<const int32_t*>(rows.data), true};
    // Read again by the kernel in any case, and few: checking them costs less than the product.
    const int32_t* pointers = view.outliers.rows;
    for (int64_t r = 0; r < view.rows; ++r) {
        if (pointers[r] < 0 || pointers[r] > pointers[r + 1]) fail("outlier_rows decrease at row " + std::to_string(r));
    }
    if (pointers[view.rows] > values.count) {
        fail("outlier_rows end at " + std::to_string(pointers[view.rows]) + "; there are " + entries);
    }
    const auto column_of = [&](int64_t e) -> int64_t {
        return view.outliers.wide ? static_cast<const int32_t*>(columns.data)[e]
                                  : static_cast<const int16_t*>(columns.data)[e];
    };
    for (int64_t r = 0; r < view.rows; ++r) {
        for (int64_t e = pointers[r] + 1; e < pointers[r + 1]; ++e) {
            view.outliers.rising = view.outliers.rising && column_of(e - 1) < column_of(e);
        }
    }
    for (int64_t e = 0; e < values.count; ++e) {
        const int64_t column = column_of(e);
        if (column < 0 || column >= view.columns) {
            fail("outlier_columns: entry " + std::to_string(e) + " is " + std::to_string(column) + "; the layer has " +
                 std::to_string(view.columns) + " columns");
        }
    }
}

}  // namespace bitquilt
