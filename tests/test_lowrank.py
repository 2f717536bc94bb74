"""Eq. (1) and (4): the closed forms are what the dense ones are, and the regularisers do what their names say."""

import pytest
import torch

from lowrank import FORMS, orthogonality, task_cosines, task_prompt

L, N, P, r, d = 3, 4, 6, 2, 7


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def dense_orthogonality(u, v, form):
    """Eq. (4) with the (d, d) matrices written out, a mean over layers and ordered pairs; u (L, N, r), v (L, N, d)."""
    terms = []
    for u_l, v_l in zip(u, v):
        A = [torch.outer(u_i, v_i) for u_i, v_i in zip(u_l, v_l)]  # N x (r, d)
        for i in range(len(A)):
            for j in range(len(A)):
                if i != j:
                    AA = A[i].T @ A[j]  # (d, d)
                    cosine = (A[i] * A[j]).sum() / (A[i].norm() * A[j].norm())
                    terms.append({"cosine": cosine**2, "frobenius": AA.norm() ** 2,
                                  "printed": (AA - torch.eye(len(AA), dtype=AA.dtype)).norm() ** 2}[form])
    return torch.stack(terms).mean()


def mean_cosine(u, v, absolute=False):
    others = ~torch.eye(u.shape[-2], dtype=torch.bool)
    cosines = task_cosines(u, v)[..., others]
    return float((cosines.abs() if absolute else cosines).mean())


def minimise(form, init=0.1, steps=400, tasks=8, rank=4, width=64, learning_rate=1e-2):
    """Adam on the regulariser alone from small factors; -> (u, v) at the start, (u, v) at the end."""
    u = (init * random(tasks, rank, seed=1, dtype=torch.float32)).requires_grad_()
    v = (init * random(tasks, width, seed=2, dtype=torch.float32)).requires_grad_()
    start = u.detach().clone(), v.detach().clone()
    optimizer = torch.optim.Adam([u, v], lr=learning_rate)
    for _ in range(steps):
        optimizer.zero_grad()
        orthogonality(u, v, form).backward()
        optimizer.step()
    return start, (u.detach(), v.detach())


def test_task_prompt_is_theta0_plus_the_scaled_product():
    theta0, B, u, v, s = random(P, d), random(P, r, seed=1), random(r, seed=2), random(d, seed=3), 0.7
    theta = theta0.clone()
    for p in range(P):
        for i in range(d):
            for k in range(r):
                theta[p, i] += s * B[p, k] * u[k] * v[i]
    torch.testing.assert_close(task_prompt(theta0, B, u, v, s), theta)
    torch.testing.assert_close(task_prompt(theta0, B, u, v, s), theta0 + s * B @ torch.outer(u, v))


def test_task_prompt_broadcasts_over_layers_and_tasks():
    theta0, B, u, v = random(L, P, d), random(L, P, r, seed=1), random(L, N, r, seed=2), random(L, N, d, seed=3)
    theta = task_prompt(theta0[:, None], B[:, None], u, v, 0.5)
    assert theta.shape == (L, N, P, d)
    for layer in range(L):
        for task in range(N):
            one = task_prompt(theta0[layer], B[layer], u[layer, task], v[layer, task], 0.5)
            torch.testing.assert_close(theta[layer, task], one)


@pytest.mark.parametrize("rank", [1, 2, 5, 9])
def test_the_step_of_a_task_has_rank_one_for_every_r(rank):
    theta0, B, u, v = random(P, d), random(P, rank, seed=1), random(rank, seed=2), random(d, seed=3)
    step = task_prompt(theta0, B, u, v, 1.0) - theta0
    assert torch.linalg.matrix_rank(step, rtol=1e-9) == 1


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_the_row_weights_of_all_tasks_lie_in_the_columns_of_b(rank):
    theta0, B, u, v = random(P, d), random(P, rank, seed=1), random(8, rank, seed=2), random(8, d, seed=3)
    steps = task_prompt(theta0, B, u, v, 1.0) - theta0  # (8, P, d)
    rows = steps.transpose(0, 1).flatten(1)  # (P, 8 * d)
    assert torch.linalg.matrix_rank(rows, rtol=1e-9) == rank


