"""Eq. (1) and (4): the closed forms equal the dense ones, for every form of the regulariser."""

import pytest
import torch

from lowrank import FORMS, orthogonality, task_prompt

L, N, P, r, d = 3, 4, 6, 2, 7


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def factors():
    """u (L, N, r) and v (L, N, d)"""
    return random(L, N, r), random(L, N, d, seed=1)


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


def test_a_task_prompt_is_theta0_plus_the_scaled_product_in_every_layer_and_task():
    theta0, B, (u, v), s = random(L, P, d), random(L, P, r, seed=1), factors(), 0.7
    theta = task_prompt(theta0[:, None], B[:, None], u, v, s)
    assert theta.shape == (L, N, P, d)
    for layer in range(L):
        for task in range(N):
            expected = theta0[layer] + s * B[layer] @ torch.outer(u[layer, task], v[layer, task])
            torch.testing.assert_close(theta[layer, task], expected)
            alone = task_prompt(theta0[layer], B[layer], u[layer, task], v[layer, task], s)
            torch.testing.assert_close(alone, expected)
            assert torch.linalg.matrix_rank(expected - theta0[layer], rtol=1e-9) == 1, "a step of rank one"


@pytest.mark.parametrize("form", ["cosine", "frobenius", "printed"])
def test_the_closed_form_and_its_gradient_equal_the_dense_ones(form):
    results = []
    for function in (orthogonality, dense_orthogonality):
        u, v = (factor.requires_grad_() for factor in factors())
        value = function(u, v, form)
        results.append((value, *torch.autograd.grad(value, (u, v))))
    torch.testing.assert_close(*results)
    u, v = factors()
    torch.testing.assert_close(orthogonality(u[0], v[0], form), dense_orthogonality(u[:1], v[:1], form))
    wide = random(2, 300_000)  # a dense A_i^T A_j would take 720 GB
    assert orthogonality(u[0, :2], wide, form).isfinite()


def test_the_cosine_is_the_default_off_and_a_single_task_give_zero_and_other_forms_are_refused():
    u, v = factors()
    assert orthogonality(u, v) == orthogonality(u, v, "cosine") != orthogonality(u, v, "frobenius")
    assert orthogonality(u, v, "off") == 0
    assert all(orthogonality(u[:, :1], v[:, :1], form) == 0 for form in FORMS)
    with pytest.raises(ValueError, match="literal.*cosine, frobenius, printed, off"):
        orthogonality(u, v, "literal")


@pytest.mark.parametrize("form", ["cosine", "frobenius", "printed"])
def test_zero_factors_give_no_nan(form):
    for zero_u, zero_v in ((slice(1), slice(0)), (slice(0), slice(1)), (slice(None), slice(None))):
        u, v = factors()
        u[:, zero_u], v[:, zero_v] = 0, 0
        value = orthogonality(u.requires_grad_(), v.requires_grad_(), form)
        assert all(number.isfinite().all() for number in (value, *torch.autograd.grad(value, (u, v))))
