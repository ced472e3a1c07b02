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
void add_split_merge(const Library& library);
void add_token_energy(const Library& library);

void add_operators(const Library& library) {
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
  add_split_merge(library);
  add_token_energy(library);
}

}  // namespace thresher
