"""What a custom loss may call: names only, as `torch.fx` records them. `engine/torch/custom_loss.py` has the functions.

Nothing here draws random numbers, writes into its arguments, reads anything but them, or leaves the device; and what it
returns has a size that follows from the shapes of its arguments.
"""

from __future__ import annotations


def _listed(*lines: str) -> frozenset[str]:
    return frozenset(" ".join(lines).split())


_TENSORS = _listed(
    # of one tensor, element by element
    "abs acos asin atan cos cosh sin sinh tan tanh exp exp2 expm1 log log10 log1p log2 sqrt rsqrt square sigmoid",
    "reciprocal clone sign neg erf erfc floor ceil round trunc frac isfinite isinf isnan logical_not nan_to_num relu",
    # of several
    "add sub subtract mul multiply div divide true_divide floor_divide remainder fmod pow maximum minimum atan2",
    "eq ne lt le gt ge logical_and logical_or logical_xor logaddexp logaddexp2 xlogy where lerp addcmul addcdiv",
    "detach clamp clip clamp_min clamp_max masked_fill dot matmul mm mv bmm outer",
    # along dimensions
    "sum mean prod std var min max amin amax argmin argmax all any count_nonzero norm logsumexp logcumsumexp cumsum",
    "cumprod softmax log_softmax median sort argsort topk numel",
    # of their shapes
    "reshape flatten squeeze unsqueeze transpose permute movedim t flip roll narrow unbind split chunk gather",
    "index_select masked_select take_along_dim broadcast_to tril triu diagonal",
)
CREATION = _listed("zeros ones full arange zeros_like ones_like full_like")
"""Functions that take no tensor, or only its shape."""

TORCH = _TENSORS | CREATION | _listed("cat stack concat")
METHODS = _TENSORS | _listed(
    "size dim to float double half bfloat16 long int bool type_as view view_as reshape_as expand expand_as repeat",
    "contiguous new_zeros new_ones new_full",
)
FUNCTIONAL = _listed(
    "relu leaky_relu elu gelu silu softplus logsigmoid softmax log_softmax normalize mse_loss l1_loss smooth_l1_loss",
    "huber_loss kl_div binary_cross_entropy binary_cross_entropy_with_logits cosine_similarity pad",
)
OPERATORS = _listed(
    "add sub mul truediv floordiv mod pow neg pos abs invert and_ or_ xor eq ne lt le gt ge matmul getitem"
)
MATH = _listed("exp log log1p log2 log10 sqrt tanh floor ceil fabs")

ATTRIBUTES = ("shape", "ndim", "dtype", "device", "T", "mT", "values", "indices")
"""Read by `getattr`."""

DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "bool")

TEXTS = ("none", "mean", "sum", "batchmean", "floor", "trunc", "fro", "constant")
"""Text arguments: reductions, roundings, the Frobenius norm, constant padding."""

FUNCTIONS = frozenset(
    [f"torch.{name}" for name in TORCH]
    + [f"torch.nn.functional.{name}" for name in FUNCTIONAL]
    + [f"operator.{name}" for name in OPERATORS]
    + [f"math.{name}" for name in MATH]
    + ["getattr"]
)

_ALIASES = {
    "builtins.getattr": "getattr",
    "torch._C._nn.log_sigmoid": "torch.nn.functional.logsigmoid",
    "torch._C._special.special_expit": "torch.sigmoid",
    "torch._C._special.special_xlogy": "torch.xlogy",
    "torch._C._special.special_logsumexp": "torch.logsumexp",
    "torch._C._special.special_log_softmax": "torch.log_softmax",
    "torch._C._special.special_softmax": "torch.softmax",
}


def public_name(target: str) -> str:
    """A function's public name; tracing records some by private ones."""
    if target in _ALIASES:
        return _ALIASES[target]
    return target.replace("torch._C._nn.", "torch.nn.functional.", 1)
