r"""The task-adaptive low-rank prompt: one prompt for all tasks, and one small step away from it for each task.

A soft prompt is a list of P trainable vectors that a frozen language model attends to. TA-LoRA keeps one such
prompt, ``theta0``, for all tasks, and lets task i move it by a low-rank matrix:

    theta_i = theta0 + s * B A_i,        A_i = u_i (x) v_i                                              Eq. (1)

``B`` is shared by all tasks and learns slowly, ``u_i`` and ``v_i`` belong to one task and learn fast. Written out,
``B A_i = (B u_i) v_i^T``: every row p of the prompt moves along the *same* direction ``v_i`` of the model's width, by
the weight ``(B u_i)[p]``. So the step has rank 1 whatever r is, and r only says how many ways of weighting the rows
the tasks have in common. A task is stored in r + d parameters per layer instead of P * d.

So that tasks use different steps, the loss of the multitask stage has a term R, Eq. (3), that asks the task matrices
to be orthogonal. The public summaries of the paper print

    R = sum_{i != j} || A_i^T A_j - I ||_F^2                                                            Eq. (4)

For rank-1 matrices ``A_i^T A_j = (u_i . u_j) v_i v_j^T``, so no d x d matrix is ever built:

    <A_i, A_j>_F        = (u_i . u_j) (v_i . v_j)
    || A_i^T A_j ||_F^2 = (u_i . u_j)^2 |v_i|^2 |v_j|^2
    || A_i^T A_j - I ||_F^2 = || A_i^T A_j ||_F^2 - 2 <A_i, A_j>_F + d

The last line is the printed form, and its middle term *rewards* tasks for pointing the same way: near zero factors its
gradient makes ``<A_i, A_j>`` grow. That contradicts the purpose the text gives it, so the default here is the mean
squared cosine between task matrices, which is met by orthogonal tasks only and cannot be met by shrinking them.
Orthogonal means ``<A_i, A_j>_F = 0``: orthogonal u or v suffice. ``A_i^T A_j = 0`` needs orthogonal u, at most r tasks.

    symbol   code     shape       meaning
    theta0   theta0   (P, d)      prompt shared by all tasks
    B        B        (P, r)      slow weight, shared by all tasks
    u_i      u        (r,)        fast weight of task i, on the side of the prompt's rows
    v_i      v        (d,)        fast weight of task i, on the side of the model's width
    s        s        float       scale of the step

P prompt length, d model width, r rank, N tasks. Leading dimensions (layers, tasks) broadcast.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

FORMS = ("cosine", "frobenius", "printed", "off")


def task_prompt(theta0: Tensor, B: Tensor, u: Tensor, v: Tensor, s: float) -> Tensor:
    """The prompt of a task, Eq. (1).

    theta0 (..., P, d), B (..., P, r), u (..., r), v (..., d), s a plain number -> (..., P, d). Multiplying ``B u``
    first costs P * r + P * d products; ``u v^T`` first would build an (r, d) matrix and cost P * r * d.
    """
    Bu = B @ u.unsqueeze(-1)  # (..., P, 1): how far each row of the prompt moves
    return theta0 + s * Bu * v.unsqueeze(-2)  # (..., P, d)  Eq. (1)


def orthogonality(u: Tensor, v: Tensor, form: str = "cosine") -> Tensor:
    """How far the task matrices A_i = u_i v_i^T are from orthogonal, Eq. (4); a mean over layers and pairs i != j.

    u (..., N, r), v (..., N, d) -> scalar. In closed form: O(N^2 (r + d)) numbers, never a d x d matrix.

    form  "cosine"     cos(A_i, A_j)^2, the default: it does not change when a factor is rescaled
          "frobenius"  || A_i^T A_j ||_F^2, the printed form without I: also met by shrinking every factor to zero
          "printed"    || A_i^T A_j - I ||_F^2, read as a Frobenius norm: rewards alignment (see above)
          "off"        0
    A single task has no pair and gives 0. Raises ValueError for another form.
    """
    if form not in FORMS:
        raise ValueError(f"unknown form of the orthogonality regulariser '{form}'; choose one of {', '.join(FORMS)}")
    tasks = u.shape[-2]
    if form == "off" or tasks < 2:
        return u.new_zeros(())
    if form == "cosine":
        pairs = task_cosines(u, v).square()
    else:
        uu, vv = u @ u.mT, v @ v.mT  # (..., N, N): u_i . u_j and v_i . v_j
        squares = v.square().sum(-1)  # (..., N): |v_i|^2
        pairs = uu.square() * squares.unsqueeze(-1) * squares.unsqueeze(-2)  # ||A_i^T A_j||_F^2
        if form == "printed":
            pairs = pairs - 2 * uu * vv + v.shape[-1]  # ||A_i^T A_j - I||_F^2  Eq. (4)
    itself = torch.eye(tasks, dtype=torch.bool, device=u.device)  # (N, N): i == j
    return pairs.masked_fill(itself, 0).sum((-2, -1)).mean() / (tasks * (tasks - 1))


def task_cosines(u: Tensor, v: Tensor) -> Tensor:
    """cos(A_i, A_j) = cos(u_i, u_j) * cos(v_i, v_j) for every pair; u (..., N, r), v (..., N, d) -> (..., N, N).

    eps gives a task whose factors are still zero the cosine 0 instead of 0 / 0.
    """
    u, v = F.normalize(u, dim=-1, eps=1e-6), F.normalize(v, dim=-1, eps=1e-6)
    return (u @ u.mT) * (v @ v.mT)
