// Runs the threads of CUDA C++ kernels as fibers of one CPU thread.
//
// A fiber runs until it has to meet others: at a barrier, or in an operation of a whole warp. The
// last one to arrive performs the operation for all. The blocks of a cooperative launch are alive at
// the same time; other blocks run one after another. What would hang or be undefined on a GPU throws
// std::runtime_error: threads that wait at different places, threads that end while others wait for
// them, and writes past the end of the dynamic shared memory.
//
// CUDA_EMULATOR_ORDER chooses one of two orders of the threads. With "up", lower threads run first
// and asynchronous copies arrive at once. With "down", higher threads run first, and copies arrive
// when somebody waits for them. A kernel that lacks a barrier or a wait has different results in both.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

// the section of all static shared variables, where there are any
extern "C" __attribute__((weak, visibility("hidden"))) char __start_cuda_shared[];
extern "C" __attribute__((weak, visibility("hidden"))) char __stop_cuda_shared[];

namespace cuda_emulator {

constexpr size_t kStack = 256 << 10;  // reserved for a thread; what it does not touch costs nothing
constexpr size_t kGuard = 4096;       // bytes behind the dynamic shared memory that stay poisoned
constexpr size_t kAlignment = 128;    // of the dynamic shared memory
constexpr unsigned char kPoison = 0xff;  // makes NaN of every floating-point type

inline std::string setting(const char* name, const char* otherwise) {
  const char* value = std::getenv(name);
  return value ? value : otherwise;
}

// Threads that can meet: a warp, a block or the grid.
struct Group {
  const char* name;
  int size = 0;
  int arrived = 0;
  const char* what = nullptr;
  int line = 0;
};

struct Copy {
  void* to;
  const void* from;
  int bytes;
  int valid;  // so many bytes are copied, the others become zero

  void run() const {
    std::memcpy(to, from, valid);
    std::memset(static_cast<char*>(to) + valid, 0, bytes - valid);
  }
};

struct Block;

struct Thread {
  uint3 index;
  Block* block;
  Group* warp;
  int first_of_warp;  // its number in the block
  char* stack;
  jmp_buf context;
  bool started = false;
  bool ended = false;
  Group* waits_for = nullptr;
  void* operand = nullptr;
  std::vector<std::vector<Copy>> copies{1};  // groups that are under way, the last one open
};

struct Block {
  uint3 index;
  std::vector<Thread> threads;
  std::vector<Group> warps;
  Group group{"block"};
  std::vector<unsigned char> shared;         // dynamic, aligned and with a guard
  std::vector<unsigned char> static_shared;  // while another block runs

