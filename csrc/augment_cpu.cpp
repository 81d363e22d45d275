#include "augment.h"

namespace clae_fast {

CLAE_FAST_DECLARE(int64_t augment_workspace(const AugmentArgs& args))
CLAE_FAST_DECLARE(void augment(const AugmentArgs& args))

int64_t augment_workspace(Isa isa, const AugmentArgs& args) {
  CLAE_FAST_DISPATCH(isa, augment_workspace(args))
}

void augment(Isa isa, const AugmentArgs& args) { CLAE_FAST_DISPATCH(isa, augment(args)) }

}  // namespace clae_fast
