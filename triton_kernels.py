"""The trainer's GPU kernels, written in Triton, each beside a plain PyTorch reference that defines it.

Every kernel is an opaque operator in the "speedrun" namespace, so torch.compile(fullgraph=True) takes it as it is.
A public function runs its kernel where kernels_available(device) and its reference elsewhere, so the file also
imports, and every public function works, where Triton cannot be imported. Under TRITON_INTERPRET=1 (set before
triton is first imported) the operators themselves also take CPU tensors; that is how the tests run them without a GPU.
"""

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheel for this platform: the references carry on alone
    triton = None


def kernels_available(device: torch.device | str) -> bool:
    """Whether the public functions of this file run their Triton kernels for tensors on `device`."""
    return triton is not None and torch.device(device).type == "cuda"


########################################################################################################################
#                                  Softcapped, multi-token cross-entropy with its gradient                             #
########################################################################################################################
#
#     z = 23 * sigmoid((logit + 5) / 7.5)        losses_i = sum_k weights_k * (logsumexp_j z_ij - z_i[targets_{i+k}])
#
# logits  (T, V)  bf16, fp16 or fp32 (the reference also float64), contiguous    the model's raw output
# targets (T,)    int32 or int64, each in [0, V), which is not checked           targets_i: the token after token i
# weights (K,)    fp32, 1 <= K <= 4                                              weights_k: of the token k further on
# losses  (T,)    fp32 (float64 for float64 logits)                              terms with i + k >= T are left out
# grad    (T, V)  bf16, fp16, fp32 or float8_e5m2, clamped to its largest value  grad_scale * d losses_i / d logit_ij
#
# Neither is differentiable again: whoever calls this hands grad to the backward pass of what made the logits.
# A shape, layout, device or dtype not listed here raises ValueError.
#
# Sources: the softcap is that of Gemma 2 (arXiv 2408.00118), in the sigmoid form of modded-nanogpt's record #54;
# multi-token prediction is that of Gloeckle et al. 2024 (arXiv 2404.19737), as weighted further targets of the one
# output head (record #53); loss and gradient in one kernel follow the idea of records #60 and #79.

CAP, SHIFT, WIDTH = 23.0, 5.0, 7.5
MAX_TARGETS = 4
E5M2_MAX = 57344.0  # the largest finite float8_e5m2; a cast alone would make larger values inf
KERNEL_GRAD_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float8_e5m2)


def _check_cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor) -> None:
    if logits.ndim != 2 or 0 in logits.shape:
        raise ValueError(f"logits have shape {tuple(logits.shape)}: flatten them to (T, V), neither of them 0.")
    if not logits.is_contiguous():
        raise ValueError(f"logits have strides {logits.stride()}, which is not row-major: call .contiguous() first.")
    if targets.shape != logits.shape[:1] or not targets.is_contiguous():
        raise ValueError(
            f"targets have shape {tuple(targets.shape)} and strides {targets.stride()}: "
            f"pass one contiguous token per row of logits, shape ({logits.shape[0]},)."
        )
    if targets.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"targets are {targets.dtype}: convert them to torch.int32 or torch.int64.")
    if weights.ndim != 1 or not 1 <= weights.shape[0] <= MAX_TARGETS or not weights.is_contiguous():
        raise ValueError(
            f"weights have shape {tuple(weights.shape)} and strides {weights.stride()}: "
            f"pass a contiguous (K,) with 1 <= K <= {MAX_TARGETS}."
        )
    if weights.dtype != torch.float32:
        raise ValueError(f"weights are {weights.dtype}: convert them to torch.float32.")
    if not logits.device == targets.device == weights.device:
        raise ValueError(
            f"logits, targets, weights are on {logits.device}, {targets.device}, {weights.device}: "
            f"move them to one device."
        )


