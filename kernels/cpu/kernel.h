// What an operator on the CPU is: a class that reads its attributes once and computes many times.
//
//   template <class T> struct Copy {
//     static constexpr Signature signature{"Copy", {TOKENS}, {TOKENS}};
//     explicit Copy(const Attributes& given);   // may throw Error
//     void compute(const Context& context) const;  // may throw Error
//   };
//
// Its name differs from those in other files, in unnamed namespaces too: GCC merges what is made of it.
// add<Copy, float, Half>(library) registers it for these types of tokens.  A host (onnxruntime/host.cc,
// openvino/extension.cc) implements Attributes, Context and Library.
#pragma once

#include <algorithm>
#include <array>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/numeric.h"

namespace thresher {

using Shape = std::vector<int64_t>;
using Error = std::runtime_error;

std::string text(const Shape& shape);

// Throws an Error that says what was found unless a demand holds.
inline void demand(bool holds, const char* what, const Shape& found) {
  if (!holds) throw Error(std::string(what) + ", not " + text(found));
}

// What a node says about itself; each throws an Error where it does not.
class Attributes {
 public:
  virtual int64_t integer(const char* name) const = 0;
  virtual float number(const char* name) const = 0;
  virtual std::string text(const char* name) const = 0;

 protected:
  ~Attributes() = default;
};

template <class T>
struct Tensor {
  const T* data;
  Shape shape;

  int64_t count() const {
    int64_t product = 1;
    for (int64_t size : shape) product *= size;
    return product;
  }
};

// One computation: its tensors, and the host's threads.
class Context {
 public:
  template <class T>
  Tensor<T> input(size_t index) const {
    Shape shape;
    const void* data = read(index, shape);
    return {static_cast<const T*>(data), std::move(shape)};
  }
  // Whether an input is the same at every computation of a kernel.
  virtual bool constant(size_t index) const = 0;
  // The one number in an input.
  int64_t scalar(size_t index) const;
  // Null for an output that nobody reads.
  template <class T>
  T* output(size_t index, const Shape& shape) const {
    return static_cast<T*>(write(index, shape));
  }
  // Calls body(begin, end) on parts of [0, total) of at least `grain` items, on the host's threads.
  // The body must not throw.
  template <class Body>
  void parallel(int64_t total, int64_t grain, const Body& body) const {
    const int64_t parts = std::min(MOST_PARTS, total / std::max<int64_t>(grain, 1));
    if (parts < 2) {
      if (total > 0) body(int64_t{0}, total);
      return;
    }
    struct Job {
      const Body& body;
      int64_t total, parts;
    } job{body, total, parts};
    run(
        [](void* given, size_t part) {
          const Job& of = *static_cast<Job*>(given);
          const int64_t at = static_cast<int64_t>(part);
          of.body(of.total * at / of.parts, of.total * (at + 1) / of.parts);
        },
        static_cast<size_t>(parts), &job);
  }

 protected:
  ~Context() = default;

 private:
  static constexpr int64_t MOST_PARTS = 64;

  virtual const void* read(size_t index, Shape& shape) const = 0;
  virtual void* write(size_t index, const Shape& shape) const = 0;
  // Calls part(job, i) for all i < parts.
  virtual void run(void (*part)(void*, size_t), size_t parts, void* job) const = 0;
};

constexpr Element TOKENS = static_cast<Element>(0);  // stands for the type T of the tokens

struct Signature {
  const char* name;
  std::array<Element, 8> inputs;
  std::array<Element, 4> outputs;  // those after the first may be left out by a model
  size_t input_count, output_count;

  constexpr Signature(const char* called, std::initializer_list<Element> in,
                      std::initializer_list<Element> out)
      : name(called), inputs{}, outputs{}, input_count(in.size()), output_count(out.size()) {
    size_t at = 0;
    for (Element element : in) inputs[at++] = element;
    at = 0;
    for (Element element : out) outputs[at++] = element;
  }
};

// A kernel for one type of tokens, as a host sees it.
struct Implementation {
  const Signature* signature;
  Element tokens;
  void* (*make)(const Attributes&);  // may throw
  void (*compute)(const void* kernel, const Context&);  // may throw
  void (*release)(void* kernel);

  Element typed(Element element) const { return element == TOKENS ? tokens : element; }
};

template <template <class> class Kernel, class T>
inline constexpr Implementation IMPLEMENTATION{
    &Kernel<T>::signature,
    ELEMENT<T>,
    [](const Attributes& given) -> void* { return new Kernel<T>(given); },
    [](const void* kernel, const Context& context) {
      static_cast<const Kernel<T>*>(kernel)->compute(context);
    },
    [](void* kernel) { delete static_cast<Kernel<T>*>(kernel); },
};

// Where a host takes what there is.
class Library {
 public:
  virtual void add(const Implementation& of) const = 0;  // lives as long as the process

 protected:
  ~Library() = default;
};

template <template <class> class Kernel, class... Types>
void add(const Library& library) {
  (library.add(IMPLEMENTATION<Kernel, Types>), ...);
}

// All operators that need nothing of their host but its threads.
void add_operators(const Library& library);

}  // namespace thresher
