// The only file that knows Python: raw addresses in, exceptions out, the GIL released.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <tuple>

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

namespace {

template <class T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// address, dtype, elements from row to row
using PyRows = std::tuple<std::uintptr_t, int, int64_t>;

clae_fast::Rows rows(const PyRows& z) {
  return {pointer<const void>(std::get<0>(z)), clae_fast::DType(std::get<1>(z)), std::get<2>(z)};
}

clae_fast::LinfStepArgs linf_step_args(std::uintptr_t x,
                                       std::uintptr_t grad,
                                       std::uintptr_t x0,
                                       std::uintptr_t out,
                                       int x_dtype,
                                       int grad_dtype,
                                       int64_t size,
                                       std::uintptr_t bounds,
                                       int64_t channels,
                                       int64_t channel_stride) {
  return {pointer<void>(x),
          pointer<void>(grad),
          pointer<void>(x0),
          pointer<void>(out),
          clae_fast::DType(x_dtype),
          clae_fast::DType(grad_dtype),
          size,
          pointer<const float>(bounds),
          channels,
          channel_stride};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.attr("version") = CLAE_FAST_VERSION;
#ifdef CLAE_FAST_CUDA
  m.attr("cuda") = true;
#else
  m.attr("cuda") = false;
#endif

  m.def("isas", [] {
    py::list names;
    for (const auto& name : clae_fast::supported_isas()) names.append(name);
    return names;
  });

  m.def("nt_xent_workspace",
        [](const std::string& isa, int dtype, int64_t N, int64_t D, bool grad) {
          return clae_fast::nt_xent_workspace(clae_fast::parse_isa(isa), clae_fast::DType(dtype), N,
                                              D, grad);
        });

  m.def("nt_xent", [](const std::string& isa, const PyRows& z0, const PyRows& z1, int64_t N,
                      int64_t D, float temperature, int threads, std::uintptr_t loss,
                      std::uintptr_t dz, std::uintptr_t workspace) {
    const auto chosen = clae_fast::parse_isa(isa);
    py::gil_scoped_release nogil;
    clae_fast::nt_xent(chosen,
                       {rows(z0), rows(z1), N, D, temperature, threads, pointer<float>(loss),
                        pointer<float>(dz), pointer<unsigned char>(workspace)});
  });

  m.def("tied_nt_xent_workspace", [](const std::string& isa, int dtype, int64_t N, int64_t D) {
    return clae_fast::tied_nt_xent_workspace(clae_fast::parse_isa(isa), clae_fast::DType(dtype), N,
                                             D);
  });

  m.def("tied_nt_xent",
        [](const std::string& isa, const PyRows& z, int64_t N, int64_t D, float temperature,
           int threads, std::uintptr_t dz, std::uintptr_t workspace) {
          const auto chosen = clae_fast::parse_isa(isa);
          py::gil_scoped_release nogil;
          clae_fast::tied_nt_xent(chosen, {rows(z), N, D, temperature, threads, pointer<float>(dz),
                                           pointer<unsigned char>(workspace)});
        });

  m.def("info_nce",
        [](const std::string& isa, const PyRows& anchor, const PyRows& keys,
           std::uintptr_t positive, std::uintptr_t weight, int64_t N, int64_t M, int64_t D,
           float temperature, bool symmetric, bool mean, int threads, std::uintptr_t loss,
           std::uintptr_t danchor, std::uintptr_t dkeys, std::uintptr_t workspace) {
          const auto chosen = clae_fast::parse_isa(isa);
          const clae_fast::InfoNceArgs args{rows(anchor),
                                            rows(keys),
                                            pointer<const int64_t>(positive),
                                            pointer<const float>(weight),
                                            N,
                                            M,
                                            D,
                                            temperature,
                                            symmetric,
                                            mean,
                                            threads,
                                            pointer<float>(loss),
                                            pointer<float>(danchor),
                                            pointer<float>(dkeys),
                                            pointer<unsigned char>(workspace)};
          py::gil_scoped_release nogil;
          // without a workspace the call tells how many bytes it takes
          if (workspace == 0) return clae_fast::info_nce_workspace(chosen, args);
          clae_fast::info_nce(chosen, args);
          return int64_t(0);
        });

  m.def("hard_nt_xent",
        [](const std::string& isa, const PyRows& z0, const PyRows& z1, int64_t N, int64_t D,
           float temperature, float beta, float tau_plus, bool detach_weights, int threads,
           std::uintptr_t loss, std::uintptr_t dz, std::uintptr_t workspace) {
          const auto chosen = clae_fast::parse_isa(isa);
          const clae_fast::HardNtXentArgs args{rows(z0),
                                               rows(z1),
                                               N,
                                               D,
                                               temperature,
                                               beta,
                                               tau_plus,
                                               detach_weights,
                                               threads,
                                               pointer<float>(loss),
                                               pointer<float>(dz),
                                               pointer<unsigned char>(workspace)};
          py::gil_scoped_release nogil;
          if (workspace == 0) return clae_fast::hard_nt_xent_workspace(chosen, args);
          clae_fast::hard_nt_xent(chosen, args);
          return int64_t(0);
        });

  m.def("bank_step",
        [](const std::string& isa, std::uintptr_t bank, std::uintptr_t velocity,
           const PyRows& anchor, const PyRows& keys, std::uintptr_t positive, std::uintptr_t weight,
           std::uintptr_t losses, int64_t K, int64_t N, int64_t D, int64_t views, float temperature,
           float lr, float momentum, float weight_decay, int threads, std::uintptr_t workspace) {
          const auto chosen = clae_fast::parse_isa(isa);
          const clae_fast::BankStepArgs args{pointer<float>(bank),
                                             pointer<float>(velocity),
                                             rows(anchor),
                                             rows(keys),
                                             pointer<const int64_t>(positive),
                                             pointer<const float>(weight),
                                             pointer<const float>(losses),
                                             K,
                                             N,
                                             D,
                                             views,
                                             temperature,
                                             lr,
                                             momentum,
                                             weight_decay,
                                             threads,
                                             pointer<unsigned char>(workspace)};
          py::gil_scoped_release nogil;
          if (workspace == 0) return clae_fast::bank_step_workspace(chosen, args);
          clae_fast::bank_step(chosen, args);
          return int64_t(0);
        });

  m.def("uel_workspace",
        [](const std::string& isa, int dtype, int64_t N, int64_t D, int threads, bool grad) {
          return clae_fast::uel_workspace(clae_fast::parse_isa(isa), clae_fast::DType(dtype), N, D,
                                          threads, grad);
        });

  m.def("uel", [](const std::string& isa, const PyRows& z0, const PyRows& z1, int64_t N, int64_t D,
                  float temperature, int threads, std::uintptr_t loss, std::uintptr_t dz,
                  std::uintptr_t workspace) {
    const auto chosen = clae_fast::parse_isa(isa);
    py::gil_scoped_release nogil;
    clae_fast::uel(chosen, {rows(z0), rows(z1), N, D, temperature, threads, pointer<float>(loss),
                            pointer<float>(dz), pointer<unsigned char>(workspace)});
  });

  m.def("topk_similarity",
        [](const std::string& isa, const PyRows& anchor, const PyRows& keys, std::uintptr_t exclude,
           int64_t N, int64_t M, int64_t D, int64_t E, int64_t k, int threads,
           std::uintptr_t values, std::uintptr_t indices, std::uintptr_t workspace) {
          const auto chosen = clae_fast::parse_isa(isa);
          const clae_fast::TopkSimilarityArgs args{rows(anchor),
                                                   rows(keys),
                                                   pointer<const int64_t>(exclude),
                                                   N,
                                                   M,
                                                   D,
                                                   E,
                                                   k,
                                                   threads,
                                                   pointer<float>(values),
                                                   pointer<int64_t>(indices),
                                                   pointer<unsigned char>(workspace)};
          py::gil_scoped_release nogil;
          if (workspace == 0) return clae_fast::topk_similarity_workspace(chosen, args);
          clae_fast::topk_similarity(chosen, args);
          return int64_t(0);
        });

  m.def("linf_step_cpu",
        [](const std::string& isa, std::uintptr_t x, std::uintptr_t grad, std::uintptr_t x0,
           std::uintptr_t out, int x_dtype, int grad_dtype, int64_t size, std::uintptr_t bounds,
           int64_t channels, int64_t channel_stride, int threads) {
          const auto chosen = clae_fast::parse_isa(isa);
          py::gil_scoped_release nogil;
          clae_fast::linf_step_cpu(chosen,
                                   linf_step_args(x, grad, x0, out, x_dtype, grad_dtype, size,
                                                  bounds, channels, channel_stride),
                                   threads);
        });

  m.def("augment",
        [](const std::string& isa, std::uintptr_t images, std::uintptr_t strides,
           std::uintptr_t offsets, std::uintptr_t sizes, std::uintptr_t params, std::uintptr_t rows,
           int64_t N, int64_t size, bool bicubic, std::uintptr_t norm, int dtype,
           bool channels_last, int threads, std::uintptr_t out, std::uintptr_t workspace) {
          const auto chosen = clae_fast::parse_isa(isa);
          const clae_fast::AugmentArgs args{pointer<const uint8_t>(images),
                                            pointer<const int64_t>(strides),
                                            pointer<const int64_t>(offsets),
                                            pointer<const int64_t>(sizes),
                                            pointer<const float>(params),
                                            pointer<const int64_t>(rows),
                                            N,
                                            size,
                                            bicubic,
                                            pointer<const float>(norm),
                                            clae_fast::DType(dtype),
                                            channels_last,
                                            threads,
                                            pointer<void>(out),
                                            pointer<unsigned char>(workspace)};
          py::gil_scoped_release nogil;
          if (workspace == 0) return clae_fast::augment_workspace(chosen, args);
          clae_fast::augment(chosen, args);
          return int64_t(0);
        });

#ifdef CLAE_FAST_CUDA
  m.def("nt_xent_cuda_workspace", [](int64_t N, int64_t D, bool grad) {
    return clae_fast::nt_xent_cuda_workspace(N, D, grad);
  });

  m.def("nt_xent_cuda", [](std::uintptr_t z0, std::uintptr_t z1, int dtype, int64_t row_stride0,
                           int64_t column_stride0, int64_t row_stride1, int64_t column_stride1,
                           int64_t N, int64_t D, float temperature, std::uintptr_t loss,
                           std::uintptr_t dz, std::uintptr_t workspace, std::uintptr_t stream) {
    py::gil_scoped_release nogil;
    clae_fast::nt_xent_cuda(
        {pointer<const void>(z0), pointer<const void>(z1), clae_fast::DType(dtype), row_stride0,
         column_stride0, row_stride1, column_stride1, N, D, temperature, pointer<float>(loss),
         pointer<float>(dz), pointer<unsigned char>(workspace)},
        pointer<void>(stream));
  });

  m.def("linf_step_cuda", [](std::uintptr_t x, std::uintptr_t grad, std::uintptr_t x0,
                             std::uintptr_t out, int x_dtype, int grad_dtype, int64_t size,
                             std::uintptr_t bounds, int64_t channels, int64_t channel_stride,
                             std::uintptr_t layout, bool bounds_on_device, std::uintptr_t stream) {
    py::gil_scoped_release nogil;
    clae_fast::linf_step_cuda(linf_step_args(x, grad, x0, out, x_dtype, grad_dtype, size, bounds,
                                             channels, channel_stride),
                              *pointer<const clae_fast::LinfLayout>(layout), bounds_on_device,
                              pointer<void>(stream));
  });

  m.def("stem_step_cuda", [](std::uintptr_t dy, std::uintptr_t weight, std::uintptr_t x,
                             std::uintptr_t out, int dy_dtype, int weight_dtype, int x_dtype, int N,
                             int C, int H, int W, int size, std::uintptr_t strides,
                             std::uintptr_t bounds, bool bounds_on_device, std::uintptr_t stream) {
    py::gil_scoped_release nogil;
    clae_fast::stem_step_cuda(
        {pointer<void>(dy), pointer<void>(weight), pointer<void>(x), pointer<void>(out),
         clae_fast::DType(dy_dtype), clae_fast::DType(weight_dtype), clae_fast::DType(x_dtype), N,
         C, H, W, size, *pointer<const clae_fast::StemStrides>(strides),
         pointer<const float>(bounds)},
        bounds_on_device, pointer<void>(stream));
  });
#endif
}
