#include "parallel.h"

#include <dirent.h>
#include <dlfcn.h>
#include <link.h>
#include <pthread.h>
#include <sched.h>

#include <cstring>
#include <string>
#include <vector>

namespace clae_fast {
namespace {

// Entry points of an OpenMP runtime. This module does not link libgomp: many builds of torch bring
// a copy of their own, and a second one would have a second pool of threads. Instead the entry
// points are looked up in the process. LLVM's and Intel's runtimes have the same ones.
struct OpenMP {
  void (*parallel)(void (*body)(void*), void* context, unsigned threads, unsigned flags) = nullptr;
  int (*in_parallel)() = nullptr;
  int (*thread_num)() = nullptr;
  int (*num_threads)() = nullptr;

  bool complete() const { return parallel && in_parallel && thread_num && num_threads; }
};

template <class Function>
void look_up(void* library, const char* name, Function*& function) {
  function = reinterpret_cast<Function*>(dlsym(library, name));
}

// Adds a loaded library to the paths if it is an OpenMP runtime.
int add_runtime(dl_phdr_info* info, size_t, void* paths) {
  const char* file = std::strrchr(info->dlpi_name, '/');
  if (file && (std::strstr(file, "libgomp") || std::strstr(file, "libomp") ||
               std::strstr(file, "libiomp"))) {
    static_cast<std::vector<std::string>*>(paths)->emplace_back(info->dlpi_name);
  }
  return 0;
}

OpenMP find_openmp() {
  // the loader holds a lock while it lists libraries; opening one then could deadlock
  std::vector<std::string> paths;
  dl_iterate_phdr(add_runtime, &paths);
  OpenMP found;
  for (const std::string& path : paths) {
    void* library = dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
    if (library == nullptr) continue;
    OpenMP candidate;
    look_up(library, "GOMP_parallel", candidate.parallel);
    look_up(library, "omp_in_parallel", candidate.in_parallel);
    look_up(library, "omp_get_thread_num", candidate.thread_num);
    look_up(library, "omp_get_num_threads", candidate.num_threads);
    // other packages may bring a runtime too, which torch does not use
    const bool of_torch =
        path.find("/torch/") != path.npos || path.find("/torch.libs/") != path.npos;
    if (candidate.complete() && (of_torch || !found.complete())) found = candidate;
    if (candidate.complete() && of_torch) break;
  }
  return found;
}

bool has_threads() {
  DIR* tasks = opendir("/proc/self/task");
  if (tasks == nullptr) return true;
  int count = 0;
  while (const dirent* task = readdir(tasks)) count += task->d_name[0] != '.';
  closedir(tasks);
  return count > 1;
}

// A forked child has none of its parent's threads, but its runtime would wait for them for ever.
bool had_threads = false;
bool lost_threads = false;
const int registered = pthread_atfork([] { had_threads = has_threads(); },
                                      nullptr,
                                      [] { lost_threads |= had_threads; });

const OpenMP& openmp() {
  static const OpenMP found = find_openmp();
  return found;
}

struct Job {
  void (*body)(void* context, Team& team, int rank);
  void* context;
  Team* team;
};

void run_job(void* context) {
  const Job& job = *static_cast<Job*>(context);
  // a runtime with a limit starts fewer threads than asked for; all threads see the same number
  job.team->set_size(openmp().num_threads());
  job.body(job.context, *job.team, openmp().thread_num());
}

}  // namespace

void relax(int spins) {
  if (spins > 1000) sched_yield();
}

int Team::size() const { return __atomic_load_n(&size_, __ATOMIC_RELAXED); }

void Team::set_size(int size) { __atomic_store_n(&size_, size, __ATOMIC_RELAXED); }

void Team::barrier() {
  const int passed = __atomic_load_n(&passed_, __ATOMIC_ACQUIRE);
  if (__atomic_add_fetch(&arrived_, 1, __ATOMIC_ACQ_REL) == size()) {
    __atomic_store_n(&arrived_, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&passed_, passed + 1, __ATOMIC_RELEASE);
    return;
  }
  for (int spins = 0; __atomic_load_n(&passed_, __ATOMIC_ACQUIRE) == passed; ++spins) relax(spins);
}

void run_team(int threads, void (*body)(void*, Team&, int), void* context) {
  Team team;
  const bool alone = threads <= 1 || lost_threads || !openmp().complete() || openmp().in_parallel();
  if (alone) return body(context, team, 0);
  Job job{body, context, &team};
  openmp().parallel(run_job, &job, unsigned(threads), 0);
}

}  // namespace clae_fast