  unsigned char* dynamic_shared() {
    return shared.data() + (-reinterpret_cast<uintptr_t>(shared.data()) & (kAlignment - 1));
  }
};

struct Launch {
  std::function<void()> kernel;
  size_t shared_bytes;
  bool cooperative;
  bool late;  // the order is "down"
  Group grid{"grid"};
  std::exception_ptr error = nullptr;
  jmp_buf scheduler = {};
};

inline Launch* launch = nullptr;
inline Thread* current = nullptr;

[[noreturn]] inline void fail(const std::string& what) {
  throw std::runtime_error("CUDA emulator: " + what);
}

inline std::string place(const Group& group) {
  return std::string(group.what) + " in line " + std::to_string(group.line);
}

inline void leave() {
  if (!_setjmp(current->context)) _longjmp(launch->scheduler, 1);
}

// Waits until all threads of the group are here. The last one runs `act` before any of them goes on.
template <class Act>
void meet(Group& group, const char* what, int line, const Act& act) {
  if (!group.arrived) {
    group.what = what;
    group.line = line;
  } else if (std::strcmp(group.what, what) || group.line != line) {
    Group here = group;
    here.what = what;
    here.line = line;
    fail("threads of a " + std::string(group.name) + " diverge between " + place(group) + " and " +
         place(here));
  }
  current->waits_for = &group;
  if (++group.arrived < group.size) return leave();
  act();
  group.arrived = 0;
  current->waits_for = nullptr;
}

inline bool can_run(const Thread& thread) {
  // whoever arrived last reset the count, and nobody can arrive again before all have left
  return !thread.ended && !thread.waits_for;
}

inline void release(std::vector<Thread>& threads, const Group& group) {
  for (Thread& thread : threads) {
    if (thread.waits_for == &group) thread.waits_for = nullptr;
  }
}

inline std::vector<Block>* blocks_alive = nullptr;

inline void meet_grid(const char* what, int line) {
  if (!launch->cooperative) fail("grid.sync() in a launch that is not cooperative");
  meet(launch->grid, what, line, [] {
    for (Block& block : *blocks_alive) release(block.threads, launch->grid);
  });
}

inline void meet_block(const char* what, int line) {
  Block& block = *current->block;
  meet(block.group, what, line, [&] { release(block.threads, block.group); });
}

// `act` takes the operands of the warp's threads, in their order.
template <class Operand, class Act>
void meet_warp(const char* what, int line, Operand& operand, const Act& act) {
  current->operand = &operand;
  Thread* threads = &current->block->threads[current->first_of_warp];
  Group& warp = *current->warp;
  meet(warp, what, line, [&] {
    Operand* operands[warpSize];
    for (int lane = 0; lane < warp.size; ++lane) {
      operands[lane] = static_cast<Operand*>(threads[lane].operand);
      threads[lane].waits_for = nullptr;
    }
    act(operands, warp.size);
  });
}

inline void run_thread() {
  try {
    launch->kernel();
  } catch (...) {
    launch->error = std::current_exception();
  }
  current->ended = true;
  _longjmp(launch->scheduler, 1);
}

inline void resume(Thread& thread) {
  current = &thread;
  threadIdx = thread.index;
  if (_setjmp(launch->scheduler)) return;
  if (thread.started) _longjmp(thread.context, 1);
  thread.started = true;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = thread.stack;
  context.uc_stack.ss_size = kStack;
  context.uc_link = nullptr;
  makecontext(&context, run_thread, 0);
  setcontext(&context);
}

// Runs the threads of a block until each has ended or waits. Returns whether any could run.
inline bool advance(Block& block) {
  const size_t static_bytes = __stop_cuda_shared - __start_cuda_shared;
  if (static_bytes) std::memcpy(__start_cuda_shared, block.static_shared.data(), static_bytes);
  blockIdx = block.index;
  bool any = false;
  for (bool again = true; again;) {
    again = false;
    for (size_t i = 0; i < block.threads.size(); ++i) {
      Thread& thread = block.threads[launch->late ? block.threads.size() - 1 - i : i];
      if (!can_run(thread)) continue;
      resume(thread);
      if (launch->error) std::rethrow_exception(launch->error);
      again = any = true;
    }
  }
  if (static_bytes) std::memcpy(block.static_shared.data(), __start_cuda_shared, static_bytes);
  return any;
}

inline void check_ended(Block& block) {
  for (const Thread& thread : block.threads) {
    if (thread.ended) continue;
    const Group& group = *thread.waits_for;
    fail(std::to_string(group.arrived) + " of " + std::to_string(group.size) + " threads of a " +
         group.name + " wait at " + place(group) + ", the others have ended or wait elsewhere");
  }
  const unsigned char* end = block.dynamic_shared() + launch->shared_bytes;
  if (std::any_of(end, end + kGuard, [](unsigned char byte) { return byte != kPoison; })) {
    fail("write past the end of the dynamic shared memory");
  }
}

// The stacks of a launch. Memory is reserved, and taken only where a thread touches it.
class Stacks {
 public:
  explicit Stacks(size_t count) : bytes_(count * kStack) {
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    memory_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (memory_ == MAP_FAILED) throw std::bad_alloc();
  }
  ~Stacks() { munmap(memory_, bytes_); }
  Stacks(const Stacks&) = delete;
  char* operator[](size_t i) const { return static_cast<char*>(memory_) + i * kStack; }

 private:
  size_t bytes_;
  void* memory_;
};

inline uint3 unflatten(unsigned i, dim3 size) {
  return {i % size.x, i / size.x % size.y, i / size.x / size.y};
}

inline void prepare(Block& block,
                    uint3 index,
                    dim3 size,
                    const Launch& launch,
                    Stacks& stacks,
                    size_t first_stack) {
  const int count = size.x * size.y * size.z;
  block.index = index;
  block.group.size = count;
  block.shared.assign(launch.shared_bytes + kAlignment + kGuard, kPoison);
  block.static_shared.assign(__stop_cuda_shared - __start_cuda_shared, kPoison);
  block.warps.assign((count + warpSize - 1) / warpSize, Group{"warp"});
  block.threads.resize(count);
  for (int i = 0; i < count; ++i) {
    Thread& thread = block.threads[i];
    thread.index = unflatten(i, size);
    thread.block = &block;
    thread.warp = &block.warps[i / warpSize];
    thread.first_of_warp = i / warpSize * warpSize;
    thread.stack = stacks[first_stack + i];
    ++thread.warp->size;
  }
}

inline void run(const std::function<void()>& kernel,
                dim3 grid,
                dim3 block_size,
                size_t shared_bytes,
                bool cooperative) {
  const size_t count = size_t(grid.x) * grid.y * grid.z;
  const size_t threads = size_t(block_size.x) * block_size.y * block_size.z;
  const size_t alive = cooperative ? count : 1;
  const bool late = setting("CUDA_EMULATOR_ORDER", "up") == "down";
  Launch running{kernel, shared_bytes, cooperative, late};
  running.grid.size = int(count * threads);
  Stacks stacks(alive * threads);
  launch = &running;
  gridDim = grid;
  blockDim = block_size;
  for (size_t first = 0; first < count; first += alive) {
    std::vector<Block> blocks(alive);
    blocks_alive = &blocks;
    for (size_t i = 0; i < alive; ++i) {
      const size_t number = late ? count - 1 - first - i : first + i;
      prepare(blocks[i], unflatten(unsigned(number), grid), block_size, running, stacks,
              i * threads);
    }
    for (bool any = true; any;) {
      any = false;
      for (Block& block : blocks) any |= advance(block);
    }
    for (Block& block : blocks) check_ended(block);
  }
}

}  // namespace cuda_emulator
