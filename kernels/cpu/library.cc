// The one symbol that ONNX Runtime looks for: adds every operator to a session.
#include "cpu/kernel.h"

namespace thresher {

void add_adaptive_gate(const Library& library);
void add_adaptive_mlp(const Library& library);
void add_bipartite_merge(const Library& library);
void add_class_attention(const Library& library);
void add_expert_mlp(const Library& library);
void add_gather_tokens(const Library& library);
void add_keep_tokens(const Library& library);
void add_prune_merge(const Library& library);
void add_redundant_merge(const Library& library);
void add_restore_tokens(const Library& library);
void add_select_diverse(const Library& library);
void add_sparse_gated_ffn(const Library& library);
void add_sparse_linear(const Library& library);
void add_split_merge(const Library& library);
void add_token_energy(const Library& library);

namespace {

// Sessions refer to the domain as long as they live, so there is one for the whole process.
ort::CustomOpDomain* domain(const Api& api) {
  static ort::CustomOpDomain* const made = [&api] {
    ort::CustomOpDomain* domain = nullptr;
    api.check(api.get<ort::Status* (*)(const char*, ort::CustomOpDomain**)>(
        ort::CREATE_CUSTOM_OP_DOMAIN)("thresher", &domain));
    const Library library(api, domain);
    add_adaptive_gate(library);
    add_adaptive_mlp(library);
    add_bipartite_merge(library);
    add_class_attention(library);
    add_expert_mlp(library);
    add_gather_tokens(library);
    add_keep_tokens(library);
    add_prune_merge(library);
    add_redundant_merge(library);
    add_restore_tokens(library);
    add_select_diverse(library);
    add_sparse_gated_ffn(library);
    add_sparse_linear(library);
    add_split_merge(library);
    add_token_energy(library);
    return domain;
  }();
  return made;
}

}  // namespace
}  // namespace thresher

extern "C" __attribute__((visibility("default"))) thresher::ort::Status* RegisterCustomOps(
    thresher::ort::SessionOptions* options, const thresher::ort::ApiBase* base) {
  using namespace thresher;
  const ort::Table table = base->get_api(ort::VERSION);
  if (!table)
    return Api(base->get_api(1)).status("thresher's kernels need ONNX Runtime 1.17 or newer");
  const Api api(table);
  try {
    api.check(api.get<ort::Status* (*)(ort::SessionOptions*, ort::CustomOpDomain*)>(
        ort::ADD_CUSTOM_OP_DOMAIN)(options, domain(api)));
    return nullptr;
  } catch (const std::exception& error) {
    return api.status(error.what());
  }
}
