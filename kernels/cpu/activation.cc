#include "cpu/activation.h"

#include "cpu/kernel.h"

namespace thresher {
namespace {

template <Activation KIND, class W>
THRESHER_VECTORISED void activate_as(W* values, int64_t count) {
  change_all(values, count, [](const Vector<W>& x) __attribute__((always_inline)) {
    return activated<KIND, W>(x);
  });
}

template <class W>
void activate_any(Activation kind, W* values, int64_t count) {
  switch (kind) {
    case Activation::SILU: return activate_as<Activation::SILU>(values, count);
    case Activation::GELU: return activate_as<Activation::GELU>(values, count);
    case Activation::GELU_TANH: return activate_as<Activation::GELU_TANH>(values, count);
    case Activation::QUICK_GELU: return activate_as<Activation::QUICK_GELU>(values, count);
    case Activation::RELU: return activate_as<Activation::RELU>(values, count);
    case Activation::IDENTITY: return;
  }
}

}  // namespace

Activation activation_called(const std::string& name) {
  if (name == "gelu") return Activation::GELU;
  if (name == "gelu_tanh") return Activation::GELU_TANH;
  if (name == "identity") return Activation::IDENTITY;
  if (name == "quick_gelu") return Activation::QUICK_GELU;
  if (name == "relu") return Activation::RELU;
  if (name == "silu") return Activation::SILU;
  throw Error("no activation " + name);
}

void activate(Activation kind, float* values, int64_t count) { activate_any(kind, values, count); }
void activate(Activation kind, double* values, int64_t count) { activate_any(kind, values, count); }

}  // namespace thresher
