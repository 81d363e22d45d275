#include "hard_nt_xent.h"
#include "symmetric.h"

namespace clae_fast {
namespace CLAE_FAST_ISA {

namespace {

// One pair alone has no negatives that could be hard.
bool is_weighted(const HardNtXentArgs& args) { return args.beta > 0 && args.N > 1; }

}  // namespace

int64_t hard_nt_xent_workspace(const HardNtXentArgs& args) {
  return symmetric_workspace(args.z0.dtype, 2 * args.N, args.D, args.dz != nullptr,
                             is_weighted(args));
}

void hard_nt_xent(const HardNtXentArgs& args) {
  const Hardness hardness{args.beta, args.tau_plus, args.detach_weights};
  float* dz1 = args.dz ? args.dz + args.N * args.D : nullptr;
  const SymmetricArgs all{args.z0,        args.z1,
                          args.N,         2 * args.N,
                          args.D,         /*positive=*/args.N,
                          Pairs::all,     args.temperature,
                          args.threads,   args.loss,
                          args.dz,        dz1,
                          args.workspace, args.N > 1 ? hardness : Hardness{}};
  is_weighted(args) ? symmetric<true>(all) : symmetric(all);
}

}  // namespace CLAE_FAST_ISA
}  // namespace clae_fast
