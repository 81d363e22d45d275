// The Python module `_C`, and the only file that knows Python. Python passes addresses as integers,
// C++ exceptions become Python's, and an op runs without the GIL.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <tuple>
#include <type_traits>

#include "augment.h"
#include "bank_step.h"
#include "hard_nt_xent.h"
#include "info_nce.h"
#include "isa.h"
#include "linf_step.h"
#include "nt_xent.h"
#include "stem_step.h"
#include "tied_nt_xent.h"
#include "topk_similarity.h"
#include "uel.h"

namespace py = pybind11;

namespace clae_fast {
namespace {

// What Python passes for a field of an op's arguments: numbers as they are, ...
template <class Field, bool = std::is_class_v<Field>>
struct Passed {
  using Type = Field;
  static Field convert(Field value) { return value; }
};

// ... for memory its address, ...
template <class Element>
struct Passed<Element*, false> {
  using Type = std::uintptr_t;
  static Element* convert(std::uintptr_t address) { return reinterpret_cast<Element*>(address); }
};

// ... for a struct of numbers the address of an array of them, ...
template <class Struct>
struct Passed<Struct, true> {
  using Type = std::uintptr_t;
  static Struct convert(std::uintptr_t address) { return *reinterpret_cast<Struct*>(address); }
};

// ... for rows their address, dtype and the elements from row to row, ...
template <>
struct Passed<Rows> {
  using Type = std::tuple<std::uintptr_t, int, int64_t>;
  static Rows convert(const Type& rows) {
    const auto [address, dtype, stride] = rows;
    return {reinterpret_cast<const void*>(address), DType(dtype), stride};
  }
};

// ... for a dtype its number, and for an instruction set its name.
template <>
struct Passed<DType> {
  using Type = int;
  static DType convert(int number) { return DType(number); }
};

template <>
struct Passed<Isa> {
  using Type = std::string;
  static Isa convert(const std::string& name) { return parse_isa(name); }
};

// Makes `op` a function of the module, whose arguments are the given fields of Args in that order.
// `op` is a template's argument so that it is called by name: tests load this file without the ops
// that they do not call.
template <class Args, auto op, class... Owners, class... Fields>
void bind(py::module_& m, const char* name, Fields Owners::*... fields) {
  m.def(name, [=](typename Passed<Fields>::Type... values) {
    Args args{};
    ((args.*fields = Passed<Fields>::convert(values)), ...);
    py::gil_scoped_release nogil;
    return op(args);
  });
}

void register_nt_xent(py::module_& m) {
  using Args = TwoViewsArgs;
  bind<Args, nt_xent>(m, "nt_xent", &Args::isa, &Args::z0, &Args::z1, &Args::N, &Args::D,
                      &Args::temperature, &Args::threads, &Args::loss, &Args::dz, &Args::workspace);
#ifdef CLAE_FAST_CUDA
  using Cuda = NtXentCudaArgs;
  bind<Cuda, nt_xent_cuda>(m, "nt_xent_cuda", &Cuda::z0, &Cuda::z1, &Cuda::dtype,
                           &Cuda::row_stride0, &Cuda::column_stride0, &Cuda::row_stride1,
                           &Cuda::column_stride1, &Cuda::N, &Cuda::D, &Cuda::temperature,
                           &Cuda::loss, &Cuda::dz, &Cuda::workspace, &Cuda::stream);
#endif
}

void register_tied_nt_xent(py::module_& m) {
  using Args = TiedNtXentArgs;
  bind<Args, tied_nt_xent>(m, "tied_nt_xent", &Args::isa, &Args::z, &Args::N, &Args::D,
                           &Args::temperature, &Args::threads, &Args::dz, &Args::workspace);
}

void register_hard_nt_xent(py::module_& m) {
  using Args = HardNtXentArgs;
  bind<Args, hard_nt_xent>(m, "hard_nt_xent", &Args::isa, &Args::z0, &Args::z1, &Args::N, &Args::D,
                           &Args::temperature, &Args::beta, &Args::tau_plus, &Args::detach_weights,
                           &Args::threads, &Args::loss, &Args::dz, &Args::workspace);
}

void register_info_nce(py::module_& m) {
  using Args = InfoNceArgs;
  bind<Args, info_nce>(m, "info_nce", &Args::isa, &Args::anchor, &Args::keys, &Args::positive,
                       &Args::weight, &Args::N, &Args::M, &Args::D, &Args::temperature,
                       &Args::symmetric, &Args::mean, &Args::threads, &Args::loss, &Args::danchor,
                       &Args::dkeys, &Args::workspace);
}

void register_bank_step(py::module_& m) {
  using Args = BankStepArgs;
  bind<Args, bank_step>(m, "bank_step", &Args::isa, &Args::bank, &Args::velocity, &Args::anchor,
                        &Args::keys, &Args::positive, &Args::weight, &Args::losses, &Args::K,
                        &Args::N, &Args::D, &Args::views, &Args::temperature, &Args::lr,
                        &Args::momentum, &Args::weight_decay, &Args::threads, &Args::workspace);
}

void register_uel(py::module_& m) {
  using Args = TwoViewsArgs;
  bind<Args, uel>(m, "uel", &Args::isa, &Args::z0, &Args::z1, &Args::N, &Args::D,
                  &Args::temperature, &Args::threads, &Args::loss, &Args::dz, &Args::workspace);
}

void register_topk_similarity(py::module_& m) {
  using Args = TopkSimilarityArgs;
  bind<Args, topk_similarity>(m, "topk_similarity", &Args::isa, &Args::anchor, &Args::keys,
                              &Args::exclude, &Args::N, &Args::M, &Args::D, &Args::E, &Args::k,
                              &Args::threads, &Args::values, &Args::indices, &Args::workspace);
}

void register_linf_step(py::module_& m) {
  using Args = LinfStepArgs;
  bind<Args, linf_step>(m, "linf_step_cpu", &Args::isa, &Args::x, &Args::grad, &Args::x0,
                        &Args::out, &Args::x_dtype, &Args::grad_dtype, &Args::size, &Args::bounds,
                        &Args::channels, &Args::channel_stride, &Args::threads);
#ifdef CLAE_FAST_CUDA
  using Cuda = LinfStepCudaArgs;
  bind<Cuda, linf_step_cuda>(m, "linf_step_cuda", &Cuda::x, &Cuda::grad, &Cuda::x0, &Cuda::out,
                             &Cuda::x_dtype, &Cuda::grad_dtype, &Cuda::size, &Cuda::bounds,
                             &Cuda::channels, &Cuda::channel_stride, &Cuda::layout,
                             &Cuda::bounds_on_device, &Cuda::stream);
#endif
}

void register_stem_step([[maybe_unused]] py::module_& m) {
#ifdef CLAE_FAST_CUDA
  using Args = StemStepArgs;
  bind<Args, stem_step_cuda>(m, "stem_step_cuda", &Args::dy, &Args::weight, &Args::x, &Args::out,
                             &Args::dy_dtype, &Args::weight_dtype, &Args::x_dtype, &Args::N,
                             &Args::C, &Args::H, &Args::W, &Args::size, &Args::strides,
                             &Args::bounds, &Args::bounds_on_device, &Args::stream);
#endif
}

void register_augment(py::module_& m) {
  using Args = AugmentArgs;
  bind<Args, augment>(m, "augment", &Args::isa, &Args::images, &Args::strides, &Args::offsets,
                      &Args::sizes, &Args::params, &Args::rows, &Args::N, &Args::size,
                      &Args::bicubic, &Args::norm, &Args::dtype, &Args::channels_last,
                      &Args::threads, &Args::out, &Args::workspace);
}

}  // namespace
}  // namespace clae_fast

PYBIND11_MODULE(_C, m) {
  using namespace clae_fast;
  m.attr("version") = CLAE_FAST_VERSION;
#ifdef CLAE_FAST_CUDA
  m.attr("cuda") = true;
#else
  m.attr("cuda") = false;
#endif
  m.def("isas", [] {
    py::list names;
    for (const auto& name : supported_isas()) names.append(name);
    return names;
  });
  register_nt_xent(m);
  register_tied_nt_xent(m);
  register_hard_nt_xent(m);
  register_info_nce(m);
  register_bank_step(m);
  register_uel(m);
  register_topk_similarity(m);
  register_linf_step(m);
  register_stem_step(m);
  register_augment(m);
}
