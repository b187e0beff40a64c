// Declarations that the kernels share: a stored weight as plain pointers, the inputs of one call, and the table of
// functions that each instruction set fills.
//
// The files of an instruction set (portable.cpp, avx2.cpp, avx512.cpp) are compiled with that set's flags. They
// include only this header, the C library and intrinsics: an inline function or a std:: template compiled there could
// be the one copy that the linker keeps, and an old processor would run an instruction it does not have.
#pragma once

#include <cstdint>

namespace bitquilt {

constexpr int max_tokens = 16;   // above it, unpacking once into a matrix product costs less than the products here
constexpr int max_segments = 256;
constexpr int row_block = 64;    // rows of one piece of work: zeros of 64 rows start on a byte at every width
constexpr int strip_columns = 256;  // of a codebook segment: its tables (2 digits, 8 levels: 4 KiB) stay in the L1 cache
constexpr int group_padding = 16;  // group arrays start at multiples of this, so that 16 floats can always be read

// Floats that hold two rows in fp32; or the levels of 4-bit codebooks in 16 bits, each segment's up to the next 64,
// next to a row of codes.
constexpr int64_t dense_scratch(int64_t columns, int segments) { return 8 * columns + 32 * segments + 64; }

enum class Type : int64_t { f32 = 0, f16 = 1, bf16 = 2 };
enum class Grid : int64_t { uniform = 0, codebook = 1 };

// One column segment, as `ops/reference.py` defines it. All sizes were checked when it was built.
struct Segment {
    Grid grid;
    int bits;
    int64_t group_size, width;
    int64_t groups;         // of a codebook segment: its strips of `strip_columns`
    int64_t first_column;   // in stored order
    int64_t first_group;    // in the padded group arrays of Inputs
    int64_t first_plane;    // in Inputs::digits, bytes per token before it
    const uint8_t* codes;   // [rows, row_bytes]
    int64_t row_bytes;
    const uint8_t* codes_end;  // of the tensor; bytes that a wide load reads past a row meet activations of zero
    const void* scale;      // uniform [rows, groups]
    Type scale_type;
    const float* levels;    // codebook [width, 2^bits], fp32
    const uint8_t* zero;    // integer zeros [groups, zero_bytes], packed along the rows; or null
    int64_t zero_bytes;
    const void* offset;     // one bit: lower levels [rows, groups] of scale_type; or null
};

struct Outliers {
    const uint16_t* values;  // fp16; null: none
    const void* columns;     // int16 or, if wide, int32
    bool wide;
    const int32_t* rows;     // [rows + 1]
    bool rising;             // the columns of every row rise: no two entries are of one weight
};

struct Weight {
    const Segment* segments;
    int count;
    int64_t rows, columns;
    const int32_t* order;  // the original channel of each stored column; null: unchanged
    const int32_t* place;  // the stored column of each channel; null without an order
    Outliers outliers;
};

// The inputs of one product, prepared once per call and read by every row.
struct Inputs {
    int tokens;
    int digits;            // bytes of one fixed-point activation (AVX-512): 1, 2 or 3
    const float* x;        // [tokens, columns], original order
    const float* stored;   // [tokens, columns], stored order
    int64_t groups;        // floats of one token in the two arrays below
    float* unit;           // value of one unit of a group's activations (1 without digits)
    float* sum;            // sum of the activations of a group
    int64_t plane_bytes;   // bytes of one token in `planes`
    int8_t* planes;        // fixed-point activations in the order in which the codes are unpacked; for codebooks
                           // the tables of activation times level
};

struct Isa {
    const char* name;
    bool fixed_point;
    // Bytes that one token's activations of a segment take in Inputs::planes.
    int64_t (*plane_bytes)(const Segment&, int digits);
    // Fill unit, sum and planes.
    void (*prepare)(const Weight&, const Inputs&);
    // out [tokens, rows] for rows begin..end, begin a multiple of row_block; outliers and bias are added elsewhere.
    // scratch: scratch_floats(weight, inputs) floats.
    void (*matmul)(const Weight&, const Inputs&, int64_t begin, int64_t end, float* scratch, float* out);
    int64_t (*scratch_floats)(const Weight&, const Inputs&);
    // out [rows, columns] of `type` for rows begin..end, columns in stored or original order; scratch:
    // dense_scratch(columns, count) floats.
    void (*dequantize)(const Weight&, int64_t begin, int64_t end, bool as_stored, float* scratch, void* out, Type type);
    // to[j] = from[order[j]]; beyond: whether one more entry may be read behind the last.
    void (*pick_halves)(const uint16_t* from, const int32_t* order, int64_t count, bool beyond, uint16_t* to);
    // Sum of one row's outliers times their activations, in original order; null: plain loops are as fast.
    float (*outliers)(const Outliers&, int64_t row, const float* x);
};

extern const Isa portable_isa;
extern const Isa avx2_isa;    // BITQUILT_X86 only, as the next
extern const Isa avx512_isa;
extern const Isa neon_isa;    // 64-bit Arm only

}  // namespace bitquilt
