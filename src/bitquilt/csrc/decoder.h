// Computes one token through a whole Llama-like decoder without returning to Python: RMS norms, rotary positions,
// grouped attention over a cache, a gated MLP. From Python, torch's operators took 0.14 ms between two products of a
// 1.1B model.
#pragma once

#include <cstdint>
#include <vector>

#include "handle.h"

namespace bitquilt {

// Addresses are the caller's memory, which it keeps alive. Sizes that do not fit throw std::invalid_argument.
class Decoder {
  public:
    // sizes: hidden, heads, kv_heads, head_dim, rotary (the part of a head that turns), inner, vocabulary, length (of
    // the cache). epsilon: of the norms; scale: of the attention's scores.
    Decoder(const std::vector<int64_t>& sizes, double epsilon, double scale);

    // products: query, key, value, output, gate, up, down. arrays: fp32 addresses of their biases (0: none), the norms
    // before attention and MLP, the norms of query and key heads (0: none), then the layer's cache: keys and values
    // [kv_heads, length, head_dim] of type `cache_type` (0 fp32, 2 bf16), then
    // the gains of the products' rows (0: none).
    void add_layer(const std::vector<const Handle*>& products, const std::vector<uintptr_t>& arrays,
                   int64_t cache_type);

    // The last norm, and cosines and sines [length, rotary] of all positions.
    void set_ends(uintptr_t norm, uintptr_t cosines, uintptr_t sines);

    // The head [vocabulary, hidden]: of a type (0 fp32, 1 fp16, 2 bf16), or a stored weight and the gains of its rows (0:
    // none).
    void set_head(uintptr_t head, int64_t type);
    void set_product_head(const Handle& head, uintptr_t gains);

    // A head in parts, added one by one: a stored weight that makes the logits `rows`, int32 [rows of the weight].
    void add_head_part(const Handle& part, uintptr_t rows);

    // x fp32 [hidden], the token's embedding -> logits fp32 [vocabulary]; fills place `position` of the cache.
    void step(uintptr_t x, int64_t position, uintptr_t logits, int digits, int threads) const;

  private:
    struct Layer {
        const Handle* product[7];
        const float *bias[7], *gains[7];
        const float *before_attention, *before_mlp, *query_norm, *key_norm;
        void *keys, *values;
        Type cache_type;
    };

    struct HeadPart {
        const Handle* product;
        const int32_t* rows;
    };

    void attend(const Layer& layer, const float* query, int64_t position, float* out, int threads) const;

    int64_t hidden_, heads_, kv_heads_, head_dim_, rotary_, inner_, vocabulary_, length_;
    float epsilon_, scale_;
    std::vector<Layer> layers_;
    const float *norm_ = nullptr, *cosines_ = nullptr, *sines_ = nullptr;
    const void* head_ = nullptr;           // this, product_head_ or head_parts_
    const Handle* product_head_ = nullptr;
    const float* head_gains_ = nullptr;
    std::vector<HeadPart> head_parts_;
    Type head_type_ = Type::f32;
};

}  // namespace bitquilt
