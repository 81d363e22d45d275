#include "hard_nt_xent.h"

namespace clae_fast {

CLAE_FAST_DECLARE(int64_t hard_nt_xent_workspace(const HardNtXentArgs& args))
CLAE_FAST_DECLARE(void hard_nt_xent(const HardNtXentArgs& args))

int64_t hard_nt_xent_workspace(Isa isa, const HardNtXentArgs& args) {
  CLAE_FAST_DISPATCH(isa, hard_nt_xent_workspace(args))
}

void hard_nt_xent(Isa isa, const HardNtXentArgs& args) {
  CLAE_FAST_DISPATCH(isa, hard_nt_xent(args))
}

}  // namespace clae_fast
