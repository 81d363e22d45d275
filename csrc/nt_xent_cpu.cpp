#include "nt_xent.h"

namespace clae_fast {

#define CLAE_FAST_DECLARE(isa)                                \
  namespace isa {                                             \
  int64_t nt_xent_workspace(int64_t N, int64_t D, bool grad); \
  void nt_xent(const NtXentArgs& args);                       \
  }
CLAE_FAST_DECLARE(portable)
#ifdef CLAE_FAST_HAS_AVX2
CLAE_FAST_DECLARE(avx2)
#endif
#ifdef CLAE_FAST_HAS_AVX512
CLAE_FAST_DECLARE(avx512)
#endif

int64_t nt_xent_workspace(Isa isa, int64_t N, int64_t D, bool grad) {
  switch (isa) {
#ifdef CLAE_FAST_HAS_AVX512
    case Isa::avx512:
      return avx512::nt_xent_workspace(N, D, grad);
#endif
#ifdef CLAE_FAST_HAS_AVX2
    case Isa::avx2:
      return avx2::nt_xent_workspace(N, D, grad);
#endif
    default:
      return portable::nt_xent_workspace(N, D, grad);
  }
}

void nt_xent(Isa isa, const NtXentArgs& args) {
  switch (isa) {
#ifdef CLAE_FAST_HAS_AVX512
    case Isa::avx512:
      return avx512::nt_xent(args);
#endif
#ifdef CLAE_FAST_HAS_AVX2
    case Isa::avx2:
      return avx2::nt_xent(args);
#endif
    default:
      return portable::nt_xent(args);
  }
}

}  // namespace clae_fast
