#include "cpu/activation.h"

#include "cpu/kernel.h"

namespace thresher {
namespace {

template <Activation KIND, class W>
void activate_as(const Rows<W>& of) {
  dispatch([&](auto isa) THRESHER_INLINED {
    for (int64_t row = 0; row < of.count; ++row)
      change_all<decltype(isa)>(of.data + row * of.stride, of.width,
                                [](const auto& x) THRESHER_INLINED { return activated<KIND>(x); });
  });
}

template <class W>
void activate_any(Activation kind, const Rows<W>& of) {
  switch (kind) {
    case Activation::SILU: return activate_as<Activation::SILU>(of);
    case Activation::GELU: return activate_as<Activation::GELU>(of);
    case Activation::GELU_TANH: return activate_as<Activation::GELU_TANH>(of);
    case Activation::QUICK_GELU: return activate_as<Activation::QUICK_GELU>(of);
    case Activation::RELU: return activate_as<Activation::RELU>(of);
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

void activate(Activation kind, const Rows<float>& of) { activate_any(kind, of); }
void activate(Activation kind, const Rows<double>& of) { activate_any(kind, of); }

}  // namespace thresher
