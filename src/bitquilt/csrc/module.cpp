// bitquilt._kernels: addresses and sizes in, results in the caller's memory. No torch, no numpy; the GIL is released.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "amx.h"
#include "bandwidth.h"
#include "decoder.h"
#include "handle.h"
#include "kmeans.h"
#include "pool.h"

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

}  // namespace

NB_MODULE(_kernels, m) {
    nb::set_leak_warnings(false);  // modules that live until the interpreter ends hold their handles: no leak, no message
    m.def("levels", &level_names);
    m.def("use_team", &use_team);
    m.def("matrix_units", &amx::usable);
    m.def("read_bandwidth", &read_bandwidth, Released());
    m.def("kmeans", &kmeans_at, Released());
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
        .def("step", &Decoder::step, Released());
    m.attr("MAX_TOKENS") = max_tokens;
}

}  // namespace bitquilt
