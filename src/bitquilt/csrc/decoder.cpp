#include "decoder.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "clones.h"
#include "pool.h"
#include "scalar.h"

namespace bitquilt {
namespace {

BITQUILT_EVERY_ISA float dot_f32(const float* x, const float* y, int64_t count) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < count; ++i) sum += x[i] * y[i];
    return sum;
}

BITQUILT_EVERY_ISA float dot_bf16(const float* x, const uint16_t* y, int64_t count) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < count; ++i) sum += x[i] * from_bfloat(y[i]);
    return sum;
}

BITQUILT_EVERY_ISA float dot_f16(const float* x, const uint16_t* y, int64_t count) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < count; ++i) sum += x[i] * from_half(y[i]);
    return sum;
}

BITQUILT_EVERY_ISA void add_f32(float factor, const float* y, int64_t count, float* out) {
    for (int64_t i = 0; i < count; ++i) out[i] += factor * y[i];
}

BITQUILT_EVERY_ISA void add_bf16(float factor, const uint16_t* y, int64_t count, float* out) {
    for (int64_t i = 0; i < count; ++i) out[i] += factor * from_bfloat(y[i]);
}

float dot(const float* x, const void* y, Type type, int64_t first, int64_t count) {
    if (type == Type::f32) return dot_f32(x, static_cast<const float*>(y) + first, count);
    const uint16_t* half = static_cast<const uint16_t*>(y) + first;
    return type == Type::bf16 ? dot_bf16(x, half, count) : dot_f16(x, half, count);
}

BITQUILT_EVERY_ISA void norm(const float* x, const float* weight, int64_t count, float epsilon, float* out) {
    float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < count; ++i) squares += x[i] * x[i];
    const float factor = 1.0f / std::sqrt(squares / static_cast<float>(count) + epsilon);
    for (int64_t i = 0; i < count; ++i) out[i] = x[i] * factor * weight[i];
}

// e^x within 2e-7 of it, without branches: 2^n from the exponent's bits, the rest by its series.
inline float exponential(float x) {
    const float clamped = std::min(std::max(x, -87.0f), 88.0f);
    const float n = std::nearbyint(clamped * 1.44269504f);
    const float rest = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
    float sum = 1.0f / 720.0f;
    for (const float term : {1.0f / 120.0f, 1.0f / 24.0f, 1.0f / 6.0f, 0.5f, 1.0f, 1.0f}) sum = sum * rest + term;
    return sum * from_bits(static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23);
}

// gate = silu(gate) * up
BITQUILT_EVERY_ISA void gated(float* gate, const float* up, int64_t count) {
    for (int64_t i = 0; i < count; ++i) gate[i] = gate[i] / (1.0f + exponential(-gate[i])) * up[i];
}

// scores = e^(scores - most); returns their sum.
BITQUILT_EVERY_ISA float exponentials(float* scores, int64_t count, float most) {
    float sum = 0.0f;
    for (int64_t i = 0; i < count; ++i) scores[i] = exponential(scores[i] - most);
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < count; ++i) sum += scores[i];
    return sum;
}

// Completes the product with the codes: a gain per row, then the bias.
BITQUILT_EVERY_ISA void by_row(float* y, const float* gains, const float* bias, int64_t count) {
    if (bias) {
        for (int64_t i = 0; i < count; ++i) y[i] = y[i] * gains[i] + bias[i];
    } else {
        for (int64_t i = 0; i < count; ++i) y[i] *= gains[i];
    }
}

// Rotary positions of one head: its first `rotary` entries turn in pairs (i, i + rotary / 2).
void rotate(float* x, const float* cosine, const float* sine, int64_t rotary) {
    const int64_t half = rotary / 2;
    for (int64_t i = 0; i < half; ++i) {
        const float low = x[i], high = x[i + half];
        x[i] = low * cosine[i] - high * sine[i];
        x[i + half] = high * cosine[i + half] + low * sine[i + half];
    }
}

void keep(const float* from, int64_t count, Type type, void* to, int64_t first) {
    if (type == Type::f32) {
        std::copy_n(from, count, static_cast<float*>(to) + first);
    } else {
        for (int64_t i = 0; i < count; ++i) static_cast<uint16_t*>(to)[first + i] = to_bfloat(from[i]);
    }
}

const float* floats(uintptr_t address) { return reinterpret_cast<const float*>(address); }

[[noreturn]] void fail(const std::string& message) { throw std::invalid_argument(message); }

}  // namespace

Decoder::Decoder(const std::vector<int64_t>& sizes, double epsilon, double scale)
    : epsilon_(static_cast<float>(epsilon)), scale_(static_cast<float>(scale)) {
    if (sizes.size() != 8) fail("a decoder has 8 sizes, not " + std::to_string(sizes.size()));
    for (const int64_t size : sizes) {
        if (size < 1 || size > int64_t{1} << 32) fail("a decoder's size is " + std::to_string(size));
    }
    hidden_ = sizes[0], heads_ = sizes[1], kv_heads_ = sizes[2], head_dim_ = sizes[3];
    rotary_ = sizes[4], inner_ = sizes[5], vocabulary_ = sizes[6], length_ = sizes[7];
    if (heads_ % kv_heads_ != 0 || rotary_ % 2 != 0 || rotary_ > head_dim_) {
        fail(std::to_string(heads_) + " heads, " + std::to_string(kv_heads_) + " of keys, " + std::to_string(rotary_) +
             " of " + std::to_string(head_dim_) + " entries that turn: they do not go together");
    }
}

