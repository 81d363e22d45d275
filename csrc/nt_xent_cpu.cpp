#include "nt_xent.h"

namespace clae_fast {

CLAE_FAST_DECLARE(int64_t nt_xent_workspace(DType dtype, int64_t N, int64_t D, bool grad))
CLAE_FAST_DECLARE(void nt_xent(const NtXentArgs& args))

int64_t nt_xent_workspace(Isa isa, DType dtype, int64_t N, int64_t D, bool grad) {
  CLAE_FAST_DISPATCH(isa, nt_xent_workspace(dtype, N, D, grad))
}

void nt_xent(Isa isa, const NtXentArgs& args) { CLAE_FAST_DISPATCH(isa, nt_xent(args)) }

}  // namespace clae_fast
