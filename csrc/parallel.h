// Loops over threads, on the threads that torch has already: its OpenMP runtime's.
#pragma once

#include <cstdint>

namespace clae_fast {

// The threads that run one function together. Nothing is inline: the linker could keep a copy that
// was compiled for more than this processor has.
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

// Runs body(context, team, rank) once for every rank below team.size(), itself in the caller, and
// returns when all have returned. The team has up to `threads` members, and one alone where more
// would hang or crowd: without an OpenMP runtime in the process, inside a parallel region, and in
// a process forked from one that had threads.
void run_team(int threads, void (*body)(void* context, Team& team, int rank), void* context);

// The same for a callable body(team, rank). A lambda inside an instruction set's namespace keeps
// this instance in it.
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

// What of `count` items falls to a thread of the team.
static inline Range share(int64_t count, const Team& team, int rank) {
  return {count * rank / team.size(), count * (rank + 1) / team.size()};
}

// For the body of a loop that waits for another thread: lets it run after a while.
void relax(int spins);

}  // namespace clae_fast