void Decoder::add_layer(const std::vector<const Handle*>& products, const std::vector<uintptr_t>& arrays,
                        int64_t cache_type) {
    constexpr const char* names[] = {"query", "key", "value", "output", "gate", "up", "down"};
    const int64_t query = heads_ * head_dim_, key = kv_heads_ * head_dim_;
    const int64_t wanted[][2] = {{query, hidden_}, {key, hidden_},    {key, hidden_},   {hidden_, query},
                                 {inner_, hidden_}, {inner_, hidden_}, {hidden_, inner_}};
    if (products.size() != 7 || arrays.size() != 20) fail("a layer has 7 products and 20 arrays");
    Layer layer{};
    for (int i = 0; i < 7; ++i) {
        const Handle* product = products[static_cast<size_t>(i)];
        if (!product || product->rows() != wanted[i][0] || product->columns() != wanted[i][1]) {
            fail(std::string(names[i]) + " is not [" + std::to_string(wanted[i][0]) + ", " +
                 std::to_string(wanted[i][1]) + "]");
        }
        layer.product[i] = product;
        layer.bias[i] = floats(arrays[static_cast<size_t>(i)]);
        layer.gains[i] = floats(arrays[static_cast<size_t>(13 + i)]);
    }
    layer.before_attention = floats(arrays[7]);
    layer.before_mlp = floats(arrays[8]);
    layer.query_norm = floats(arrays[9]);
    layer.key_norm = floats(arrays[10]);
    layer.keys = reinterpret_cast<void*>(arrays[11]);
    layer.values = reinterpret_cast<void*>(arrays[12]);
    layer.cache_type = checked_type("cache", cache_type);
    if (layer.cache_type == Type::f16) fail("the cache is fp32 or bf16");
    if (!layer.before_attention || !layer.before_mlp || !layer.keys || !layer.values) {
        fail("a layer has two norms, keys and values");
    }
    layers_.push_back(layer);
}

void Decoder::set_ends(uintptr_t norm, uintptr_t cosines, uintptr_t sines) {
    if (!norm || !cosines || !sines) fail("a decoder has a norm, cosines and sines");
    norm_ = floats(norm);
    cosines_ = floats(cosines);
    sines_ = floats(sines);
}

void Decoder::set_head(uintptr_t head, int64_t type) {
    if (!head) fail("a decoder has a head");
    head_type_ = checked_type("head", type);
    head_ = reinterpret_cast<const void*>(head);
    product_head_ = nullptr;
    head_parts_.clear();
}

void Decoder::set_product_head(const Handle& head, uintptr_t gains) {
    if (head.rows() != vocabulary_ || head.columns() != hidden_) {
        fail("the head is [" + std::to_string(head.rows()) + ", " + std::to_string(head.columns()) + "], not [" +
             std::to_string(vocabulary_) + ", " + std::to_string(hidden_) + "]");
    }
    product_head_ = &head;
    head_gains_ = floats(gains);
    head_ = nullptr;
    head_parts_.clear();
}

void Decoder::add_head_part(const Handle& part, uintptr_t rows) {
    if (!rows || part.columns() != hidden_) {
        fail("a part of the head has " + std::to_string(part.columns()) + " columns, not " + std::to_string(hidden_) +
             ", or no rows");
    }
    const auto* to = reinterpret_cast<const int32_t*>(rows);
    for (int64_t i = 0; i < part.rows(); ++i) {
        if (to[i] < 0 || to[i] >= vocabulary_) {
            fail("row " + std::to_string(to[i]) + " of the head is not in 0 .. " + std::to_string(vocabulary_ - 1));
        }
    }
    head_parts_.push_back({&part, to});
    head_ = nullptr;
    product_head_ = nullptr;
}