@torch.no_grad()
def softcapped_cross_entropy_reference(
    logits: Tensor, targets: Tensor, weights: Tensor, grad_scale: float, grad_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(losses, grad) as defined above in plain PyTorch: the kernel's definition, and the trainer's path on a CPU."""
    _check_cross_entropy(logits, targets, weights)
    tokens, vocab = logits.shape
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    ahead = torch.arange(tokens, device=logits.device)[:, None] + torch.arange(len(weights), device=logits.device)
    index = targets.long()[ahead.clamp(max=tokens - 1)]  # (T, K)
    weight = weights.to(dtype) * (ahead < tokens)  # (T, K), 0 where the target falls off the end
    losses = torch.empty(tokens, dtype=dtype, device=logits.device)
    grad = torch.empty_like(logits, dtype=grad_dtype)
    # Eager on a CPU, a few rows at a time: 2 MiB temporaries stay in cache and in the allocator's hands, where
    # full-size ones cost more in page faults than all the arithmetic.
    # A GPU prefers few launches, and torch.compile, which would unroll the loop, fuses the passes itself.
    in_parts = logits.device.type == "cpu" and not torch.compiler.is_compiling()
    step = max(2**19 // vocab, 1) if in_parts else tokens
    for start in range(0, tokens, step):
        rows = slice(start, start + step)
        sig = logits[rows].to(dtype).add(SHIFT).mul_(1 / WIDTH).sigmoid_()
        prob = torch.softmax(CAP * sig, 1)  # at least e^-23 / V, so its log is finite
        losses[rows] = -(weight[rows] * prob.gather(1, index[rows]).log()).sum(1)
        # d z / d logit = CAP / WIDTH * sig * (1 - sig); the constant goes where it multiplies least.
        scaled = weight[rows] * (grad_scale * CAP / WIDTH)
        prob.mul_(scaled.sum(1, keepdim=True)).scatter_add_(1, index[rows], -scaled)
        prob.mul_(sig.addcmul_(sig, sig, value=-1))
        if grad_dtype == torch.float8_e5m2:
            prob.clamp_(-E5M2_MAX, E5M2_MAX)
        grad[rows] = prob
    return losses, grad


if triton is not None:
    LOG2E = 1.4426950408889634
    # exp(-(logit + SHIFT) / WIDTH) = exp2(logit * SLOPE + OFFSET); exp(-CAP * rest) = exp2(rest * DROP)
    SLOPE = tl.constexpr(-LOG2E / WIDTH)
    OFFSET = tl.constexpr(-LOG2E * SHIFT / WIDTH)
    DROP = tl.constexpr(-LOG2E * CAP)
    CEILING = tl.constexpr(CAP)
    STEEPNESS = tl.constexpr(CAP / WIDTH)
    E5M2_LIMIT = tl.constexpr(E5M2_MAX)

    @triton.jit
    def _sigmoid_and_rest(logits):
        """sigmoid((logit + SHIFT) / WIDTH) and 1 minus it, each with fp32's relative accuracy at both ends."""
        # The exponent stops at 100, where the sigmoid is 2^-100, so that inf * 0 cannot arise; a NaN stays a NaN.
        exponent = tl.minimum(logits.to(tl.float32) * SLOPE + OFFSET, 100.0, propagate_nan=tl.PropagateNan.ALL)
        power = tl.exp2(exponent)
        root = tl.rsqrt(1.0 + power)
        sig = root * root  # to 3e-7, in 2 instructions; a division takes 5
        return sig, power * sig

    @triton.jit
    def _softcapped_cross_entropy_row(
        logits_ptr,
        targets_ptr,
        weights_ptr,
        losses_ptr,
        grad_ptr,
        T,
        V,
        grad_scale,
        K: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """One program per row sweeps its columns twice: once for the sum of exponentials, once for the gradient."""
        # Three special functions per element and sweep, which run at a fraction of the rate of other arithmetic, should
        # bound it, not the masks or the compares with the targets. Its time has not been measured yet.
        row = tl.program_id(0)
        logits_ptr += row.to(tl.int64) * V  # 64 bits: T * V passes 2^31 at 43,000 rows of 50,304
        grad_ptr += row.to(tl.int64) * V

        # z < CAP, so exp(z - CAP) cannot overflow and the largest z need not be known: z - CAP = -CAP * rest.
        sums = tl.zeros([BLOCK], tl.float32)
        for start in tl.range(0, V, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            logits = tl.load(logits_ptr + cols, mask=cols < V, other=0.0, eviction_policy="evict_last")
            _, rest = _sigmoid_and_rest(logits)
            sums += tl.where(cols < V, tl.exp2(rest * DROP), 0.0)
        total = tl.sum(sums)
        log_total = tl.log(total)

        loss = 0.0
        weight_sum = 0.0
        for k in tl.static_range(K):
            inside = row + k < T
            target = tl.load(targets_ptr + row + k, mask=inside, other=0)
            weight = tl.load(weights_ptr + k, mask=inside, other=0.0)
            _, target_rest = _sigmoid_and_rest(tl.load(logits_ptr + target))
            loss += weight * (log_total + CEILING * target_rest)
            weight_sum += weight
        tl.store(losses_ptr + row, loss)

        scale = grad_scale * STEEPNESS
        share = scale * weight_sum / total
        for start in tl.range(0, V, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            logits = tl.load(logits_ptr + cols, mask=cols < V, other=0.0, eviction_policy="evict_first")
            sig, rest = _sigmoid_and_rest(logits)
            grad = tl.exp2(rest * DROP) * share
            for k in tl.static_range(K):
                # Two scalars from L1; -1, for a target that falls off the end, matches no column.
                target_col = tl.load(targets_ptr + row + k, mask=row + k < T, other=-1).to(tl.int32)
                grad = tl.where(cols == target_col, grad - scale * tl.load(weights_ptr + k), grad)
            grad *= sig * rest
            if grad_ptr.dtype.element_ty == tl.float8e5:
                grad = tl.clamp(grad, -E5M2_LIMIT, E5M2_LIMIT, propagate_nan=tl.PropagateNan.ALL)
            tl.store(grad_ptr + cols, grad.to(grad_ptr.dtype.element_ty), mask=cols < V)

    @torch.library.custom_op("speedrun::softcapped_cross_entropy", mutates_args=())
    def softcapped_cross_entropy_kernel(
        logits: Tensor, targets: Tensor, weights: Tensor, grad_scale: float, grad_dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """(losses, grad) as defined above, by the kernel."""
        _check_cross_entropy(logits, targets, weights)
        if logits.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise ValueError(f"logits are {logits.dtype}: convert them to bfloat16, float16 or float32.")
        if grad_dtype not in KERNEL_GRAD_DTYPES:
            raise ValueError(f"grad_dtype is {grad_dtype}: pass one of {', '.join(map(str, KERNEL_GRAD_DTYPES))}.")
        tokens, vocab = logits.shape
        losses = torch.empty(tokens, dtype=torch.float32, device=logits.device)
        grad = torch.empty_like(logits, dtype=grad_dtype)
        _softcapped_cross_entropy_row[(tokens,)](
            logits, targets, weights, losses, grad, tokens, vocab, grad_scale, K=len(weights), BLOCK=4096, num_warps=8
        )
        return losses, grad

    @softcapped_cross_entropy_kernel.register_fake
    def _(logits, targets, weights, grad_scale, grad_dtype):
        return logits.new_empty(logits.shape[0], dtype=torch.float32), torch.empty_like(logits, dtype=grad_dtype)


@torch.no_grad()
def softcapped_cross_entropy(
    logits: Tensor, targets: Tensor, weights: Tensor, grad_scale: float, grad_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(losses, grad) as defined above: by the kernel on a GPU, by the reference elsewhere."""
    if kernels_available(logits.device):
        return softcapped_cross_entropy_kernel(logits, targets, weights, grad_scale, grad_dtype)
    return softcapped_cross_entropy_reference(logits, targets, weights, grad_scale, grad_dtype)
