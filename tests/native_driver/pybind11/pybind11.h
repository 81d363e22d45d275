// The part of pybind11 that csrc/bindings.cpp uses, without Python. The functions that it binds go
// into a table, and driver.cpp calls them with the arguments that it reads.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

namespace pybind11 {

struct gil_scoped_release {
  gil_scoped_release() {}
};

struct list {
  std::vector<std::string> texts;
  void append(const std::string& text) { texts.push_back(text); }
};

// An argument. Its kind is 'i' for an integer, 'f' for a float, 's' for a text, 'p' for memory.
struct Argument {
  char kind;
  int64_t integer;
  double number;
  std::string text;
  unsigned char* memory;
};

// What a function returns. Its kind is 'n' for nothing, 'i' for an integer, 'l' for texts.
struct Result {
  char kind;
  int64_t integer;
  std::vector<std::string> texts;
};

// Takes arguments one after another.
struct Cursor {
  const std::vector<Argument>& arguments;
  std::size_t next;
};

// The next argument as a T; a tuple comes as its elements.
template <class T>
struct Caster {
  static T take(Cursor& cursor) {
    const Argument& argument = cursor.arguments.at(cursor.next++);
    if constexpr (std::is_same_v<T, std::string>) {
      if (argument.kind == 's') return argument.text;
    } else if constexpr (std::is_same_v<T, std::uintptr_t>) {
      if (argument.kind == 'p') return reinterpret_cast<T>(argument.memory);
      if (argument.kind == 'i' && argument.integer == 0) return 0;
    } else {
      if (argument.kind == 'i') return T(argument.integer);
      if (std::is_floating_point_v<T> && argument.kind == 'f') return T(argument.number);
    }
    throw std::invalid_argument("argument " + std::to_string(cursor.next) + " is of kind " +
                                argument.kind);
  }
};

template <class... T>
struct Caster<std::tuple<T...>> {
  static std::tuple<T...> take(Cursor& cursor) {
    return std::tuple<T...>{Caster<std::decay_t<T>>::take(cursor)...};
  }
};

using Function = std::function<Result(const std::vector<Argument>&)>;

template <class R, class... A>
Function bind(std::function<R(A...)> function) {
  return [function](const std::vector<Argument>& arguments) -> Result {
    Cursor cursor{arguments, 0};
    const auto values = Caster<std::tuple<std::decay_t<A>...>>::take(cursor);
    if (cursor.next != arguments.size()) throw std::invalid_argument("too many arguments");
    if constexpr (std::is_void_v<R>) {
      std::apply(function, values);
      return {'n', 0, {}};
    } else if constexpr (std::is_same_v<R, list>) {
      return {'l', 0, std::apply(function, values).texts};
    } else {
      return {'i', int64_t(std::apply(function, values)), {}};
    }
  };
}

class module_ {
 public:
  struct Attribute {
    template <class T>
    void operator=(const T&) {}
  };

  Attribute attr(const char*) { return {}; }

  template <class F>
  void def(const char* name, F function) {
    functions[name] = bind(std::function(function));
  }

  std::map<std::string, Function> functions;
};

}  // namespace pybind11

void bind_functions(pybind11::module_& m);

#define PYBIND11_MODULE(name, m) void bind_functions(pybind11::module_& m)
