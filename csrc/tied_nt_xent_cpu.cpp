#include "tied_nt_xent.h"

namespace clae_fast {

CLAE_FAST_DECLARE(int64_t tied_nt_xent_workspace(DType dtype, int64_t N, int64_t D))
CLAE_FAST_DECLARE(void tied_nt_xent(const TiedNtXentArgs& args))

int64_t tied_nt_xent_workspace(Isa isa, DType dtype, int64_t N, int64_t D) {
  CLAE_FAST_DISPATCH(isa, tied_nt_xent_workspace(dtype, N, D))
}

void tied_nt_xent(Isa isa, const TiedNtXentArgs& args) {
  CLAE_FAST_DISPATCH(isa, tied_nt_xent(args))
}

}  // namespace clae_fast
