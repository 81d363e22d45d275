// Arrays out of one piece of scratch memory; for *_simd.cpp alone.
#pragma once

#include <cstdint>

namespace clae_fast {
namespace CLAE_FAST_ISA {
namespace {

constexpr int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// Takes arrays out of a workspace, or counts their bytes where there is none yet.
struct Carver {
  unsigned char* base;
  int64_t bytes = 0;

  template <class Element>
  Element* take(int64_t count) {
    unsigned char* pointer = base + bytes;
    bytes += round_up(count * int64_t(sizeof(Element)), 64);
    return reinterpret_cast<Element*>(pointer);
  }
};

}  // namespace
}  // namespace CLAE_FAST_ISA
}  // namespace clae_fast