@pytest.mark.parametrize("form", ["cosine", "frobenius", "printed"])
def test_closed_form_equals_dense(form):
    u, v = random(L, N, r), random(L, N, d, seed=1)
    torch.testing.assert_close(orthogonality(u, v, form), dense_orthogonality(u, v, form))
    torch.testing.assert_close(orthogonality(u[0], v[0], form), dense_orthogonality(u[:1], v[:1], form))


@pytest.mark.parametrize("form", ["cosine", "frobenius", "printed"])
def test_gradient_of_closed_form_equals_dense(form):
    gradients = []
    for f in (orthogonality, dense_orthogonality):
        u, v = random(L, N, r).requires_grad_(), random(L, N, d, seed=1).requires_grad_()
        gradients.append(torch.autograd.grad(f(u, v, form), (u, v)))
    torch.testing.assert_close(*gradients)


def test_task_cosines_are_those_of_the_matrices():
    u, v = random(N, r), random(N, d, seed=1)
    A = torch.stack([torch.outer(*factors).flatten() for factors in zip(u, v)])  # (N, r * d)
    A = A / A.norm(dim=1, keepdim=True)
    torch.testing.assert_close(task_cosines(u, v), A @ A.T)


@pytest.mark.parametrize("form", ["cosine", "frobenius", "printed"])
def test_no_d_by_d_matrix_is_built(form):
    u, v = random(2, r), random(2, 300_000, seed=1)  # a dense A_i^T A_j would take 720 GB
    assert orthogonality(u, v, form).isfinite()


def test_default_is_the_cosine():
    u, v = random(N, r), random(N, d, seed=1)
    assert orthogonality(u, v) == orthogonality(u, v, "cosine") != orthogonality(u, v, "frobenius")


@pytest.mark.parametrize("form", FORMS)
def test_one_task_gives_zero(form):
    assert orthogonality(random(L, 1, r), random(L, 1, d), form) == 0


def test_off_gives_zero():
    assert orthogonality(random(N, r), random(N, d), "off") == 0


@pytest.mark.parametrize("zero", ["u of one task", "v of one task", "all"])
@pytest.mark.parametrize("form", FORMS)
def test_zero_factors_give_no_nan(form, zero):
    u, v = random(L, N, r), random(L, N, d, seed=1)
    if zero != "v of one task":
        u[:, slice(None) if zero == "all" else 0] = 0
    if zero != "u of one task":
        v[:, slice(None) if zero == "all" else 0] = 0
    u.requires_grad_(), v.requires_grad_()
    value = orthogonality(u, v, form)
    assert value.isfinite()
    if form == "off":
        return
    for gradient in torch.autograd.grad(value, (u, v)):
        assert gradient.isfinite().all()


def test_unknown_form_is_refused():
    with pytest.raises(ValueError, match="literal.*cosine, frobenius, printed, off"):
        orthogonality(random(N, r), random(N, d), "literal")


def test_cosine_does_not_change_when_factors_are_rescaled():
    u, v = random(N, r), random(N, d, seed=1)
    scales = torch.tensor([[0.01], [-3.0], [100.0], [0.5]], dtype=u.dtype)
    torch.testing.assert_close(orthogonality(u * scales, v / 7), orthogonality(u, v))
    assert not torch.isclose(orthogonality(u * scales, v / 7, "frobenius"), orthogonality(u, v, "frobenius"))


def test_printed_form_aligns_the_tasks():
    start, end = minimise("printed")
    assert abs(mean_cosine(*start)) < 0.1
    assert mean_cosine(*end) > 0.5


def test_cosine_form_makes_the_tasks_orthogonal():
    start, end = minimise("cosine")
    assert mean_cosine(*end, absolute=True) < 0.2 * mean_cosine(*start, absolute=True)
    assert abs(mean_cosine(*end)) < 0.02  # and none of the alignment of the printed form
    assert end[1].norm() > 0.9 * start[1].norm()  # not by shrinking


def test_frobenius_form_is_met_by_shrinking():
    start, end = minimise("frobenius", init=0.5)
    assert end[0].norm() * end[1].norm() < 0.5 * start[0].norm() * start[1].norm()
