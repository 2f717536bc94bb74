r"""Ablations: TA-LoRA with one change each. Most of them change an option or what is trained: see the table at the end.
[paper: ...] says what the public summaries of the paper say about it.

B batch (as a weight (L, P, r)), T text tokens, S keys, P prompt length, d model width, H query heads, K key/value
heads, h head size, L layers, N tasks, n distinct tasks of a batch, r rank.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from experiments.baselines import ONE_SOFTMAX
from gating import attend, attention_of_layer, prefix_key_value
from lowrank import task_prompt
from model import NO_TASK, AdaptedLM, TALoRA, TALoRAConfig
from train import TALORA, Config, Method


class OpenGate(TALoRA):
    """Without zero-initialised attention: the gates are fixed open, tanh(g) = 1 from the first step."""

    method = "talora-open-gate"

    def __init__(self, backbone: PreTrainedModel, tasks: list[str], config: TALoRAConfig):
        super().__init__(backbone, tasks, config)
        nn.init.constant_(self.gate, 10.0)  # tanh(10) is 1 in fp32


class OneSoftmax(TALoRA):
    """Without zero-initialised attention: one softmax over text and prompt, as in prefix tuning. No gate is used."""

    method, attention = "talora-one-softmax", ONE_SOFTMAX

    def diagnose(self) -> dict:
        return {name: value for name, value in super().diagnose().items() if name != "gates"}


class GateOnTheStep(TALoRA):
    """One gate g for the low-rank part only, and another one, g0, for the shared prompt."""

    method, attention = "talora-gate-on-the-step", "gate_on_the_step"

    def __init__(self, backbone: PreTrainedModel, tasks: list[str], config: TALoRAConfig):
        super().__init__(backbone, tasks, config)
        self.gate0 = nn.Parameter(torch.zeros_like(self.gate))

    def prefix(self, task_ids: Tensor, rows: int) -> list[tuple]:
        """As TALoRA's, with theta0's keys, values and gate g0 behind: L x (K, V, g, K0, V0, g0)."""
        shared = super().prefix(torch.full_like(task_ids, NO_TASK), rows)
        return [(*own, K0, V0, g0) for own, (K0, V0, _), g0 in zip(super().prefix(task_ids, rows), shared, self.gate0)]


def step_gate_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
                        scaling: float, prefix: list | None = None, **_) -> tuple[Tensor, None]:
    """text + tanh(g0) P(theta0) + tanh(g) [P(theta_i) - P(theta0)]; arguments as gating.attention_of_layer."""
    out, _ = attention_of_layer(module, query, key, value, attention_mask, scaling)  # (B, T, H, h)
    if prefix is None:
        return out, None
    K, V, g, K0, V0, g0 = prefix[module.layer_idx]
    own, shared = (attend(query, k, v, None, False, scaling).transpose(1, 2) for k, v in ((K, V), (K0, V0)))
    opened, opened0 = (torch.tanh(gate.expand(query.shape[1])).unsqueeze(-1) for gate in (g, g0))  # (H, 1)
    return out + (opened0 * shared + opened * (own - shared)).to(out.dtype), None


AttentionInterface.register("gate_on_the_step", step_gate_attention)
AttentionMaskInterface.register("gate_on_the_step", sdpa_mask)


class OwnB(TALoRA):
    """A B for each task: theta_i = theta0 + s B_i A_i."""

    method = "talora-own-b"

    def __init__(self, backbone: PreTrainedModel, tasks: list[str], config: TALoRAConfig):
        super().__init__(backbone, [], config)
        del self.B
        self.B = nn.ParameterList()
        for task in tasks:
            self.add_task(task)

    def add_task(self, name: str) -> int:
        """Add a task with new u, v and B, and return its id."""
        new_id = super().add_task(name)
        L, P, r = len(self.theta0), self.config.prompt_length, self.config.rank
        self.B.append(nn.Parameter(torch.randn(L, P, r, device=self.device) * r**-0.5))
        return new_id

    def prompts(self, ids: list[int]) -> Tensor:
        u, v = self.factors(ids)  # (L, n, r), (L, n, d)
        B = torch.stack([torch.zeros_like(self.B[0]) if i == NO_TASK else self.B[i] for i in ids], 1)  # (L, n, P, r)
        return task_prompt(self.theta0[:, None], B, u, v, self.config.scale)  # (L, n, P, d)


class SumOfTerms(TALoRA):
    """A_i = sum_t u_it (x) v_it, a sum of several rank-1 terms, so the step B A_i has up to that rank."""

    method, terms = "talora-2-terms", 2

    def add_task(self, name: str) -> int:
        """Add a task with new factors, u (L, terms, r) and v (L, terms, d), and return its id."""
        new_id = AdaptedLM.add_task(self, name)  # TALoRA's would draw factors of one term
        L, d, r = len(self.theta0), self.theta0.shape[-1], self.config.rank
        self.u.append(nn.Parameter(torch.randn(L, self.terms, r, device=self.device) * r**-0.5))
        self.v.append(nn.Parameter(torch.randn(L, self.terms, d, device=self.device) * 0.02))
        return new_id

    def task_matrices(self, ids: list[int]) -> Tensor:
        """A_i of these tasks, (L, n, r, d); zero for NO_TASK."""
        zero = self.theta0.new_zeros(len(self.theta0), self.config.rank, self.theta0.shape[-1])  # (L, r, d)
        return torch.stack([zero if i == NO_TASK else self.u[i].mT @ self.v[i] for i in ids], 1)

    def prompts(self, ids: list[int]) -> Tensor:
        return self.theta0[:, None] + self.config.scale * self.B[:, None] @ self.task_matrices(ids)  # (L, n, P, d)

    def cosines(self) -> Tensor:
        flat = F.normalize(self.task_matrices(list(range(len(self.tasks)))).flatten(2), dim=-1, eps=1e-6)  # (L, N, r d)
        return flat @ flat.mT

    def orthogonality(self, form: str) -> Tensor:
        """The form "cosine", the only one here: the mean squared cosine of the task matrices."""
        pairs = ~torch.eye(len(self.tasks), dtype=torch.bool, device=self.device)
        return self.cosines()[:, pairs].square().mean() if len(self.tasks) > 1 else self.theta0.new_zeros(())


class FourTerms(SumOfTerms):
    method, terms = "talora-4-terms", 4


class SideBySide(TALoRA):
    """Every row sees [theta_1; ..; theta_N], N P rows, and attention chooses among them (base stage: theta0 alone)."""

    method = "talora-side-by-side"

    def copy_task(self, old: int, new: int) -> str:
        """Without a task id no source is nearer to a target than the others: it keeps its new u and v."""
        return "new weights"

    def prefix(self, task_ids: Tensor, rows: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        """As GatedPrompts', but (B, K, N P, h); ValueError for a batch of rows with and rows without a task."""
        ids, _ = self.check_tasks(task_ids, rows)
        if NO_TASK in ids and len(ids) > 1:
            raise ValueError(f"a batch has rows with and without a task ({NO_TASK}), but all its rows share one prompt")
        all_tasks = [NO_TASK] if ids == [NO_TASK] else list(range(len(self.tasks)))
        theta = self.prompts(all_tasks).flatten(1, 2).unsqueeze(1)  # (L, 1, N P, d)
        layers = zip(self.backbone.model.layers, theta.unbind(), self.gate.unbind())
        key_values = [(*prefix_key_value(layer.self_attn, theta), g) for layer, theta, g in layers]
        return [(K.expand(rows, -1, -1, -1), V.expand(rows, -1, -1, -1), g) for K, V, g in key_values]


