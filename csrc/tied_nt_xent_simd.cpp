#include "symmetric.h"
#include "tied_nt_xent.h"

namespace clae_fast {
namespace CLAE_FAST_ISA {

// Both views are the same rows. A row is its own positive, and each negative is there twice.
int64_t tied_nt_xent(const TiedNtXentArgs& args) {
  return symmetric({args, args.z, args.z, args.N, args.N, args.D, /*positive=*/0, Pairs::twice,
                    args.temperature, nullptr, args.dz, nullptr});
}

}  // namespace CLAE_FAST_ISA
}  // namespace clae_fast
