// What an operator on the CPU is: a class that reads its attributes once and computes many times.
//
//   template <class T> struct Copy {
//     static constexpr Signature signature{"Copy", {TOKENS}, {TOKENS}};
//     explicit Copy(const Attributes& given);   // may throw Error
//     void compute(const Context& context) const;  // may throw Error
//   };
//
// Its name differs from those in other files, in unnamed namespaces too: GCC merges what is made of it.
// add<Copy, float, Half>(library) registers it for these types of tokens.  An Error becomes the status
// of the run; nothing is thrown through ONNX Runtime.
#pragma once

#include <algorithm>
#include <array>
#include <exception>
#include <initializer_list>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/numeric.h"
#include "cpu/ort.h"

namespace thresher {

using Shape = std::vector<int64_t>;
using Error = std::runtime_error;

std::string text(const Shape& shape);

// Throws an Error that says what was found unless a demand holds.
inline void demand(bool holds, const char* what, const Shape& found) {
  if (!holds) throw Error(std::string(what) + ", not " + text(found));
}

class Api {
 public:
  explicit Api(ort::Table table) : table_(table) {}

  template <class Function>
  Function get(ort::Slot slot) const {
    return reinterpret_cast<Function>(const_cast<void*>(table_[slot]));
  }
  // Turns a status into an Error.
  void check(ort::Status* status) const;
  ort::Status* status(const char* message) const;

 private:
  ort::Table table_;
};

class Attributes {
 public:
  Attributes(const Api& api, const ort::KernelInfo* info) : api_(api), info_(info) {}
  int64_t integer(const char* name) const;
  float number(const char* name) const;
  std::string text(const char* name) const;

  const Api& api() const { return api_; }  // lives as long as the kernel
  const ort::KernelInfo* info() const { return info_; }

 private:
  const Api& api_;
  const ort::KernelInfo* info_;
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

class Context {
 public:
  Context(const Api& api, ort::KernelContext* context) : api_(api), context_(context) {}

  template <class T>
  Tensor<T> input(size_t index) const {
    Shape shape;
    const void* data = read(index, shape);
    return {static_cast<const T*>(data), std::move(shape)};
  }
  const ort::KernelContext* handle() const { return context_; }
  // The one number in an input.
  int64_t scalar(size_t index) const;
  // Null for an output that nobody reads.
  template <class T>
  T* output(size_t index, const Shape& shape) const {
    return static_cast<T*>(write(index, shape));
  }
  // Calls body(begin, end) on parts of [0, total) of at least `grain` items, on the runtime's threads.
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

 private:
  static constexpr int64_t MOST_PARTS = 64;

  const void* read(size_t index, Shape& shape) const;
  void* write(size_t index, const Shape& shape) const;
  void run(void (*part)(void*, size_t), size_t parts, void* job) const;

  const Api& api_;
  ort::KernelContext* context_;
};

constexpr ort::Element TOKENS = static_cast<ort::Element>(0);  // stands for the type T of the tokens

struct Signature {
  const char* name;
  std::array<ort::Element, 8> inputs;
  std::array<ort::Element, 4> outputs;  // those after the first may be left out by a model
  size_t input_count, output_count;

  constexpr Signature(const char* called, std::initializer_list<ort::Element> in,
                      std::initializer_list<ort::Element> out)
      : name(called), inputs{}, outputs{}, input_count(in.size()), output_count(out.size()) {
    size_t at = 0;
    for (ort::Element element : in) inputs[at++] = element;
    at = 0;
    for (ort::Element element : out) outputs[at++] = element;
  }
};

class Library {
 public:
  Library(const Api& api, ort::CustomOpDomain* domain) : api_(api), domain_(domain) {}
  void add(const ort::CustomOp& op) const;

 private:
  const Api& api_;
  ort::CustomOpDomain* domain_;
};

// The callbacks of one operator for one type of tokens.
template <template <class> class Kernel, class T>
class Callbacks {
  struct Instance {
    Api api;
    Kernel<T> kernel;
    Instance(ort::Table table, const ort::KernelInfo* info)
        : api(table), kernel(Attributes(api, info)) {}
  };
  static constexpr const Signature& signature = Kernel<T>::signature;

  static ort::Element typed(ort::Element element) {
    return element == TOKENS ? ELEMENT<T> : element;
  }

 public:
  static const ort::CustomOp& table() {
    using ort::CustomOp;
    static const CustomOp op{
        ort::OP_VERSION,
        nullptr,
        [](const CustomOp*) { return signature.name; },
        [](const CustomOp*) { return "CPUExecutionProvider"; },
        [](const CustomOp*, size_t i) { return typed(signature.inputs[i]); },
        [](const CustomOp*) { return signature.input_count; },
        [](const CustomOp*, size_t i) { return typed(signature.outputs[i]); },
        [](const CustomOp*) { return signature.output_count; },
        nullptr,
        [](void* kernel) { delete static_cast<Instance*>(kernel); },
        [](const CustomOp*, size_t) { return ort::REQUIRED; },
        [](const CustomOp*, size_t i) { return i ? ort::OPTIONAL : ort::REQUIRED; },
        [](const CustomOp*, size_t) { return 0; },
        [](const CustomOp*) { return 1; },
        [](const CustomOp*) { return 1; },
        [](const CustomOp*) { return 1; },
        [](const CustomOp*) { return 1; },
        [](const CustomOp*, ort::Table api, const ort::KernelInfo* info, void** kernel) {
          return guarded(Api(api), [&] { *kernel = new Instance(api, info); });
        },
        [](void* kernel, ort::KernelContext* given) {
          const Instance& of = *static_cast<Instance*>(kernel);
          return guarded(of.api, [&] {
            Context context(of.api, given);
            of.kernel.compute(context);
          });
        },
    };
    return op;
  }

 private:
  template <class Body>
  static ort::Status* guarded(const Api& api, const Body& body) {
    try {
      body();
      return nullptr;
    } catch (const std::exception& error) {
      return api.status((std::string(signature.name) + ": " + error.what()).c_str());
    }
  }
};

template <template <class> class Kernel, class... Types>
void add(const Library& library) {
  (library.add(Callbacks<Kernel, Types>::table()), ...);
}

}  // namespace thresher
