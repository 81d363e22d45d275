#include "info_nce.h"

namespace clae_fast {

CLAE_FAST_DECLARE(int64_t info_nce_workspace(const InfoNceArgs& args))
CLAE_FAST_DECLARE(void info_nce(const InfoNceArgs& args))

int64_t info_nce_workspace(Isa isa, const InfoNceArgs& args) {
  CLAE_FAST_DISPATCH(isa, info_nce_workspace(args))
}

void info_nce(Isa isa, const InfoNceArgs& args) { CLAE_FAST_DISPATCH(isa, info_nce(args)) }

}  // namespace clae_fast
