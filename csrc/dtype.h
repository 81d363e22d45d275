#pragma once

namespace clae_fast {

// The numbers are those of _DTYPES in clae_fast/_native.py.
enum class DType : int { fp32, fp16, bf16 };

}  // namespace clae_fast
