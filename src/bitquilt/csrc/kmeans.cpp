// On a line the best clusters are intervals of the sorted values, so the optimum is a shortest path over prefixes. The
// best start of the last cluster never moves left as the prefix grows: prefixes are solved from the coarsest stride to
// the finest, each searching between the starts found for its solved neighbours. O(k n log n), in double.
#include "kmeans.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "pool.h"

namespace bitquilt {
namespace {

constexpr double tiny = 1e-300;

// Squared error that one cluster over begin..end saves against all its mass at the centre.
inline double gain(const KmeansScratch& s, int64_t begin, int64_t end) {
    const double sum = s.s1[end] - s.s1[begin];
    return sum * sum / std::max(s.s0[end] - s.s0[begin], tiny);
}

// Extends the least errors of all prefixes, `best`, by one more cluster, and finds where that cluster starts.
void one_cluster_more(const KmeansScratch& s, int64_t size, int32_t* split) {
    for (int64_t i = 0; i < size; ++i) s.reduced[i] = s.best[i] - s.s2[i];
    split[0] = 0;
    s.next[0] = 0.0;
    int64_t stride = 1;
    while (stride < size) stride *= 2;
    for (; stride > 1; stride /= 2) {
        const int64_t half = stride / 2;
        for (int64_t end = half; end < size; end += stride) {
            const int64_t low = split[end - half];
            const int64_t high = end + half < size ? std::min<int64_t>(end, split[end + half]) : end;
            double least = std::numeric_limits<double>::infinity();
            int64_t chosen = low;
            for (int64_t begin = low; begin <= high; ++begin) {
                const double value = s.reduced[begin] - gain(s, begin, end);
                if (value < least) {  // the leftmost of equals
                    least = value;
                    chosen = begin;
                }
            }
            split[end] = static_cast<int32_t>(chosen);
            s.next[end] = least + s.s2[end];
        }
    }
}

// Empty clusters (NaN) repeat the centroid on their left, leading ones that on their right; all empty: 0.
void fill_empty(double* means, int64_t k) {
    const double* first = std::find_if(means, means + k, [](double mean) { return !std::isnan(mean); });
    double last = first == means + k ? 0.0 : *first;
    for (int64_t c = 0; c < k; ++c) last = means[c] = std::isnan(means[c]) ? last : means[c];
}

}  // namespace

void kmeans_column(const double* x, const double* w, int64_t n, int64_t k, const KmeansScratch& s, double* centroids,
                   int64_t* boundaries) {
    double mass = 0.0, centre = 0.0;
    for (int64_t i = 0; i < n; ++i) {
        mass += w[i];
        centre += w[i] * x[i];
    }
    centre /= std::max(mass, tiny);  // around the mean the prefix sums lose the fewest digits
    s.s0[0] = s.s1[0] = s.s2[0] = 0.0;
    for (int64_t i = 0; i < n; ++i) {
        const double value = x[i] - centre;
        s.s0[i + 1] = s.s0[i] + w[i];
        s.s1[i + 1] = s.s1[i] + w[i] * value;
        s.s2[i + 1] = s.s2[i] + w[i] * value * value;
    }
    KmeansScratch now = s;
    for (int64_t i = 0; i <= n; ++i) now.best[i] = s.s2[i] - gain(s, 0, i);  // one cluster for each prefix
    for (int64_t c = 2; c < k; ++c) {
        one_cluster_more(now, n + 1, now.splits + (c - 2) * (n + 1));
        std::swap(now.best, now.next);
    }
    boundaries[0] = 0;
    boundaries[k] = n;
    if (k > 1) {  // the last cluster ends at n: only its start is left to choose
        double least = std::numeric_limits<double>::infinity();
        for (int64_t begin = 0; begin <= n; ++begin) {
            const double value = now.best[begin] - s.s2[begin] - gain(s, begin, n);
            if (value < least) {
                least = value;
                boundaries[k - 1] = begin;
            }
        }
    }
    for (int64_t c = k - 2; c > 0; --c) boundaries[c] = now.splits[(c - 1) * (n + 1) + boundaries[c + 1]];
    for (int64_t c = 0; c < k; ++c) {
        const int64_t begin = boundaries[c], end = boundaries[c + 1];
        const double inside = s.s0[end] - s.s0[begin];
        centroids[c] = inside > 0 ? (s.s1[end] - s.s1[begin]) / std::max(inside, tiny)
                                  : std::numeric_limits<double>::quiet_NaN();
    }
    fill_empty(centroids, k);
    for (int64_t c = 0; c < k; ++c) {
        centroids[c] += mass > 0 ? centre : 0.0;
        // means of neighbouring clusters of equal values may differ in the last bit, the wrong way round
        if (c > 0) centroids[c] = std::max(centroids[c], centroids[c - 1]);
    }
}

void kmeans(const double* x, const double* w, int64_t columns, int64_t n, int64_t k, double* centroids,
            int64_t* boundaries, int threads) {
    if (columns < 0 || n < 1 || n >= std::numeric_limits<int32_t>::max() || k < 1 || k > 65536) {
        throw std::invalid_argument("k-means of " + std::to_string(columns) + " columns of " + std::to_string(n) +
                                    " values in " + std::to_string(k) + " clusters; wanted 1 to 2^31 - 2 values and 1 to 65536 clusters");
    }
    // One piece per thread, so that the working memory is allocated here, where a failure can be reported.
    const int pieces = static_cast<int>(std::min<int64_t>(std::max(threads, 1), std::max<int64_t>(columns, 1)));
    const auto doubles = static_cast<size_t>(kmeans_doubles(n));
    const auto splits = static_cast<size_t>(std::max<int64_t>(k - 2, 0) * (n + 1));
    std::vector<std::unique_ptr<double[]>> numbers;
    std::vector<std::unique_ptr<int32_t[]>> starts;
    for (int piece = 0; piece < pieces; ++piece) {
        numbers.emplace_back(new double[doubles]);
        starts.emplace_back(new int32_t[splits]);
    }
    parallel_for(pieces, pieces, [&](int piece) {
        double* at = numbers[static_cast<size_t>(piece)].get();
        const int64_t size = n + 1;
        const KmeansScratch scratch{at,        at + size,     at + 2 * size, at + 3 * size, at + 4 * size, at + 5 * size,
                                    starts[static_cast<size_t>(piece)].get()};
        for (int64_t column = columns * piece / pieces; column < columns * (piece + 1) / pieces; ++column) {
            kmeans_column(x + column * n, w + column * n, n, k, scratch, centroids + column * k,
                          boundaries + column * (k + 1));
        }
    });
}

}  // namespace bitquilt
