// Takes arrays out of an op's workspace; for *_simd.cpp alone.
#pragma once

#include "simd.h"

namespace clae_fast {
namespace CLAE_FAST_ISA {
namespace {

// Takes one array after another. Without a workspace it counts their bytes; the arrays that it then
// returns must not be used.
struct Carver {
  unsigned char* workspace;
  int64_t bytes = 0;

  template <class Element>
  Element* take(int64_t count) {
    unsigned char* pointer = workspace + bytes;
    bytes += round_up(count * int64_t(sizeof(Element)), 64);
    return reinterpret_cast<Element*>(pointer);
  }
};

// The bytes that carve(carver) takes.
template <class Carve>
int64_t bytes_of(Carve carve) {
  Carver counter{nullptr};
  carve(counter);
  return counter.bytes;
}

}  // namespace
}  // namespace CLAE_FAST_ISA
}  // namespace clae_fast
