#include "uel.h"

namespace clae_fast {

CLAE_FAST_DECLARE(int64_t uel_workspace(DType dtype, int64_t N, int64_t D, int threads, bool grad))
CLAE_FAST_DECLARE(void uel(const UelArgs& args))

int64_t uel_workspace(Isa isa, DType dtype, int64_t N, int64_t D, int threads, bool grad) {
  CLAE_FAST_DISPATCH(isa, uel_workspace(dtype, N, D, threads, grad))
}

void uel(Isa isa, const UelArgs& args) { CLAE_FAST_DISPATCH(isa, uel(args)) }

}  // namespace clae_fast
