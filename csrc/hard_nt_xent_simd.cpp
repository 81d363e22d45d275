#include "hard_nt_xent.h"
#include "symmetric.h"

namespace clae_fast {
namespace CLAE_FAST_ISA {

int64_t hard_nt_xent(const HardNtXentArgs& args) {
  SymmetricArgs all = two_views(args);
  // a single pair has no negatives
  if (args.N > 1) all.hardness = {args.beta, args.tau_plus, args.detach_weights};
  return all.hardness.beta > 0 ? symmetric<true>(all) : symmetric(all);
}

}  // namespace CLAE_FAST_ISA
}  // namespace clae_fast
