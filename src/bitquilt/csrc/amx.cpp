#include "amx.h"

#if defined(BITQUILT_AMX)

#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace bitquilt {
namespace amx {
namespace {

constexpr int64_t tile_bytes = 1024, tile_rows = 16, tile_columns = 32, line = 64;
constexpr int64_t slab_steps = slab_columns / tile_columns;
constexpr int64_t pair_tokens = 2 * tile_rows;

inline int64_t up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// The compiler's own intrinsics do not declare that they read memory. Tiles 0 to 3 are sums, 4 and 5 rows, 6 and 7 tokens.
template <int tile>
inline void load_tile(const void* at) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(at), "r"(line), "i"(tile) : "memory");
}
template <int tile>
inline void store_tile(void* at) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(at), "r"(line), "i"(tile) : "memory");
}
template <int tile>
inline void zero_tile() {
    asm volatile("tilezero %%tmm%c0" ::"i"(tile));
}
template <int sum, int rows, int tokens>
inline void multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(rows), "i"(tokens));
}

// Eight tiles, all of 16 rows and 64 bytes.
struct Tiles {
    Tiles() {
        alignas(64) uint8_t shape[64] = {1};
        for (int i = 0; i < 8; ++i) shape[16 + 2 * i] = line, shape[48 + i] = tile_rows;
        asm volatile("ldtilecfg %0" ::"m"(shape) : "memory");
    }
    ~Tiles() { asm volatile("tilerelease"); }
};

// Row i of 16 becomes column i, in 32-bit words.
inline void transpose(__m512i* a) {
    __m512i b[16];
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {  // a[4 q + i]: words i, i + 4, i + 8, i + 12 of rows 4 q to 4 q + 3
        b[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
        b[i + 4] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
        b[i + 8] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
        b[i + 12] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; ++i) {
        a[i] = _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88);
        a[i + 8] = _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd);
        a[i + 4] = _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0x88);
        a[i + 12] = _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0xdd);
    }
}

// 32 columns, zeros past `left`.
inline __m512i load_columns(const uint16_t* at, int64_t left) {
    if (left >= tile_columns) return _mm512_loadu_si512(at);
    return left > 0 ? _mm512_maskz_loadu_epi16((1u << left) - 1u, at) : _mm512_setzero_si512();
}

// The tiles of one token block, ordered by slab, then by 16 tokens, then by column.
struct Packed {
    int64_t first, tiles, steps;  // of the block: bytes before it, tiles of tokens, tiles of columns
    Packed(int64_t tokens, int64_t columns, int64_t block) {
        steps = up(columns, tile_columns) / tile_columns;
        first = block * block_tokens / tile_rows * steps * tile_bytes;
        tiles = up(least(tokens - block * block_tokens, block_tokens), pair_tokens) / tile_rows;
    }
    int64_t steps_of(int64_t slab) const { return least(slab_steps, steps - slab * slab_steps); }
    int64_t slab(int64_t slab) const { return first + slab * slab_steps * tiles * tile_bytes; }
    int64_t tile(int64_t s, int64_t tile) const { return slab(s) + tile * steps_of(s) * tile_bytes; }
};

// 32 rows of a slab, of which `rows` exist: the first 16 and the last 16 alternate, 32 columns at a time.
void pack_panel(const uint16_t* weight, int64_t rows, int64_t columns, int64_t slab, char* panel) {
    const int64_t first = slab * slab_columns;
    const int64_t steps = up(least(slab_columns, columns - first), tile_columns) / tile_columns;
    for (int64_t row = 0; row < panel_rows; ++row) {
        const uint16_t* from = weight + row * columns + first;
        char* to = panel + row / tile_rows * tile_bytes + row % tile_rows * line;
        for (int64_t k = 0; k < steps; ++k) {
            const int64_t left = row < rows ? columns - first - k * tile_columns : 0;
            _mm512_store_si512(to + 2 * k * tile_bytes, load_columns(from + k * tile_columns, left));
        }
    }
}

// One slab of 32 rows and 32 tokens: four tiles of sums.
inline void multiply_slab(const char* panel, const char* tokens, int64_t steps, bool begin, char* sums) {
    if (begin) {
        zero_tile<0>(), zero_tile<1>(), zero_tile<2>(), zero_tile<3>();
    } else {
        load_tile<0>(sums), load_tile<1>(sums + tile_bytes), load_tile<2>(sums + 2 * tile_bytes);
        load_tile<3>(sums + 3 * tile_bytes);
    }
    const char* second = tokens + steps * tile_bytes;
    for (int64_t k = 0; k < steps; ++k) {
        load_tile<4>(panel + 2 * k * tile_bytes);
        load_tile<6>(tokens + k * tile_bytes);
        multiply<0, 4, 6>();
        load_tile<7>(second + k * tile_bytes);
        multiply<1, 4, 7>();
        load_tile<5>(panel + (2 * k + 1) * tile_bytes);
        multiply<2, 5, 6>();
        multiply<3, 5, 7>();
    }
    store_tile<0>(sums), store_tile<1>(sums + tile_bytes), store_tile<2>(sums + 2 * tile_bytes);
    store_tile<3>(sums + 3 * tile_bytes);
}

