// The instruction sets that *_simd.cpp is compiled for, and the choice of one at run time.
#pragma once

#include <string>
#include <vector>

namespace clae_fast {

enum class Isa { portable, avx2, avx512 };

// Compiled in and supported by this processor, worst first.
std::vector<std::string> supported_isas();

// Throws std::invalid_argument when `name` is not one of supported_isas().
Isa parse_isa(const std::string& name);

}  // namespace clae_fast
