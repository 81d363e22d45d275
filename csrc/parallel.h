// Runs loops on the threads of torch's OpenMP runtime, so that the process has no second pool.
#pragma once

#include <cstdint>

namespace clae_fast {

// The threads that run one function together. No member is inline, because the linker could keep a
// copy that was compiled for an instruction set that this processor lacks.
class Team {
 public:
  int size() const;
  void set_size(int size);
  // Waits for all threads of the team.
  void barrier();

 private:
  int size_ = 1;
  int arrived_ = 0;
  int passed_ = 0;
};

// Runs body(context, team, rank) once for every rank below team.size(), one of them in the calling
// thread, and returns when all have returned. The team has at most `threads` members. It has only
// one where the process has no OpenMP runtime, where the caller is itself in a parallel region, and
// where the process was forked from one that had threads: there more threads would hang or crowd
// each other.
void run_team(int threads, void (*body)(void* context, Team& team, int rank), void* context);

// The same for a callable body(team, rank). If the body is a lambda of an instruction set's
// namespace, then this instance belongs to that namespace too.
template <class Body>
inline void parallel(int threads, Body body) {
  run_team(
      threads,
      [](void* context, Team& team, int rank) { (*static_cast<Body*>(context))(team, rank); },
      &body);
}

struct Range {
  int64_t begin, end;
};

// The part of `count` items that a thread of the team works on, in whole blocks of `block` items.
static inline Range share(int64_t count, const Team& team, int rank, int64_t block = 1) {
  const int64_t blocks = count / block;
  return {blocks * rank / team.size() * block, blocks * (rank + 1) / team.size() * block};
}

// Call this in a loop that waits for another thread: after many spins it yields the processor.
void relax(int spins);

}  // namespace clae_fast