// fp32 -> bf16 in the low halves, to nearest, ties to even; NaN stays NaN.
inline __m256i narrow(__m512 value) {
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(_mm512_srli_epi32(sum, 16), nan, _mm512_set1_epi32(0x7fc0)));
}

// The sums of 16 rows and 16 tokens, of which `rows` and `tokens` are wanted.
void write_out(const char* sums, int64_t rows, int64_t tokens, const float* bias, uint16_t* out, int64_t stride) {
    const __mmask16 keep = static_cast<__mmask16>(rows >= 16 ? 0xffff : (1 << rows) - 1);
    const __m512 shift = bias ? _mm512_maskz_loadu_ps(keep, bias) : _mm512_setzero_ps();
    __m512i a[16];
    for (int i = 0; i < 16; ++i) a[i] = _mm512_load_si512(sums + i * line);
    transpose(a);
    for (int64_t t = 0; t < tokens && t < 16; ++t) {
        _mm256_mask_storeu_epi16(out + t * stride, keep, narrow(_mm512_add_ps(_mm512_castsi512_ps(a[t]), shift)));
    }
}

bool ask_for_tiles() {
    unsigned a, b, c, d;
    constexpr unsigned bf16 = 1u << 22, tile = 1u << 24;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & bf16) == 0 || (d & tile) == 0) return false;
    constexpr long request_permission = 0x1023, tile_data = 18;  // Linux, Documentation/arch/x86/xstate.rst
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

}  // namespace

bool usable() {
    static const bool allowed = ask_for_tiles();
    return allowed;
}

int64_t packed_bytes(int64_t tokens, int64_t columns) {
    return 2 * up(tokens, pair_tokens) * up(columns, tile_columns);
}

int64_t sums_bytes(int64_t rows, int64_t tokens) {
    return panel_rows * slab_columns * 2 + 4 * up(rows, panel_rows) * up(least(tokens, block_tokens), pair_tokens);
}

void pack(const uint16_t* x, int64_t tokens, int64_t columns, int64_t tile, char* packed) {
    const int64_t block = tile / (block_tokens / tile_rows);
    const Packed place(tokens, columns, block);
    tile -= block * (block_tokens / tile_rows);
    const int64_t first = block * block_tokens + tile * tile_rows;
    for (int64_t step = 0; step < place.steps; ++step) {
        __m512i a[16];
        for (int64_t i = 0; i < 16; ++i) {
            const int64_t left = first + i < tokens ? columns - step * tile_columns : 0;
            a[i] = load_columns(x + (first + i) * columns + step * tile_columns, left);
        }
        transpose(a);
        const int64_t slab = step / slab_steps;
        char* to = packed + place.tile(slab, tile) + step % slab_steps * tile_bytes;
        for (int64_t i = 0; i < 16; ++i) _mm512_store_si512(to + i * line, a[i]);
    }
}

void product(const uint16_t* weight, int64_t rows, int64_t columns, const char* packed, int64_t tokens,
             const float* bias, char* panel, uint16_t* out, int64_t stride) {
    const Tiles tiles;
    char* const sums = panel + panel_rows * slab_columns * 2;
    const int64_t panels = up(rows, panel_rows) / panel_rows;
    for (int64_t block = 0; block * block_tokens < tokens; ++block) {
        const Packed place(tokens, columns, block);
        const int64_t pairs = place.tiles / 2, slabs = (place.steps + slab_steps - 1) / slab_steps;
        for (int64_t slab = 0; slab < slabs; ++slab) {
            const int64_t steps = place.steps_of(slab);
            for (int64_t p = 0; p < panels; ++p) {
                pack_panel(weight + p * panel_rows * columns, rows - p * panel_rows, columns, slab, panel);
                for (int64_t pair = 0; pair < pairs; ++pair) {
                    multiply_slab(panel, packed + place.tile(slab, 2 * pair), steps, slab == 0,
                                  sums + (p * pairs + pair) * 4 * tile_bytes);
                }
            }
        }
        for (int64_t p = 0; p < panels; ++p) {
            for (int64_t t = 0; t < 4 * pairs; ++t) {
                const int64_t row = p * panel_rows + t / 2 % 2 * tile_rows;
                const int64_t token = block * block_tokens + t / 4 * pair_tokens + t % 2 * tile_rows;
                if (row >= rows || token >= tokens) continue;
                write_out(sums + (p * pairs * 4 + t) * tile_bytes, rows - row, tokens - token,
                          bias ? bias + row : nullptr, out + token * stride + row, stride);
            }
        }
    }
}

}  // namespace amx
}  // namespace bitquilt

#else  // no such units, or a compiler without them

namespace bitquilt {
namespace amx {

bool usable() { return false; }
int64_t packed_bytes(int64_t, int64_t) { return 0; }
int64_t sums_bytes(int64_t, int64_t) { return 0; }
void pack(const uint16_t*, int64_t, int64_t, int64_t, char*) {}
void product(const uint16_t*, int64_t, int64_t, const char*, int64_t, const float*, char*, uint16_t*, int64_t) {}

}  // namespace amx
}  // namespace bitquilt

#endif
