// Reads calls of the functions of csrc/bindings.cpp from stdin, one after another. Writes what each
// call returns, and the memory that it was given, to stdout. __init__.py has the other end.
//
//   call:    text name, int n, n memories, int m, m arguments
//   memory:  int offset from a 64-byte boundary, int size, its bytes
//   argument: char kind, then an integer, a double, a text or the index of a memory
//   answer:  char kind, then nothing, an integer, texts or the text of an exception ('e');
//            where it is not an exception, the n memories' bytes
//
// All integers have 64 bits. A text is its size and then its bytes.
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <memory>

#include "pybind11/pybind11.h"

namespace {

using pybind11::Argument;
using pybind11::Result;

void read(void* to, std::size_t size) {
  if (std::fread(to, 1, size, stdin) != size) std::exit(0);
}

template <class T>
T read() {
  T value;
  read(&value, sizeof value);
  return value;
}

std::string read_text() {
  std::string text(read<int64_t>(), '\0');
  read(text.data(), text.size());
  return text;
}

template <class T>
void write(T value) {
  std::fwrite(&value, sizeof value, 1, stdout);
}

void write_text(const std::string& text) {
  write(int64_t(text.size()));
  std::fwrite(text.data(), 1, text.size(), stdout);
}

// Memory of exactly `size` bytes, so that the AddressSanitizer reports an access to the next one.
class Memory {
 public:
  Memory() : offset_(read<int64_t>()), size_(read<int64_t>()) {
    void* block = nullptr;
    if (posix_memalign(&block, 64, offset_ + size_) != 0) std::abort();
    block_.reset(static_cast<unsigned char*>(block));
    read(data(), size_);
  }
  unsigned char* data() const { return block_.get() + offset_; }
  void write_back() const { std::fwrite(data(), 1, size_, stdout); }

 private:
  struct Free {
    void operator()(void* block) const { std::free(block); }
  };
  std::size_t offset_;
  std::size_t size_;
  std::unique_ptr<unsigned char, Free> block_;
};

Argument read_argument(const std::vector<Memory>& memories) {
  Argument argument{read<char>(), 0, 0, {}, nullptr};
  switch (argument.kind) {
    case 'i':
      argument.integer = read<int64_t>();
      break;
    case 'f':
      argument.number = read<double>();
      break;
    case 's':
      argument.text = read_text();
      break;
    case 'p':
      argument.memory = memories.at(read<int64_t>()).data();
  }
  return argument;
}

void answer(const Result& result) {
  write(result.kind);
  if (result.kind == 'i') write(result.integer);
  if (result.kind == 'l') {
    write(int64_t(result.texts.size()));
    for (const auto& text : result.texts) write_text(text);
  }
}

}  // namespace

int main() {
  pybind11::module_ module;
  bind_functions(module);
  for (;;) {
    const std::string name = read_text();
    std::vector<Memory> memories(read<int64_t>());
    std::vector<Argument> arguments(read<int64_t>());
    for (auto& argument : arguments) argument = read_argument(memories);
    try {
      answer(module.functions.at(name)(arguments));
      for (const auto& memory : memories) memory.write_back();
    } catch (const std::exception& error) {
      write('e');
      write_text(name + ": " + error.what());
    }
    std::fflush(stdout);
  }
}
