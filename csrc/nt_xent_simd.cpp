#include "nt_xent.h"
#include "symmetric.h"

namespace clae_fast {
namespace CLAE_FAST_ISA {

int64_t nt_xent_workspace(DType dtype, int64_t N, int64_t D, bool grad) {
  return symmetric_workspace(dtype, 2 * N, D, grad);
}

void nt_xent(const NtXentArgs& args) {
  float* dz1 = args.dz ? args.dz + args.N * args.D : nullptr;
  symmetric({args.z0, args.z1, args.N, 2 * args.N, args.D, /*positive=*/args.N, Pairs::all,
             args.temperature, args.threads, args.loss, args.dz, dz1, args.workspace});
}

}  // namespace CLAE_FAST_ISA
}  // namespace clae_fast
