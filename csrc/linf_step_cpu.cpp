#include "linf_step.h"

namespace clae_fast {

#define CLAE_FAST_DECLARE(isa)                           \
  namespace isa {                                        \
  void linf_step(const LinfStepArgs& args, int threads); \
  }
CLAE_FAST_DECLARE(portable)
#ifdef CLAE_FAST_HAS_AVX2
CLAE_FAST_DECLARE(avx2)
#endif
#ifdef CLAE_FAST_HAS_AVX512
CLAE_FAST_DECLARE(avx512)
#endif

void linf_step_cpu(Isa isa, const LinfStepArgs& args, int threads) {
  switch (isa) {
#ifdef CLAE_FAST_HAS_AVX512
    case Isa::avx512:
      return avx512::linf_step(args, threads);
#endif
#ifdef CLAE_FAST_HAS_AVX2
    case Isa::avx2:
      return avx2::linf_step(args, threads);
#endif
    default:
      return portable::linf_step(args, threads);
  }
}

}  // namespace clae_fast
