"""The kernels of `ops.linear_cross_entropy` and `ops.linear_divergence` (native/softmax_losses.cpp)."""

from __future__ import annotations

from torch import Tensor

from backhand.kernels.library import DOUBLE, INT, INT64, POINTER, KernelSignature, find_kernel

_SOFTMAX_LOSSES = KernelSignature(
    "backhand_softmax_losses", INT, POINTER, INT64, POINTER, POINTER, INT64, INT64, INT, result=INT
)
_DIVERGENCES = KernelSignature(
    "backhand_divergences",
    *(INT, POINTER, INT64, POINTER, INT64, POINTER, INT64, INT64, INT, DOUBLE, INT),
    result=INT,
)
# The errors by the numbers that native/softmax_losses.cpp returns.
_OUTCOMES: dict[int, type[Exception]] = {1: MemoryError, 2: IndexError}


def softmax_losses(logits: Tensor, targets: Tensor, losses: Tensor, *, gradient: bool) -> bool:
    """Write the losses of rows of logits and return True; return False if the kernel does not apply.

    Args:
        logits: (rows, vocab); with `gradient` they are replaced by softmax - onehot.
        targets: (rows,) int64.
        losses: (rows,), float32 or wider.

    Raises:
        MemoryError: no memory for a row.
        IndexError: a target is not in [0, vocab).
    """
    kernel = find_kernel(_SOFTMAX_LOSSES, logits)
    if kernel is None or not targets.is_contiguous():
        return False
    rows, vocab = logits.shape
    where = (logits.data_ptr(), logits.stride(0), targets.data_ptr(), losses.data_ptr())
    outcome = kernel(*where, rows, vocab, gradient)
    if outcome:
        raise _OUTCOMES[outcome](f"a row of {vocab} logits: no memory for it, or a target that is none of them")
    return True


def divergences(student: Tensor, teacher: Tensor, losses: Tensor, kind: int, beta: float, *, gradient: bool) -> bool:
    """Write the divergences of rows of logits and return True; return False if the kernel does not apply.

    Args:
        student: (rows, vocab); with `gradient` they are replaced by the gradient.
        teacher: (rows, vocab), of the same dtype.
        losses: (rows,), float32 or wider.
        kind: index of the form in `ops.linear_divergence.DIVERGENCES`.
        beta: the teacher's share in the mixture, which only the last form reads.
        gradient: replace the student's logits.

    Raises:
        MemoryError: no memory for a row.
    """
    kernel = find_kernel(_DIVERGENCES, student, teacher)
    if kernel is None:
        return False
    rows, vocab = student.shape
    where = (student.data_ptr(), student.stride(0), teacher.data_ptr(), teacher.stride(0), losses.data_ptr())
    if kernel(*where, rows, vocab, kind, beta, gradient):
        raise MemoryError(f"no memory for a row of {vocab} logits")
    return True
