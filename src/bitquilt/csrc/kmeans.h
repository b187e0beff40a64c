// Exact one-dimensional k-means of many columns; `exact_kmeans` in layer/grids/kmeans.py is the definition.
#pragma once

#include <cstdint>

namespace bitquilt {

// Working memory of one thread; `splits` has (k - 2) * (n + 1) entries (none for k < 3), the others n + 1 each.
struct KmeansScratch {
    double *s0, *s1, *s2, *best, *next, *reduced;
    int32_t* splits;
};

// Doubles of working memory in front of the splits, for columns of n values.
inline int64_t kmeans_doubles(int64_t n) { return 6 * (n + 1); }

// One column: x [n] ascending, w [n] >= 0, n >= 1, k >= 1 -> centroids [k] ascending, boundaries [k + 1].
void kmeans_column(const double* x, const double* w, int64_t n, int64_t k, const KmeansScratch& scratch,
                   double* centroids, int64_t* boundaries);

// Columns [columns, n] of x and w, each ascending -> centroids [columns, k], boundaries [columns, k + 1].
// Throws std::invalid_argument for impossible sizes, std::bad_alloc where the working memory does not fit.
void kmeans(const double* x, const double* w, int64_t columns, int64_t n, int64_t k, double* centroids,
            int64_t* boundaries, int threads);

}  // namespace bitquilt
