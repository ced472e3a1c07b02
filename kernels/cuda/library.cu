// The symbols of the library: every operator by name.
#include <cstring>

#include "cuda/kernel.h"

namespace thresher {

int bipartite_merge(const Call& call, Scratch& scratch);
int ranked_bipartite_merge(const Call& call, Scratch& scratch);
int class_attention(const Call& call, Scratch& scratch);
int keep_tokens(const Call& call, Scratch& scratch);
int fuse_tokens(const Call& call, Scratch& scratch);
int prune_merge(const Call& call, Scratch& scratch);
int gather_tokens(const Call& call, Scratch& scratch);
int restore_tokens(const Call& call, Scratch& scratch);
int select_diverse(const Call& call, Scratch& scratch);
int token_energy(const Call& call, Scratch& scratch);
int redundant_merge(const Call& call, Scratch& scratch);
int split_merge(const Call& call, Scratch& scratch);

namespace {

constexpr struct {
  const char* name;
  int (*compute)(const Call&, Scratch&);
} OPERATORS[] = {
    {"BipartiteMerge", bipartite_merge}, {"RankedBipartiteMerge", ranked_bipartite_merge},
    {"ClassAttention", class_attention}, {"KeepTokens", keep_tokens},
    {"FuseTokens", fuse_tokens},         {"PruneMerge", prune_merge},
    {"GatherTokens", gather_tokens},     {"RestoreTokens", restore_tokens},
    {"SelectDiverse", select_diverse},   {"TokenEnergy", token_energy},
    {"RedundantMerge", redundant_merge}, {"SplitMerge", split_merge},
};

int compute(const char* name, const Call* call, Scratch& scratch) {
  if (!name || !call) return NO_DATA;
  for (const Tensor& tensor : call->inputs)
    if (!sane(tensor)) return WRONG_SHAPE;
  for (const Tensor& tensor : call->outputs)
    if (!sane(tensor)) return WRONG_SHAPE;
  for (const auto& one : OPERATORS)
    if (!std::strcmp(one.name, name)) return one.compute(*call, scratch);
  return UNKNOWN_OPERATOR;
}

}  // namespace
}  // namespace thresher

#define THRESHER_EXPORT extern "C" __attribute__((visibility("default")))

THRESHER_EXPORT int thresher_cuda_launch(const char* op, const ThresherCall* call) {
  if (!call) return thresher::NO_DATA;
  thresher::Scratch scratch(call->workspace, call->workspace_bytes);
  return thresher::compute(op, call, scratch);
}

THRESHER_EXPORT int thresher_cuda_workspace(const char* op, const ThresherCall* call,
                                            int64_t* bytes) {
  if (!bytes) return thresher::NO_DATA;
  thresher::Scratch scratch;
  const int status = thresher::compute(op, call, scratch);
  *bytes = status == thresher::OK ? scratch.used() : 0;
  return status;
}

THRESHER_EXPORT const char* thresher_cuda_message(int status) {
  switch (status) {
    case thresher::OK: return "no error";
    case thresher::UNKNOWN_OPERATOR: return "there is no operator of that name";
    case thresher::WRONG_TYPE: return "a tensor has a type that the operator does not take";
    case thresher::WRONG_SHAPE: return "the shapes of the tensors do not fit each other";
    case thresher::WRONG_COUNT: return "keep, protected or row cannot be reached";
    case thresher::TOO_LARGE: return "there are more tokens than a grid has blocks";
    case thresher::SMALL_WORKSPACE: return "the workspace is missing or too small";
    case thresher::NO_DATA: return "a pointer is null";
    default: return cudaGetErrorString(static_cast<cudaError_t>(status));
  }
}
