#include "linf_step.h"

namespace clae_fast {

CLAE_FAST_DECLARE(void linf_step(const LinfStepArgs& args, int threads))

void linf_step_cpu(Isa isa, const LinfStepArgs& args, int threads) {
  CLAE_FAST_DISPATCH(isa, linf_step(args, threads))
}

}  // namespace clae_fast
