#include "nt_xent.h"
#include "symmetric.h"

namespace clae_fast {
namespace CLAE_FAST_ISA {

int64_t nt_xent(const TwoViewsArgs& args) { return symmetric(two_views(args)); }

}  // namespace CLAE_FAST_ISA
}  // namespace clae_fast
