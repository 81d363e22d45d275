// The instruction sets that *_simd.cpp can be compiled for, one of which is chosen at run time.
#pragma once

#include <string>
#include <vector>

namespace clae_fast {

enum class Isa { portable, neon, avx2, avx512, avx512_bf16 };

// The names of those that this build has and this processor can run, worst first.
std::vector<std::string> supported_isas();

// Throws std::invalid_argument when `name` is not one of supported_isas().
Isa parse_isa(const std::string& name);

}  // namespace clae_fast
