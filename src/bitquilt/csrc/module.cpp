// bitquilt._kernels: addresses and sizes in, results in the caller's memory. No torch, no numpy; the GIL is released.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>

#include "amx.h"
#include "bandwidth.h"
#include "decoder.h"
#include "handle.h"
#include "kmeans.h"
#include "pool.h"
#include "sweep.h"

namespace nb = nanobind;

namespace bitquilt {
namespace {

using Released = nb::call_guard<nb::gil_scoped_release>;

void matmul(const Handle& handle, uintptr_t x, int64_t type, int64_t tokens, int64_t columns, uintptr_t bias,
            uintptr_t out, int digits, int threads) {
    handle.matmul(reinterpret_cast<const void*>(x), checked_type("x", type), tokens, columns,
                  reinterpret_cast<const float*>(bias), reinterpret_cast<void*>(out), digits, threads);
}

void reorder(const Handle& handle, uintptr_t x, int64_t item, int64_t tokens, uintptr_t out, int threads) {
    handle.reorder(reinterpret_cast<const void*>(x), item, tokens, reinterpret_cast<void*>(out), threads);
}

void dequantize(const Handle& handle, int64_t first, int64_t last, bool as_stored, uintptr_t out, int64_t type,
                int threads) {
    handle.dequantize(first, last, as_stored, reinterpret_cast<void*>(out), checked_type("output", type), threads);
}

void prefill(const Handle& handle, uintptr_t x, int64_t tokens, int64_t columns, uintptr_t bias, uintptr_t out,
             uintptr_t memory, int threads) {
    handle.prefill(reinterpret_cast<const void*>(x), tokens, columns, reinterpret_cast<const float*>(bias),
                   reinterpret_cast<void*>(out), reinterpret_cast<void*>(memory), threads);
}

void kmeans_at(uintptr_t x, uintptr_t w, int64_t columns, int64_t n, int64_t k, uintptr_t centroids,
               uintptr_t boundaries, int threads) {
    check_threads(threads);
    kmeans(reinterpret_cast<const double*>(x), reinterpret_cast<const double*>(w), columns, n, k,
           reinterpret_cast<double*>(centroids), reinterpret_cast<int64_t*>(boundaries), threads);
}

// A block of the sweep from its addresses: columns, quantized, codes, errors, upper, kept, remainder; its stride of U,
// width, rows and fused rows.
SweepBlock sweep_block(const std::vector<uintptr_t>& at, const std::vector<int64_t>& sizes) {
    if (at.size() != 7 || sizes.size() != 4) throw std::invalid_argument("a block of the sweep has 7 addresses and 4 sizes");
    return {reinterpret_cast<float*>(at[0]),         reinterpret_cast<float*>(at[1]),
            reinterpret_cast<uint8_t*>(at[2]),       reinterpret_cast<float*>(at[3]),
            reinterpret_cast<const float*>(at[4]),   sizes[0],
            sizes[1],                                sizes[2],
            reinterpret_cast<const uint8_t*>(at[5]), reinterpret_cast<uint16_t*>(at[6]),
            sizes[3]};
}

void sweep_uniform_at(const std::vector<uintptr_t>& at, const std::vector<int64_t>& sizes, int64_t first, int64_t last,
                      uintptr_t scale, uintptr_t zero, bool two_levels, int bits, int threads) {
    check_threads(threads);
    const UniformSteps grid{reinterpret_cast<const float*>(scale), reinterpret_cast<const float*>(zero), two_levels, bits};
    sweep_uniform(sweep_block(at, sizes), first, last, grid, threads);
}

void fit_gains_at(uintptr_t columns, uintptr_t counted, int64_t width, int64_t rows, uintptr_t levels, int64_t count,
                  float spread, uintptr_t gain_values, uintptr_t gains, int threads) {
    check_threads(threads);
    const SharedLevels table{reinterpret_cast<const float*>(levels), count, spread};
    fit_gains(reinterpret_cast<const float*>(columns), reinterpret_cast<const float*>(counted), width, rows, table,
              reinterpret_cast<const float*>(gain_values), reinterpret_cast<uint8_t*>(gains), threads);
}

void nearest_at(uintptr_t values, int64_t n, uintptr_t levels, int64_t count, uintptr_t chosen, int threads) {
    check_threads(threads);
    nearest(reinterpret_cast<const float*>(values), n, reinterpret_cast<const float*>(levels), count,
            reinterpret_cast<float*>(chosen), threads);
}

void encode_at(uintptr_t columns, int64_t width, int64_t rows, uintptr_t levels, int64_t count, uintptr_t codes,
               int threads) {
    check_threads(threads);
    encode(reinterpret_cast<const float*>(columns), width, rows, reinterpret_cast<const float*>(levels), count,
           reinterpret_cast<uint8_t*>(codes), threads);
}

void sweep_shared_at(const std::vector<uintptr_t>& at, const std::vector<int64_t>& sizes,
                     const std::vector<uintptr_t>& levels, const std::vector<int64_t>& counts,
                     const std::vector<float>& spreads, uintptr_t table_of, uintptr_t counted, uintptr_t gain_values,
                     uintptr_t gains, int threads) {
    check_threads(threads);
    if (levels.size() != counts.size() || levels.size() != spreads.size()) {
        throw std::invalid_argument("every table of the sweep has an address, a size and a spread");
    }
    std::vector<SharedLevels> tables;
    for (size_t i = 0; i < levels.size(); ++i) {
        tables.push_back({reinterpret_cast<const float*>(levels[i]), counts[i], spreads[i]});
    }
    sweep_shared(sweep_block(at, sizes), tables, reinterpret_cast<const int32_t*>(table_of),
                 reinterpret_cast<const float*>(counted), reinterpret_cast<const float*>(gain_values),
                 reinterpret_cast<uint8_t*>(gains), threads);
}

}  // namespace

NB_MODULE(_kernels, m) {
    nb::set_leak_warnings(false);  // modules that live until the interpreter ends hold their handles: no leak, no message
    m.def("levels", &level_names);
    m.def("use_team", &use_team);
    m.def("matrix_units", &amx::usable);
    m.def("read_bandwidth", &read_bandwidth, Released());
    m.def("kmeans", &kmeans_at, Released());
    m.def("sweep_uniform", &sweep_uniform_at, Released());
    m.def("fit_gains", &fit_gains_at, Released());
    m.def("nearest", &nearest_at, Released());
    m.def("encode", &encode_at, Released());
    m.def("sweep_shared", &sweep_shared_at, Released());
    nb::class_<Handle>(m, "Handle")
        .def(nb::init<const std::string&, const std::vector<int64_t>&>())
        .def("matmul", &matmul, Released())
        .def_prop_ro("reordered", &Handle::reordered)
        .def("reorder", &reorder, Released())
        .def("dequantize", &dequantize, Released())
        .def("prefill", &prefill, Released())
        .def("prefill_bytes", &Handle::prefill_bytes);
    nb::class_<Decoder>(m, "Decoder")
        .def(nb::init<const std::vector<int64_t>&, double, double>())
        .def("add_layer", &Decoder::add_layer, nb::keep_alive<1, 2>())
        .def("set_ends", &Decoder::set_ends)
        .def("set_head", &Decoder::set_head)
        .def("set_product_head", &Decoder::set_product_head, nb::keep_alive<1, 2>())
        .def("add_head_part", &Decoder::add_head_part, nb::keep_alive<1, 2>())
        .def("step", &Decoder::step, Released());
    m.attr("MAX_TOKENS") = max_tokens;
}

}  // namespace bitquilt
