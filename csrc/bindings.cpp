// The only file that knows Python: raw addresses in, exceptions out, the GIL released.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "isa.h"
#include "nt_xent.h"

namespace py = pybind11;

namespace {

template <class T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
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

  m.def("nt_xent_workspace", [](const std::string& isa, int64_t N, int64_t D, bool grad) {
    return clae_fast::nt_xent_workspace(clae_fast::parse_isa(isa), N, D, grad);
  });

  m.def("nt_xent", [](const std::string& isa, std::uintptr_t z0, std::uintptr_t z1, int64_t stride0,
                      int64_t stride1, int64_t N, int64_t D, float temperature, int threads,
                      std::uintptr_t loss, std::uintptr_t dz, std::uintptr_t workspace) {
    const auto chosen = clae_fast::parse_isa(isa);
    py::gil_scoped_release nogil;
    clae_fast::nt_xent(chosen, {pointer<const float>(z0), pointer<const float>(z1), stride0, stride1,
                                N, D, temperature, threads, pointer<float>(loss), pointer<float>(dz),
                                pointer<unsigned char>(workspace)});
  });
}