void Decoder::step(uintptr_t embedding, int64_t position, uintptr_t logits, int digits, int threads) const {
    check_threads(threads);
    if (!norm_ || !(head_ || product_head_ || !head_parts_.empty())) fail("the decoder has no ends yet");
    if (position < 0 || position >= length_) {
        fail("position is " + std::to_string(position) + "; the cache has " + std::to_string(length_) + " places");
    }
    const int64_t key_size = kv_heads_ * head_dim_;
    std::vector<float> x(floats(embedding), floats(embedding) + hidden_), in(static_cast<size_t>(hidden_)),
        query(static_cast<size_t>(heads_ * head_dim_)), key(static_cast<size_t>(key_size)), value(key.size()),
        mixed(query.size()), out(static_cast<size_t>(hidden_)), gate(static_cast<size_t>(inner_)), up(gate.size());
    const auto product = [&](const Layer& layer, int i, const std::vector<float>& from, std::vector<float>& to) {
        const float *bias = layer.bias[i], *gains = layer.gains[i];
        layer.product[i]->matmul(from.data(), Type::f32, 1, static_cast<int64_t>(from.size()), gains ? nullptr : bias,
                                 to.data(), digits, threads);
        if (gains) by_row(to.data(), gains, bias, static_cast<int64_t>(to.size()));
    };
    const float *cosine = cosines_ + position * rotary_, *sine = sines_ + position * rotary_;
    const auto turn = [&](float* head, const float* weight) {
        if (weight) norm(head, weight, head_dim_, epsilon_, head);
        rotate(head, cosine, sine, rotary_);
    };
    for (const Layer& layer : layers_) {
        norm(x.data(), layer.before_attention, hidden_, epsilon_, in.data());
        product(layer, 0, in, query);
        product(layer, 1, in, key);
        product(layer, 2, in, value);
        for (int64_t h = 0; h < heads_; ++h) turn(query.data() + h * head_dim_, layer.query_norm);
        for (int64_t h = 0; h < kv_heads_; ++h) {
            const int64_t place = (h * length_ + position) * head_dim_;
            turn(key.data() + h * head_dim_, layer.key_norm);
            keep(key.data() + h * head_dim_, head_dim_, layer.cache_type, layer.keys, place);
            keep(value.data() + h * head_dim_, head_dim_, layer.cache_type, layer.values, place);
        }
        attend(layer, query.data(), position, mixed.data(), threads);
        product(layer, 3, mixed, out);
        for (size_t i = 0; i < x.size(); ++i) x[i] += out[i];
        norm(x.data(), layer.before_mlp, hidden_, epsilon_, in.data());
        product(layer, 4, in, gate);
        product(layer, 5, in, up);
        gated(gate.data(), up.data(), inner_);
        product(layer, 6, gate, out);
        for (size_t i = 0; i < x.size(); ++i) x[i] += out[i];
    }
    norm(x.data(), norm_, hidden_, epsilon_, in.data());
    float* y = reinterpret_cast<float*>(logits);
    if (product_head_) {
        product_head_->matmul(in.data(), Type::f32, 1, hidden_, nullptr, y, digits, threads);
        if (head_gains_) by_row(y, head_gains_, nullptr, vocabulary_);
        return;
    }
    if (!head_parts_.empty()) {
        std::vector<float> made;
        for (const HeadPart& part : head_parts_) {
            made.resize(static_cast<size_t>(part.product->rows()));
            part.product->matmul(in.data(), Type::f32, 1, hidden_, nullptr, made.data(), digits, threads);
            for (size_t i = 0; i < made.size(); ++i) y[part.rows[i]] = made[i];
        }
        return;
    }
    constexpr int64_t rows = 64;
    parallel_for(static_cast<int>((vocabulary_ + rows - 1) / rows), threads, [&](int piece) {
        const int64_t begin = piece * rows, end = std::min(begin + rows, vocabulary_);
        const int64_t row_bytes = hidden_ * (head_type_ == Type::f32 ? 4 : 2);
        for (int64_t row = begin; row < end; ++row) {
            const char* next = static_cast<const char*>(head_) + std::min(row + 1, vocabulary_ - 1) * row_bytes;
            for (int64_t i = 0; i < row_bytes; i += 64) __builtin_prefetch(next + i);  // the hardware prefetcher stops at 4 KiB
            y[row] = dot(in.data(), head_, head_type_, row * hidden_, hidden_);
        }
    });
}

void Decoder::attend(const Layer& layer, const float* query, int64_t position, float* out, int threads) const {
    const int64_t group = heads_ / kv_heads_, count = position + 1;
    if (count * heads_ * head_dim_ < 1 << 15) threads = 1;  // some 5 us of work
    parallel_for(static_cast<int>(kv_heads_), threads, [&](int kv) {
        thread_local std::vector<float> scores;
        if (static_cast<int64_t>(scores.size()) < count) scores.resize(static_cast<size_t>(length_));
        for (int64_t h = kv * group; h < (kv + 1) * group; ++h) {
            float most = -INFINITY;
            for (int64_t p = 0; p < count; ++p) {
                const int64_t place = (kv * length_ + p) * head_dim_;
                const float score = scale_ * dot(query + h * head_dim_, layer.keys, layer.cache_type, place, head_dim_);
                scores[static_cast<size_t>(p)] = score;
                most = std::max(most, score);
            }
            float* to = out + h * head_dim_;
            std::fill_n(to, head_dim_, 0.0f);
            const float sum = exponentials(scores.data(), count, most);
            for (int64_t p = 0; p < count; ++p) {
                const float weight = scores[static_cast<size_t>(p)];
                const int64_t place = (kv * length_ + p) * head_dim_;
                if (layer.cache_type == Type::f32) {
                    add_f32(weight, static_cast<const float*>(layer.values) + place, head_dim_, to);
                } else {
                    add_bf16(weight, static_cast<const uint16_t*>(layer.values) + place, head_dim_, to);
                }
            }
            for (int64_t i = 0; i < head_dim_; ++i) to[i] /= sum;
        }
    });
}

}  // namespace bitquilt
