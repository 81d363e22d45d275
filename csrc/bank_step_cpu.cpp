#include "bank_step.h"

namespace clae_fast {

CLAE_FAST_DECLARE(int64_t bank_step_workspace(const BankStepArgs& args))
CLAE_FAST_DECLARE(void bank_step(const BankStepArgs& args))

int64_t bank_step_workspace(Isa isa, const BankStepArgs& args) {
  CLAE_FAST_DISPATCH(isa, bank_step_workspace(args))
}

void bank_step(Isa isa, const BankStepArgs& args) { CLAE_FAST_DISPATCH(isa, bank_step(args)) }

}  // namespace clae_fast
