#include "symmetric.h"
#include "tied_nt_xent.h"

namespace clae_fast {
namespace CLAE_FAST_ISA {

int64_t tied_nt_xent_workspace(DType dtype, int64_t N, int64_t D) {
  return symmetric_workspace(dtype, N, D, true);
}

// Both views are the same rows: a row is its own positive, and every negative is there twice.
void tied_nt_xent(const TiedNtXentArgs& args) {
  symmetric({args.z, args.z, args.N, args.N, args.D, /*positive=*/0, Pairs::twice, args.temperature,
             args.threads, nullptr, args.dz, nullptr, args.workspace});
}

}  // namespace CLAE_FAST_ISA
}  // namespace clae_fast
