"""Eq. (2) against a slow reference: two softmaxes, one gate, every kind of mask, grouped heads.

What a gate of zero does is tested on whole models: test_model.py."""

import math

import pytest
import torch

from gating import gated_prefix_attention

B, H, K, T, S, P, h = 2, 4, 2, 5, 5, 3, 8
GATE = torch.tensor([0.7, -0.4, 1.5, 3.0], dtype=torch.float64)  # (H,)


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def tensors(T=T, S=S, dtype=torch.float64):
    """q, k, v, prefix_k, prefix_v"""
    return (random(B, H, T, h, dtype=dtype), random(B, K, S, h, seed=1, dtype=dtype),
            random(B, K, S, h, seed=2, dtype=dtype), random(B, K, P, h, seed=3, dtype=dtype),
            random(B, K, P, h, seed=4, dtype=dtype))


def slow_attention(q, k, v, prefix_k, prefix_v, gate, allowed=None, scale=None):
    """Eq. (2) one head and one query at a time; gate (H,), allowed broadcastable to (B, H, T, S), bool."""
    scale = 1 / math.sqrt(h) if scale is None else scale
    out, T, S = torch.zeros_like(q), q.shape[2], k.shape[2]
    allowed = torch.ones(B, H, T, S, dtype=torch.bool) if allowed is None else allowed.expand(B, H, T, S)
    for b in range(B):
        for head in range(H):
            group = head // (H // K)
            for t in range(T):
                scores = (k[b, group] @ q[b, head, t] * scale).masked_fill(~allowed[b, head, t], -torch.inf)  # (S,)
                prefix_scores = prefix_k[b, group] @ q[b, head, t] * scale  # (P,)
                out[b, head, t] = scores.softmax(0) @ v[b, group]
                out[b, head, t] += math.tanh(gate[head]) * (prefix_scores.softmax(0) @ prefix_v[b, group])
    return out


def causal(T, S):
    return torch.ones(T, S, dtype=torch.bool).tril(S - T)  # the last query sits at the last key


def padded(T=T, S=S):
    """Causal, and the first key of the second row is padding; (B, 1, T, S)."""
    allowed = causal(T, S).repeat(B, 1, 1, 1)
    allowed[1, :, :, 0] = False
    allowed[1, :, 0, 1 if T == S else 0] = True  # no query without a key
    return allowed


@pytest.mark.parametrize("scale", [None, 0.9])
@pytest.mark.parametrize("is_causal", [False, True])
def test_open_gates_equal_the_reference(is_causal, scale):
    out = gated_prefix_attention(*tensors(), GATE, is_causal=is_causal, scale=scale)
    torch.testing.assert_close(out, slow_attention(*tensors(), GATE, causal(T, S) if is_causal else None, scale))
    for one in (GATE[1], GATE[1:2]):  # serves all heads
        out = gated_prefix_attention(*tensors(), one)
        torch.testing.assert_close(out, slow_attention(*tensors(), one.expand(H)))


@pytest.mark.parametrize("queries", [T, 2, 1])  # fewer queries than keys: a cache
@pytest.mark.parametrize("kind", ["boolean", "additive"])
def test_open_gates_equal_the_reference_under_a_mask(kind, queries):
    allowed = padded(queries)
    mask = allowed if kind == "boolean" else torch.zeros(allowed.shape).double().masked_fill(~allowed, -1e30)
    out = gated_prefix_attention(*tensors(queries), GATE, attention_mask=mask)
    torch.testing.assert_close(out, slow_attention(*tensors(queries), GATE, allowed))