# ------------------------------------------------------------------------------------------------------- the table

LEARNS = TALORA.learns
NO_GATES = LEARNS | {"base": {"theta0": "prompt"},
                     "multitask": {"theta0": "slow", "B": "slow", "u": "fast", "v": "fast"}}


def variant(name: str, says: str, model: type[TALoRA] = TALoRA, **changes) -> Method:
    """TA-LoRA with one change, called "talora <name>"; changes: fields of Method that differ."""
    return replace(TALORA, name=f"{TALORA.name} {name}", says=says, model=model, **changes)


def always(**options) -> Callable[[Config], dict]:
    """A Method.fixes that sets these options, whatever the others are."""
    return lambda cfg: options


VARIANTS = {method.name.removeprefix(f"{TALORA.name} "): method for method in (
    variant("equal-rates", "without fast-slow: B and theta0 learn as fast as u and v [paper's ablation]",
            fixes=lambda cfg: {"slow_rate": cfg.fast_rate}),
    variant("slow-eighth", "B and theta0 at an eighth of the fast learning rate [paper: slower, ratio open]",
            fixes=lambda cfg: {"slow_rate": cfg.fast_rate / 8}),
    variant("rates-swapped", "B and theta0 fast, u and v slow [paper: the other way]",
            fixes=lambda cfg: {"slow_rate": max(cfg.slow_rate, cfg.fast_rate),  # the same again when the run resumes
                               "fast_rate": min(cfg.slow_rate, cfg.fast_rate)}),
    variant("open-gate", "without zero-init attention: tanh(g) = 1 throughout [paper's ablation]", OpenGate,
            learns=NO_GATES, fresh_gates=False),
    variant("one-softmax", "without zero-init attention: text and prompt in one softmax [paper's ablation]", OneSoftmax,
            learns=NO_GATES, fresh_gates=False),
    variant("reg-frobenius", "regulariser ||A_i^T A_j||^2 [paper: with - I]", fixes=always(regulariser="frobenius")),
    variant("reg-printed", "regulariser ||A_i^T A_j - I||^2, as printed [paper]", fixes=always(regulariser="printed")),
    variant("reg-off", "no regulariser [paper: has one; no such ablation is known]", fixes=always(regulariser="off")),
    variant("own-b", "a B for each task, trained on a target as well [paper: printed as B_i]", OwnB,
            learns=LEARNS | {"target": {"u": "target", "v": "target", "B": "target"}}),
    variant("side-by-side", "the (+) of Eq. (1) as concatenation: all tasks' prompts, no task id [paper: open]",
            SideBySide),
    variant("gate-per-head", "a gate per head [paper: per layer]", fixes=always(gate_per_head=True)),
    variant("keep-gates", "gates of the base stage kept, not from zero again [paper: open]", fresh_gates=False),
    variant("gate-on-the-step", "the gate on the low-rank part only, another one on theta0 [paper: open]",
            GateOnTheStep, learns=LEARNS | {"base": {"theta0": "prompt", "gate0": "prompt"},
                                            "multitask": LEARNS["multitask"] | {"gate0": "fast"}}),
    variant("frozen-theta0", "theta0 frozen after the base stage [paper: open]",
            learns=LEARNS | {"multitask": {"B": "slow", "u": "fast", "v": "fast", "gate": "fast"}}),
    variant("2-terms", "A_i a sum of 2 rank-1 terms [paper: one]", SumOfTerms, fixes=always(regulariser="cosine")),
    variant("4-terms", "A_i a sum of 4 rank-1 terms [paper: one]", FourTerms, fixes=always(regulariser="cosine")),
    variant("no-base", "without the base stage [paper: three stages]",
            learns={stage: LEARNS[stage] for stage in ("multitask", "target")}),
    *(variant(f"rank-{r}", f"B of rank {r} [paper: open]", fixes=always(rank=r)) for r in (1, 2, 4)),
    *(variant(f"length-{P}", f"prompt length {P} [paper: open]", fixes=always(prompt_length=P)) for P in (8, 32)),
)}
