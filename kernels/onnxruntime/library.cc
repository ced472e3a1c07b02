// The one symbol that ONNX Runtime looks for: adds every operator to a session.
#include "onnxruntime/host.h"

namespace thresher {

// These multiply by ONNX Runtime's own kernels.
void add_sparse_gated_ffn(const Library& library);
void add_sparse_linear(const Library& library);

namespace ort {
namespace {

// Sessions refer to the domain as long as they live, so there is one for the whole process.
CustomOpDomain* domain(const Api& api) {
  static CustomOpDomain* const made = [&api] {
    CustomOpDomain* domain = nullptr;
    api.check(api.get<Status* (*)(const char*, CustomOpDomain**)>(CREATE_CUSTOM_OP_DOMAIN)(
        "thresher", &domain));
    const Domain library(api, domain);
    add_operators(library);
    add_sparse_gated_ffn(library);
    add_sparse_linear(library);
    return domain;
  }();
  return made;
}

}  // namespace
}  // namespace ort
}  // namespace thresher

extern "C" __attribute__((visibility("default"))) thresher::ort::Status* RegisterCustomOps(
    thresher::ort::SessionOptions* options, const thresher::ort::ApiBase* base) {
  using namespace thresher::ort;
  const Table table = base->get_api(VERSION);
  if (!table)
    return Api(base->get_api(1)).status("thresher's kernels need ONNX Runtime 1.17 or newer");
  const Api api(table);
  try {
    api.check(api.get<Status* (*)(SessionOptions*, CustomOpDomain*)>(ADD_CUSTOM_OP_DOMAIN)(
        options, domain(api)));
    return nullptr;
  } catch (const std::exception& error) {
    return api.status(error.what());
  }
}
