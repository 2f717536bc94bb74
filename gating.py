r"""Zero-initialised attention: a prompt that starts silent, and one gate per layer that learns how much of it to add.

A freshly initialised prompt is noise, and noise in every layer breaks what a pretrained model can do. So the text
attends to the prompt in a softmax of its own, and a gate scales what comes back:

    O = softmax(q K_x^T / sqrt(h)) V_x  +  tanh(g) * softmax(q K_theta^T / sqrt(h)) V_theta             Eq. (2)
        ----------- the text -----------             -------------- the prompt --------------

``K_theta = k_proj(theta_i)`` and ``V_theta = v_proj(theta_i)`` go through the layer's own frozen projections. With
g = 0 the second term vanishes and the model is the backbone, exactly. One softmax over text and prompt together would
not do: even with values at zero the prompt's keys would draw attention away from the text.

``tanh`` keeps the prompt's share within (-1, 1), and the share is *signed*: after training some gates are negative, and
their layers subtract what the prompt contributes. A gate that changes its sign passes through "shut".

At g = 0 the prompt gets no gradient: d loss / d theta carries the factor tanh(0) = 0. The gate does, since
d tanh(g) / dg = 1 there. So the task loss moves only the gates in the first step, and everything from the second step
on. This works because the gate is the *only* factor on its path that starts at zero: if what the prompt adds were zero
as well (a zero prompt through projections without a bias), neither would ever get a gradient.

Queries arrive rotated by their position, prompt keys are not rotated (as in LLaMA-Adapter): a prompt row has no place
in the text. That makes the score depend on the query's absolute position, so positions must always count real
tokens, not padding.

The frozen backbone is not touched: transformers lets a program register an attention function under a name
(https://huggingface.co/docs/transformers/attention_interface), and a model whose attention has that name calls it in
every layer with q, k, v and whatever extra arguments its forward was given. The prompt arrives as such an argument.

B batch, T text tokens, S keys (T plus what is in the cache), P prompt length, H query heads, K key/value heads,
h head size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

GATED_PREFIX = "gated_prefix"  # the name under which transformers finds this attention


def gated_prefix_attention(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, gate: Tensor,
                           attention_mask: Tensor | None = None, is_causal: bool = False,
                           scale: float | None = None) -> Tensor:
    """Attention to the text plus gated attention to the prompt, each with a softmax of its own, Eq. (2).

    q (B, H, T, h); k, v (B, K, S, h) with H a multiple of K; prefix_k, prefix_v (B, K, P, h); gate broadcastable to
    (H,), before the tanh; attention_mask broadcastable to (B, H, T, S), boolean (True = may be seen) or additive;
    scale 1/sqrt(h) unless given. -> (B, H, T, h). The prompt is never masked: every token sees all of it.
    """
    text = attend(q, k, v, attention_mask, is_causal, scale)  # (B, H, T, h)
    prompt = attend(q, prefix_k, prefix_v, None, False, scale)  # (B, H, T, h)
    gate = gate.expand(q.shape[1]).view(-1, 1, 1)  # (H, 1, 1)
    return text + (torch.tanh(gate) * prompt).to(text.dtype)  # Eq. (2)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None) -> Tensor:
    """softmax(q k^T * scale) v by torch's fused kernels; each of the K key/value heads serves H / K query heads."""
    if mask is not None and k.shape[1] != q.shape[1]:
        # With a mask, grouped heads have no fused kernel on a GPU and would fall back to the full (T, S) matrix.
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)  # (B, H, S, h)
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, scale=scale,
                                          enable_gqa=k.shape[1] != q.shape[1])


def prefix_key_value(attention: nn.Module, theta: Tensor) -> tuple[Tensor, Tensor]:
    """Prompts through the frozen projections of one layer's attention; theta (n, P, d) -> K and V, (n, K, P, h) each.

    Qwen3 also normalises its keys per head; the keys of the prompt pass the same norm.
    """
    theta = theta.to(attention.k_proj.weight.dtype)
    K_theta = attention.k_proj(theta).unflatten(-1, (-1, attention.head_dim))  # (n, P, K, h)
    V_theta = attention.v_proj(theta).unflatten(-1, (-1, attention.head_dim))
    if hasattr(attention, "k_norm"):
        K_theta = attention.k_norm(K_theta)
    return K_theta.transpose(1, 2), V_theta.transpose(1, 2)


def attention_of_layer(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
                       scaling: float | None = None, prefix: list | None = None, **_) -> tuple[Tensor, None]:
    """What every layer of the backbone calls; ``prefix[layer]`` holds this layer's (K_theta, V_theta, gate).

    Without a prefix it is the backbone's plain attention. Dropout is left out: the backbone is frozen.
    """
    # transformers builds no mask where a causal one says it all (no padding, no cache): then the flash kernel can run.
    is_causal = attention_mask is None and query.shape[2] > 1
    if prefix is None:
        out = attend(query, key, value, attention_mask, is_causal, scaling)
    else:
        prefix_k, prefix_v, gate = prefix[module.layer_idx]
        out = gated_prefix_attention(query, key, value, prefix_k, prefix_v, gate, attention_mask, is_causal, scaling)
    return out.transpose(1, 2).contiguous(), None  # (B, T, H, h)


AttentionInterface.register(GATED_PREFIX, attention_of_layer)
# Without a mask function of the same name transformers passes no mask at all, and padding is attended to silently.
AttentionMaskInterface.register(GATED_PREFIX, sdpa_mask)
