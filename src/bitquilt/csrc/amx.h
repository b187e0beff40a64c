// Matrix tiles (AMX): bf16 products of many tokens with unpacked rows. A tile is 16 rows of 64 bytes.
//
// torch's bf16 product keeps these units busy for a third of the time, 43 ms for 512 tokens and 4096 x 11008. Here it is
// 31 to 37: sums stay in the L2 cache, 32 rows of a slab of columns in the L1 cache. The units alone would take 15, sums
// written and read once per slab 21. Prefetching made it slower: it occupies the buffers in which the L1 cache waits for
// the L2 cache.
#pragma once

#include <cstdint>

namespace bitquilt {
namespace amx {

constexpr int64_t panel_rows = 32;     // of the weight: two tiles; two more hold tokens, four hold sums
constexpr int64_t slab_columns = 256;  // a panel of them is 16 KiB
constexpr int64_t block_tokens = 512;  // whose slab and sums fit the L2 cache together

// Whether processor and system let this process use the tiles; requests the permission.
bool usable();

// Bytes of all tokens as `pack` writes them, and of the working memory of `product`; both begin at a cache line.
int64_t packed_bytes(int64_t tokens, int64_t columns);
int64_t sums_bytes(int64_t rows, int64_t tokens);

// Packs tokens 16 * tile to 16 * tile + 15 of x bf16 [tokens, columns] for the tiles; zeros past both ends.
void pack(const uint16_t* x, int64_t tokens, int64_t columns, int64_t tile, char* packed);

// weight bf16 [rows, columns], packed x -> out bf16: token t, row r at out + t * stride + r. bias fp32 [rows] or null.
void product(const uint16_t* weight, int64_t rows, int64_t columns, const char* packed, int64_t tokens,
             const float* bias, char* memory, uint16_t* out, int64_t stride);

}  // namespace amx
}  // namespace bitquilt
