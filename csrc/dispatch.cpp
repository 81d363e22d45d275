// The entry point of every op that a *_simd.cpp implements. Such a file is compiled once for each
// instruction set, into a namespace named after it. The entry point calls the copy for args.isa.
#include "augment.h"
#include "bank_step.h"
#include "hard_nt_xent.h"
#include "info_nce.h"
#include "linf_step.h"
#include "nt_xent.h"
#include "tied_nt_xent.h"
#include "topk_similarity.h"
#include "uel.h"

// Every processor of an architecture can run the baseline.
#if defined(__aarch64__)
#define CLAE_FAST_BASELINE neon
#else
#define CLAE_FAST_BASELINE portable
#endif

// The other instruction sets are there only if the build has compiled them.
#define CLAE_FAST_CASE(name, op) \
  case Isa::name:                \
    return name::op(args);

#ifdef CLAE_FAST_HAS_AVX2
#define CLAE_FAST_CASE_AVX2(op) CLAE_FAST_CASE(avx2, op)
#else
#define CLAE_FAST_CASE_AVX2(op)
#endif
#ifdef CLAE_FAST_HAS_AVX512
#define CLAE_FAST_CASE_AVX512(op) CLAE_FAST_CASE(avx512, op)
#else
#define CLAE_FAST_CASE_AVX512(op)
#endif
#ifdef CLAE_FAST_HAS_AVX512_BF16
#define CLAE_FAST_CASE_AVX512_BF16(op) CLAE_FAST_CASE(avx512_bf16, op)
#else
#define CLAE_FAST_CASE_AVX512_BF16(op)
#endif

#define CLAE_FAST_DECLARE(name, Result, op, Args) \
  namespace name {                                \
  Result op(const Args& args);                    \
  }

#define CLAE_FAST_OP(Result, op, Args)                    \
  CLAE_FAST_DECLARE(CLAE_FAST_BASELINE, Result, op, Args) \
  CLAE_FAST_DECLARE(avx2, Result, op, Args)               \
  CLAE_FAST_DECLARE(avx512, Result, op, Args)             \
  CLAE_FAST_DECLARE(avx512_bf16, Result, op, Args)        \
  Result op(const Args& args) {                           \
    switch (args.isa) {                                   \
      CLAE_FAST_CASE_AVX2(op)                             \
      CLAE_FAST_CASE_AVX512(op)                           \
      CLAE_FAST_CASE_AVX512_BF16(op)                      \
      default:                                            \
        return CLAE_FAST_BASELINE::op(args);              \
    }                                                     \
  }

namespace clae_fast {

CLAE_FAST_OP(int64_t, augment, AugmentArgs)
CLAE_FAST_OP(int64_t, bank_step, BankStepArgs)
CLAE_FAST_OP(int64_t, hard_nt_xent, HardNtXentArgs)
CLAE_FAST_OP(int64_t, info_nce, InfoNceArgs)
CLAE_FAST_OP(void, linf_step, LinfStepArgs)
CLAE_FAST_OP(int64_t, nt_xent, TwoViewsArgs)
CLAE_FAST_OP(int64_t, tied_nt_xent, TiedNtXentArgs)
CLAE_FAST_OP(int64_t, topk_similarity, TopkSimilarityArgs)
CLAE_FAST_OP(int64_t, uel, TwoViewsArgs)

}  // namespace clae_fast
