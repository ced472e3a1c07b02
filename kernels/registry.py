"""All operators by ONNX name.  Importing this module imports neither torch nor onnx."""

from __future__ import annotations

from thresher.kernels.adaptive_gate.function import OPERATOR as _ADAPTIVE_GATE
from thresher.kernels.adaptive_gated_mlp.function import OPERATOR as _ADAPTIVE_GATED_MLP
from thresher.kernels.adaptive_mlp.function import OPERATOR as _ADAPTIVE_MLP
from thresher.kernels.bipartite_merge.function import BY_INDEX as _BIPARTITE_MERGE
from thresher.kernels.bipartite_merge.function import BY_RANK as _RANKED_BIPARTITE_MERGE
from thresher.kernels.class_attention.function import OPERATOR as _CLASS_ATTENTION
from thresher.kernels.expert_mlp.function import OPERATOR as _EXPERT_MLP
from thresher.kernels.gather_tokens.function import OPERATOR as _GATHER_TOKENS
from thresher.kernels.keep_tokens.function import FUSE as _FUSE_TOKENS
from thresher.kernels.keep_tokens.function import KEEP as _KEEP_TOKENS
from thresher.kernels.operator import DOMAIN, OUTPUTS, PLUGIN, VERSION, Operator
from thresher.kernels.prune_merge.function import OPERATOR as _PRUNE_MERGE
from thresher.kernels.redundant_merge.function import OPERATOR as _REDUNDANT_MERGE
from thresher.kernels.restore_tokens.function import OPERATOR as _RESTORE_TOKENS
from thresher.kernels.select_diverse.function import OPERATOR as _SELECT_DIVERSE
from thresher.kernels.soft_merge.function import OPERATOR as _SOFT_MERGE
from thresher.kernels.sparse_gated_ffn.function import BF16_BY_ACTIVATION as _SPARSE_GATED_FFN_BF16
from thresher.kernels.sparse_gated_ffn.function import BY_ACTIVATION as _SPARSE_GATED_FFN
from thresher.kernels.sparse_linear.function import BF16 as _SPARSE_LINEAR_BF16
from thresher.kernels.sparse_linear.function import COMPACT as _COMPACT_SPARSE_LINEAR
from thresher.kernels.sparse_linear.function import MASK as _SPARSE_LINEAR
from thresher.kernels.split_merge.function import OPERATOR as _SPLIT_MERGE
from thresher.kernels.token_energy.function import OPERATOR as _TOKEN_ENERGY

__all__ = [
    "BY_TORCH_NAME",
    "DOMAIN",
    "OPERATORS",
    "OUTPUTS",
    "PLUGIN",
    "VERSION",
    "WITH_CUDA",
    "Operator",
    "called",
]

OPERATORS: dict[str, Operator] = {
    operator.name: operator
    for operator in (
        _BIPARTITE_MERGE,
        _RANKED_BIPARTITE_MERGE,
        _CLASS_ATTENTION,
        _KEEP_TOKENS,
        _FUSE_TOKENS,
        _PRUNE_MERGE,
        _GATHER_TOKENS,
        _RESTORE_TOKENS,
        _SELECT_DIVERSE,
        _TOKEN_ENERGY,
        _REDUNDANT_MERGE,
        _SPLIT_MERGE,
        _SOFT_MERGE,
        _ADAPTIVE_GATE,
        _ADAPTIVE_MLP,
        _ADAPTIVE_GATED_MLP,
        _EXPERT_MLP,
        _SPARSE_LINEAR,
        _COMPACT_SPARSE_LINEAR,
        _SPARSE_LINEAR_BF16,
        *_SPARSE_GATED_FFN.values(),
        *_SPARSE_GATED_FFN_BF16.values(),
    )
}
BY_TORCH_NAME = {operator.torch_name: operator for operator in reversed(OPERATORS.values())}
"""The first of those that one torch operator lowers to; its inputs have the names of the arguments."""
WITH_CUDA = {name: operator for name, operator in OPERATORS.items() if operator.cuda}
"""Those with CUDA kernels, which TensorRT takes as plugins."""


def called(kind: str) -> Operator:
    """The operator that a lowered model holds under this name; see :meth:`Operator.kind`."""
    return OPERATORS[kind.partition("_")[0]]
