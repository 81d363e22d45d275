// An OpenMP runtime for csrc/parallel.cpp, which looks for a shared library of this name in the
// process. Its threads are std::thread's, because the ThreadSanitizer can follow those.
#include <thread>
#include <vector>

namespace {

thread_local int thread_num = 0;
thread_local int num_threads = 1;

}  // namespace

extern "C" {

int omp_in_parallel() { return num_threads > 1; }
int omp_get_thread_num() { return thread_num; }
int omp_get_num_threads() { return num_threads; }

void GOMP_parallel(void (*body)(void*), void* context, unsigned threads, unsigned) {
  const auto run = [=](int rank) {
    thread_num = rank;
    num_threads = int(threads);
    body(context);
    thread_num = 0;
    num_threads = 1;
  };
  std::vector<std::thread> others;
  for (unsigned rank = 1; rank < threads; ++rank) others.emplace_back(run, int(rank));
  run(0);
  for (auto& thread : others) thread.join();
}
}
