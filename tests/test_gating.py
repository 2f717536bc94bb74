"""Eq. (2) against a slow reference: two softmaxes, one gate, every kind of mask, grouped heads."""

import math

import pytest
import torch

from gating import gated_prefix_attention

B, H, K, T, S, P, h = 2, 4, 2, 5, 5, 3, 8


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def tensors(T=T, S=S, dtype=torch.float64):
    """q, k, v, prefix_k, prefix_v"""
    return (random(B, H, T, h, dtype=dtype), random(B, K, S, h, seed=1, dtype=dtype),
            random(B, K, S, h, seed=2, dtype=dtype), random(B, K, P, h, seed=3, dtype=dtype),
            random(B, K, P, h, seed=4, dtype=dtype))


def eager(q, k, v, prefix_k, prefix_v, gate, allowed=None, scale=None):
    """Eq. (2) one head and one query at a time; gate (H,), allowed (B, H, T, S) bool."""
    scale = 1 / math.sqrt(h) if scale is None else scale
    out = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for head in range(H):
            group = head // (H // K)
            for t in range(q.shape[2]):
                scores = k[b, group] @ q[b, head, t] * scale  # (S,)
                if allowed is not None:
                    scores = scores.masked_fill(~allowed[b, head, t], -torch.inf)
                prefix_scores = prefix_k[b, group] @ q[b, head, t] * scale  # (P,)
                out[b, head, t] = scores.softmax(0) @ v[b, group]
                out[b, head, t] += math.tanh(gate[head]) * (prefix_scores.softmax(0) @ prefix_v[b, group])
    return out


GATE = torch.tensor([0.7, -0.4, 1.5, 3.0], dtype=torch.float64)


def padded(T=T, S=S):
    """Causal, and the first key of the second row is padding; the last query sits at the last key. (B, 1, T, S)"""
    allowed = torch.ones(T, S, dtype=torch.bool).tril(S - T).repeat(B, 1, 1, 1)
    allowed[1, :, :, 0] = False
    allowed[1, :, 0, 1 if T == S else 0] = True  # no query without a key
    return allowed


def test_open_gates_equal_the_reference_without_a_mask():
    torch.testing.assert_close(gated_prefix_attention(*tensors(), GATE), eager(*tensors(), GATE))


def test_causal():
    causal = torch.ones(T, S, dtype=torch.bool).tril().expand(B, H, T, S)
    torch.testing.assert_close(gated_prefix_attention(*tensors(), GATE, is_causal=True),
                               eager(*tensors(), GATE, causal))


@pytest.mark.parametrize("queries", [T, 2, 1])  # fewer queries than keys: a cache
@pytest.mark.parametrize("heads", [1, H])
@pytest.mark.parametrize("kind", ["boolean", "additive"])
def test_masks(kind, heads, queries):
    allowed = padded(queries).expand(B, heads, queries, S)
    mask = allowed if kind == "boolean" else torch.zeros(allowed.shape).double().masked_fill(~allowed, -1e30)
    torch.testing.assert_close(gated_prefix_attention(*tensors(queries), GATE, attention_mask=mask),
                               eager(*tensors(queries), GATE, allowed.expand(B, H, queries, S)))


def test_the_mask_does_not_touch_the_prompt():
    q, k, v, prefix_k, prefix_v = tensors(P, P)  # as many keys as prompt rows: a mask applied to both would fit
    diagonal = torch.eye(P, dtype=torch.bool).expand(B, 1, P, P)
    out = gated_prefix_attention(q, k, v, prefix_k, prefix_v, GATE, attention_mask=diagonal)
    torch.testing.assert_close(out, eager(q, k, v, prefix_k, prefix_v, GATE, diagonal.expand(B, H, P, P)))
    out = gated_prefix_attention(q, k, v, prefix_k, prefix_v, GATE, is_causal=True)
    causal = torch.ones(P, P, dtype=torch.bool).tril().expand(B, H, P, P)
    torch.testing.assert_close(out, eager(q, k, v, prefix_k, prefix_v, GATE, causal))


def test_scale_is_that_of_both_softmaxes():
    torch.testing.assert_close(gated_prefix_attention(*tensors(), GATE, scale=0.9), eager(*tensors(), GATE, scale=0.9))


@pytest.mark.parametrize("shape", [(), (1,), (H,)])
def test_gate_per_layer_and_per_head(shape):
    gate = GATE if shape == (H,) else torch.full(shape, 0.6, dtype=torch.float64)
    torch.testing.assert_close(gated_prefix_attention(*tensors(), gate), eager(*tensors(), gate.expand(H)))


@pytest.mark.parametrize("mask", [None, padded()])
def test_zero_gate_is_exactly_the_attention_to_the_text(mask):
    q, k, v, prefix_k, prefix_v = tensors(dtype=torch.float32)
    out = gated_prefix_attention(q, k, v, prefix_k, prefix_v, torch.zeros(()), attention_mask=mask)
    groups = (x.repeat_interleave(H // K, 1) for x in (k, v))
    text = torch.nn.functional.scaled_dot_product_attention(q, *groups, mask)
    assert torch.equal(out, text)


def test_the_gate_goes_through_tanh():
    zero, one, three, many = (gated_prefix_attention(*tensors(), torch.tensor(g).double()) for g in (0, 1, 3, 60))
    prompt = many - zero  # tanh(60) = 1
    torch.testing.assert_close(three - zero, math.tanh(3) * prompt)
    torch.testing.assert_close(one - zero, math.tanh(1) * prompt)
    assert prompt.abs().mean() > 0.1


def test_bfloat16_in_bfloat16_out_with_a_gate_in_fp32():
    out = gated_prefix_attention(*tensors(dtype=torch.bfloat16), GATE.float(), is_causal=True)
    assert out.dtype == torch.bfloat16
    causal = torch.ones(T, S, dtype=torch.bool).tril().expand(B, H, T, S)
    wide = eager(*(x.double() for x in tensors(dtype=torch.bfloat16)), GATE, causal)
    torch.testing.assert_close(out.double(), wide, atol=0.03, rtol=0.03)


def test_at_gate_zero_the_gate_learns_and_the_prompt_does_not():
    q, k, v, prefix_k, prefix_v = tensors()
    prefix_k.requires_grad_(), prefix_v.requires_grad_()
    for value in (0.0, 0.5):
        gate = torch.full((H,), value, dtype=torch.float64, requires_grad=True)
        out = gated_prefix_attention(q, k, v, prefix_k, prefix_v, gate)
        of_gate, *of_prompt = torch.autograd.grad((out * random(*out.shape, seed=9)).sum(), (gate, prefix_k, prefix_v))
        assert (of_gate != 0).all()
        for gradient in of_prompt:
            assert (gradient == 0).all() if value == 0 else (gradient != 0).all()
