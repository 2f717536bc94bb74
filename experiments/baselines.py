r"""The methods TA-LoRA is compared with, and the ablations of TA-LoRA itself, behind one interface (frozen.py).

What the backbone is given differs, nothing else: the loop, the loss, the batches, the scores are the same.

    input prompts       the backbone reads [P; E(x)], P rows in front of the text's embeddings E(x)
      pt                P learned for each target from scratch                             (Lester et al. 2021)
      spot              P learned on all source tasks, then the start of every target's    (Vu et al. 2022)
      spot-nearest      a P for each source; a target starts from the nearest one's        (Vu et al. 2022, targeted)
      mpt               P_i = P* o (u_i (x) v_i), P* shared                                 (Wang et al. 2023)
      attempt           P_i + sum_j a_j(x) P_j, mixing frozen source prompts by the text    (Asai et al. 2022)
    gated prompts in every layer, at TA-LoRA's place, so that place and sharing are not confused
      deep-pt, deep-spot, deep-spot-nearest, deep-mpt
    changes inside the backbone, learned on all source tasks and then on a target
      adapter           x + W_up gelu(W_down x + b) + b' after attention and after the MLP  (Houlsby et al. 2019)
      lora              W + B A / on q_proj and v_proj                                       (Hu et al. 2022)
      bitfit            the biases that are there: q, k, v of a Qwen2                        (Ben Zaken et al. 2022)
      ft                every weight

A target of a method with weights of its own for each task starts from the source whose weights give the lowest loss on
the target's examples, as in TA-LoRA. MPT is the paper's without distillation from teachers: its loss is ours.

B batch, T text tokens, P prompt length, d model width, L layers, m bottleneck, n distinct tasks of a batch.
"""

import copy
import math
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from frozen import NO_TASK, FrozenLM, TALoRAConfig
from gating import attention, attention_of_layer, prefix_key_value
from model import TALoRA, random_words

# ------------------------------------------------------------------------------------------- prompts at the input


class InputPrompts(FrozenLM):
    """One prompt of P input embeddings for each task: PT and SPoT. Numbers of a task: P d."""

    method = "input-prompt"
    reads = ("prompt_length",)

    def __init__(self, backbone: PreTrainedModel, tasks: list[str], config: TALoRAConfig):
        super().__init__(backbone, config)
        self.in_front = config.prompt_length
        self.make()
        for task in tasks:
            self.add_task(task)

    def make(self) -> None:
        self.prompt = nn.ParameterList()

    def add_task(self, name: str) -> int:
        new_id = super().add_task(name)
        self.prompt.append(nn.Parameter(sampled_words(self.backbone, self.config.prompt_length)))
        return new_id

    def prompts(self, ids: list[int], row: Tensor, words: Tensor, text: Tensor) -> Tensor:
        """The prompt of every row, (B, P, d): row b has task ids[row[b]]; words (B, T, d), text (B, <= T)."""
        return torch.stack([self.prompt[i] for i in ids])[row]

    def inputs(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, task_ids: Tensor,
               text: Tensor) -> dict:
        """[P; E(x)]: the prompt comes first, even before left padding, and the text's positions follow the prompt's."""
        ids, row = self.check_tasks(task_ids, len(input_ids))
        if ids[0] == NO_TASK:
            raise ValueError(f"a row has no task ({NO_TASK}), but every prompt of this method is some task's")
        words = self.backbone.get_input_embeddings()(input_ids)  # (B, T, d)
        prompt = self.prompts(ids, row, words, text).to(words.dtype)  # (B, P, d)
        P, window = prompt.shape[1], getattr(self.backbone.config, "sliding_window", None)
        if window and P + words.shape[1] > window:  # it counts columns: padding between prompt and text would matter
            raise ValueError(f"prompt and text take {P + words.shape[1]} tokens, but the backbone's sliding window is "
                             f"{window}; shorten one of them")
        own = torch.arange(P, device=words.device).expand(len(words), P)  # (B, P)
        if attention_mask.dim() == 2:  # real tokens: the prompt's are
            mask = F.pad(attention_mask, (P, 0), value=1)  # (B, P + T)
        else:  # who sees whom: the text sees all of the prompt, the prompt its own past
            mask = F.pad(attention_mask, (P, 0), value=True)  # (B, 1, T, P + T)
            past = own.new_ones(P, P, dtype=torch.bool).tril().expand(len(words), 1, P, P)
            mask = torch.cat([F.pad(past, (0, words.shape[1])), mask], 2)  # (B, 1, P + T, P + T)
        return dict(inputs_embeds=torch.cat([prompt, words], 1), attention_mask=mask,
                    position_ids=torch.cat([own, P + position_ids], 1))


def sampled_words(backbone: PreTrainedModel, P: int) -> Tensor:
    """The embeddings of P random words in fp32, (P, d): a far better start than noise (Lester et al., section 3.2)."""
    words = backbone.get_input_embeddings().weight  # (V, d)
    return words[torch.randint(len(words), (P,), device=words.device)].detach().float()


class MPT(InputPrompts):
    """P_i = P* o (u_i (x) v_i): one prompt for all and a rank-1 factor for each task, P d + (P + d) a task.

    u and v start at one, so that every task starts at P*.
    """

    method = "mpt"

    def make(self) -> None:
        self.shared = nn.Parameter(sampled_words(self.backbone, self.config.prompt_length))  # P*, (P, d)
        self.u, self.v = nn.ParameterList(), nn.ParameterList()

    def add_task(self, name: str) -> int:
        new_id = FrozenLM.add_task(self, name)
        P, d = self.shared.shape
        self.u.append(nn.Parameter(torch.ones(P, device=self.device)))
        self.v.append(nn.Parameter(torch.ones(d, device=self.device)))
        return new_id

    def prompts(self, ids: list[int], row: Tensor, words: Tensor, text: Tensor) -> Tensor:
        u, v = (torch.stack([factor[i] for i in ids]) for factor in (self.u, self.v))  # (n, P), (n, d)
        return (self.shared * u.unsqueeze(-1) * v.unsqueeze(-2))[row]  # P* o (u_i (x) v_i)


class Attempt(InputPrompts):
    """P_i + sum_j a_j P_j: the text decides how much of each frozen source prompt joins the target's own.

        h = LayerNorm(W_up SiLU(W_down max_t E(x)_t)),   a = softmax_j(h . max_p P_j / tau),   tau = e d

    over the sources and the target itself. Numbers of a target: P d + 2 m d (m = ``rank``; 100 in the paper). Source
    tasks use their prompt as it is; a target is a task that was added later. The maximum is over the text, never over
    padding or an answer.
    """

    method = "attempt"
    reads = ("prompt_length", "rank")

    def __init__(self, backbone: PreTrainedModel, tasks: list[str], config: TALoRAConfig):
        super().__init__(backbone, tasks, config)
        self.register_buffer("sources", torch.tensor(len(tasks), device=self.device))  # loading restores it

    def make(self) -> None:
        super().make()
        m, d = self.config.rank, self.backbone.config.hidden_size
        self.down = nn.Parameter(torch.randn(m, d, device=self.device) * d**-0.5)
        self.up = nn.Parameter(torch.randn(d, m, device=self.device) * m**-0.5)

    def prompts(self, ids: list[int], row: Tensor, words: Tensor, text: Tensor) -> Tensor:
        own = super().prompts(ids, row, words, text)  # (B, P, d)
        sources = int(self.sources)
        target = torch.tensor(ids, device=row.device)[row] >= sources  # (B,)
        if not target.any():
            return own
        x = words[:, : text.shape[1]].float().masked_fill(~text.unsqueeze(-1), -torch.inf).amax(1)  # (B, d)
        h = F.layer_norm(F.silu(x @ self.down.mT) @ self.up.mT, x.shape[-1:])  # (B, d)
        bank = torch.stack(list(self.prompt[:sources])).expand(len(own), -1, -1, -1)  # (B, S, P, d)
        bank = torch.cat([bank, own.unsqueeze(1)], 1)  # (B, S + 1, P, d)
        a = ((bank.amax(2) @ h.unsqueeze(-1)).squeeze(-1) / (math.e * x.shape[-1])).softmax(-1)  # (B, S + 1)
        mixed = own + torch.einsum("bs,bspd->bpd", a, bank)
        return torch.where(target[:, None, None], mixed, own)


# ---------------------------------------------------------------------------- gated prompts in every layer, Eq. (2)


class DeepPrompts(TALoRA):
    """A gated prompt in every layer for each task, nothing shared but the gates: deep PT and SPoT. L P d a task."""

    method = "deep-prompt"
    reads = ("prompt_length", "gate_per_head")

    def __init__(self, backbone: PreTrainedModel, tasks: list[str], config: TALoRAConfig):
        FrozenLM.__init__(self, backbone, config)
        heads = (backbone.config.num_attention_heads,) * config.gate_per_head
        self.gate = nn.Parameter(torch.zeros(backbone.config.num_hidden_layers, *heads, device=self.device))
        self.make()
        for task in tasks:
            self.add_task(task)

    def make(self) -> None:
        self.prompt = nn.ParameterList()

    def add_task(self, name: str) -> int:
        new_id = FrozenLM.add_task(self, name)
        self.prompt.append(nn.Parameter(random_words(self.backbone, self.config.prompt_length)))
        return new_id

    def prompts(self, ids: list[int]) -> Tensor:
        if NO_TASK in ids:
            raise ValueError(f"a row has no task ({NO_TASK}), but every prompt of this method is some task's")
        return torch.stack([self.prompt[i] for i in ids], 1)  # (L, n, P, d)

    def cosines(self) -> Tensor:
        """Cosines of the tasks' whole prompts, (L, N, N)."""
        flat = F.normalize(self.prompts(list(range(len(self.tasks)))).flatten(2), dim=-1)  # (L, N, P d)
        return flat @ flat.mT

    def norms(self) -> dict[str, Tensor]:
        return {"prompt_norms": self.prompts(list(range(len(self.tasks)))).norm(dim=(-2, -1)).mean(1)}  # (L,)


class DeepMPT(DeepPrompts):
    """MPT in every layer: theta_i = P* o (u_i (x) v_i). Only u and v learn on a target: L (P + d)."""

    method = "deep-mpt"

    def make(self) -> None:
        self.shared = nn.Parameter(random_words(self.backbone, self.config.prompt_length))  # P*, (L, P, d)
        self.u, self.v = nn.ParameterList(), nn.ParameterList()

    def add_task(self, name: str) -> int:
        new_id = FrozenLM.add_task(self, name)
        L, P, d = self.shared.shape
        self.u.append(nn.Parameter(torch.ones(L, P, device=self.device)))
        self.v.append(nn.Parameter(torch.ones(L, d, device=self.device)))
        return new_id

    def prompts(self, ids: list[int]) -> Tensor:
        if NO_TASK in ids:
            raise ValueError(f"a row has no task ({NO_TASK}), but every prompt of this method is some task's")
        u, v = (torch.stack([factor[i] for i in ids], 1) for factor in (self.u, self.v))  # (L, n, P), (L, n, d)
        return self.shared[:, None] * u.unsqueeze(-1) * v.unsqueeze(-2)  # (L, n, P, d)


# ------------------------------------------------------------------------------------ changes inside the backbone


class ChangedBackbone(FrozenLM):
    """A backbone of our own that shares every tensor it does not change with the frozen one."""

    def __init__(self, backbone: PreTrainedModel, tasks: list[str], config: TALoRAConfig):
        super().__init__(backbone, config)
        kept = {id(p): p for name, p in backbone.named_parameters() if not self.learns(name)}
        self.backbone = copy.deepcopy(backbone, kept)  # deepcopy takes what it finds in `kept` instead of copying it
        for name, p in self.backbone.named_parameters():
            p.requires_grad_(self.learns(name))
        self.change()
        self.learned = {name for name, p in self.named_parameters() if p.requires_grad}
        for task in tasks:
            self.add_task(task)

    def learns(self, name: str) -> bool:
        """Whether this parameter of the backbone learns itself."""
        return False

    def change(self) -> None:
        """Put modules of our own into ``self.backbone``."""

    def owns(self, name: str) -> bool:
        return name in self.learned


class FullFineTuning(ChangedBackbone):
    """Every weight learns, and every weight is stored."""

    method = "ft"

    def learns(self, name: str) -> bool:
        return True


class BitFit(ChangedBackbone):
    """The biases learn that the backbone has: L (H h + 2 K h) numbers in a Qwen2, none in a Llama."""

    method = "bitfit"

    @classmethod
    def check(cls, backbone: PreTrainedModel) -> None:
        super().check(backbone)
        if not any(name.endswith(".bias") for name, _ in backbone.named_parameters()):
            raise ValueError(f"nothing in a {type(backbone).__name__} can learn by bitfit: it has no biases")

    def learns(self, name: str) -> bool:
        return name.endswith(".bias")


class LowRankLinear(nn.Module):
    """W x + B A x; B starts at zero. r (in + out) numbers."""

    def __init__(self, linear: nn.Linear, r: int, s: float):
        super().__init__()
        new = dict(dtype=torch.float32, device=linear.weight.device)
        self.linear, self.s = linear, s
        self.A = nn.Parameter(torch.randn(r, linear.in_features, **new) * linear.in_features**-0.5)
        self.B = nn.Parameter(torch.zeros(linear.out_features, r, **new))
        self.weight, self.bias = linear.weight, linear.bias  # transformers asks a projection for its weight's dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.s * F.linear(F.linear(x, self.A.to(x.dtype)), self.B.to(x.dtype))


class LoRA(ChangedBackbone):
    """W + s B A on q_proj and v_proj of every layer (alpha / r = s = 1), r = ``rank``."""

    method = "lora"
    reads = ("rank", "scale")

    def change(self) -> None:
        for layer in self.backbone.model.layers:
            for name in ("q_proj", "v_proj"):
                linear = getattr(layer.self_attn, name)
                setattr(layer.self_attn, name, LowRankLinear(linear, self.config.rank, self.config.scale))


class Bottleneck(nn.Module):
    """y + W_up gelu(W_down y + b) + b' behind a linear layer's output y; W_up and b' start at zero. 2 m d + m + d."""

    def __init__(self, linear: nn.Linear, m: int):
        super().__init__()
        new = dict(dtype=torch.float32, device=linear.weight.device)
        self.linear = linear
        self.down, self.up = nn.Linear(linear.out_features, m, **new), nn.Linear(m, linear.out_features, **new)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        inner = F.linear(y, self.down.weight.to(y.dtype), self.down.bias.to(y.dtype))
        return y + F.linear(F.gelu(inner, approximate="tanh"), self.up.weight.to(y.dtype), self.up.bias.to(y.dtype))


class Adapter(ChangedBackbone):
    """A bottleneck of m = ``rank`` after the attention's output and one after the MLP's, before they are added."""

    method = "adapter"
    reads = ("rank",)

    def change(self) -> None:
        for layer in self.backbone.model.layers:
            layer.self_attn.o_proj = Bottleneck(layer.self_attn.o_proj, self.config.rank)
            layer.mlp.down_proj = Bottleneck(layer.mlp.down_proj, self.config.rank)


# ------------------------------------------------------------------------------------------- ablations of TA-LoRA


class OpenGate(TALoRA):
    """Without zero-init attention: the gate is fixed open, tanh(g) = 1 from the first step."""

    method = "talora-open-gate"

    def __init__(self, backbone: PreTrainedModel, tasks: list[str], config: TALoRAConfig):
        super().__init__(backbone, tasks, config)
        nn.init.constant_(self.gate, 10.0)  # tanh(10) is 1 in fp32


class OneSoftmax(TALoRA):
    """Without zero-init attention: softmax over text and prompt together, as in prefix tuning; the gate is unused."""

    method, attention = "talora-one-softmax", "one_softmax"

    def diagnose(self) -> dict:
        return {name: value for name, value in super().diagnose().items() if name != "gates"}


def one_softmax_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
                          scaling: float | None = None, prefix: list | None = None, **_) -> tuple[Tensor, None]:
    """softmax(q [K_theta; K_x]^T / sqrt(h)) [V_theta; V_x]."""
    if prefix is None:
        return attention_of_layer(module, query, key, value, attention_mask, scaling)
    prefix_k, prefix_v, _ = prefix[module.layer_idx]
    T, S = query.shape[2], key.shape[2]
    if attention_mask is None:
        attention_mask = torch.ones(T, S, dtype=torch.bool, device=key.device).tril(S - T)
    mask = F.pad(attention_mask, (prefix_k.shape[2], 0), value=True)  # (B, 1, T, P + S)
    out = attention(query, torch.cat([prefix_k, key], 2), torch.cat([prefix_v, value], 2), mask, False, scaling)
    return out.transpose(1, 2).contiguous(), None  # (B, T, H, h)


class GateOnTheStep(TALoRA):
    """The gate read as one for the low-rank part only, beside a gate g0 for the shared prompt.

        O = text + tanh(g0) P(theta0) + tanh(g) [P(theta_i) - P(theta0)],    P(theta) = softmax(q K^T / sqrt(h)) V
    """

    method, attention = "talora-gate-on-the-step", "gate_on_the_step"

    def __init__(self, backbone: PreTrainedModel, tasks: list[str], config: TALoRAConfig):
        super().__init__(backbone, tasks, config)
        self.gate0 = nn.Parameter(torch.zeros_like(self.gate))

    def prefix(self, task_ids: Tensor, rows: int) -> list[tuple]:
        shared = super().prefix(torch.full_like(task_ids, NO_TASK), rows)
        return [(*own, K0, V0, g0) for own, (K0, V0, _), g0 in zip(super().prefix(task_ids, rows), shared, self.gate0)]


def gate_on_the_step_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor,
                               attention_mask: Tensor | None, scaling: float | None = None,
                               prefix: list | None = None, **_) -> tuple[Tensor, None]:
    out, _ = attention_of_layer(module, query, key, value, attention_mask, scaling)  # (B, T, H, h)
    if prefix is None:
        return out, None
    K, V, gate, K0, V0, gate0 = prefix[module.layer_idx]
    own, shared = (attention(query, k, v, None, False, scaling).transpose(1, 2) for k, v in ((K, V), (K0, V0)))
    open_, open0 = (torch.tanh(g.expand(query.shape[1])).unsqueeze(-1) for g in (gate, gate0))  # (H, 1)
    return out + (open0 * shared + open_ * (own - shared)).to(out.dtype), None


for name, function in (("one_softmax", one_softmax_attention), ("gate_on_the_step", gate_on_the_step_attention)):
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, sdpa_mask)


class OwnB(TALoRA):
    """A B of its own for each task (Eq. (1) is printed with B_i)."""

    method = "talora-own-b"

    def __init__(self, backbone: PreTrainedModel, tasks: list[str], config: TALoRAConfig):
        super().__init__(backbone, [], config)
        del self.B
        self.B = nn.ParameterList()
        for task in tasks:
            self.add_task(task)

    def add_task(self, name: str) -> int:
        L, P, r = len(self.theta0), self.config.prompt_length, self.config.rank
        new_id = super().add_task(name)
        self.B.append(nn.Parameter(torch.randn(L, P, r, device=self.device) * r**-0.5))
        return new_id

    def prompts(self, ids: list[int]) -> Tensor:
        u, v = self.factors(ids)
        B = torch.stack([torch.zeros_like(self.B[0]) if i == NO_TASK else self.B[i] for i in ids], 1)  # (L, n, P, r)
        return self.theta0[:, None] + self.config.scale * (B @ u.unsqueeze(-1)) * v.unsqueeze(-2)


class SumOfTerms(TALoRA):
    """A_i a sum of several rank-1 terms: theta_i = theta0 + s B sum_t u_it (x) v_it, a step of that rank."""

    terms = 1

    def add_task(self, name: str) -> int:
        new_id = FrozenLM.add_task(self, name)
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


class TwoTerms(SumOfTerms):
    method, terms = "talora-2-terms", 2


class FourTerms(SumOfTerms):
    method, terms = "talora-4-terms", 4


class SideBySide(TALoRA):
    """The (+) of Eq. (1) read as concatenation: the prompts of all tasks side by side, N P rows, for every row alike.

    No task id is needed: attention chooses. A batch without tasks (the base stage) sees theta0 alone.
    """

    method = "talora-side-by-side"

    def prefix(self, task_ids: Tensor, rows: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        ids, _ = self.check_tasks(task_ids, rows)
        if NO_TASK in ids and len(ids) > 1:
            raise ValueError(f"a batch has rows with and without a task ({NO_TASK}), but all its rows share one prompt")
        all_tasks = [NO_TASK] if ids == [NO_TASK] else list(range(len(self.tasks)))
        theta = self.prompts(all_tasks).flatten(1, 2).unsqueeze(1)  # (L, 1, N P, d)
        layers = zip(self.backbone.model.layers, theta.unbind(), self.gate.unbind())
        key_values = [(*prefix_key_value(layer.self_attn, theta), g) for layer, theta, g in layers]
        return [(K.expand(rows, -1, -1, -1), V.expand(rows, -1, -1, -1), g) for K, V, g in key_values]


# ------------------------------------------------------------------------------------------------- what learns, when


@dataclass(frozen=True)
class Method:
    """A method: its class, what learns in which stage at which rate (Eq. (5)), and how its stages begin.

    learns[stage]: tensor (or list of tensors, one a task) -> the name of its rate: "slow" is --slow-rate and so on.
    A stage that is not in it does not exist for this method.
    """

    says: str
    model: type[FrozenLM]
    learns: dict[str, dict[str, str]]
    per_task: bool = False  # has weights of its own for each source task; a target starts from the nearest source's
    regularised: bool = False  # Eq. (4) in the multitask stage
    fresh_gates: bool = False  # gates start the multitask stage from zero again
    options: dict[str, object] = field(default_factory=dict)  # values of options; a string may name another, or "it/8"

    @property
    def stages(self) -> tuple[str, ...]:
        return tuple(self.learns)


def both(**source: str) -> dict[str, dict[str, str]]:
    """Learns in the multitask stage and again, at the target's rate, in the target stage."""
    return {"multitask": source, "target": dict.fromkeys(source, "target")}


METHODS = {
    "talora": Method("the method of the paper", TALoRA, {
        "base": {"theta0": "prompt", "gate": "prompt"},
        "multitask": {"theta0": "slow", "B": "slow", "u": "fast", "v": "fast", "gate": "fast"},
        "target": {"u": "target", "v": "target"},
    }, per_task=True, regularised=True, fresh_gates=True),
    "pt": Method("an input prompt for each target, from scratch", InputPrompts, {"target": {"prompt": "target"}}),
    "spot": Method("one input prompt for all sources, the start of every target's", InputPrompts,
                   both(prompt="prompt")),
    "spot-nearest": Method("an input prompt for each source; a target starts from the nearest", InputPrompts,
                           both(prompt="prompt"), per_task=True),
    "attempt": Method("an input prompt for each source; a target mixes them, by the text, into its own", Attempt,
                      {"multitask": {"prompt": "prompt"},
                       "target": {"prompt": "target", "down": "target", "up": "target"}}, per_task=True),
    "mpt": Method("a shared input prompt times a rank-1 factor of the task; without distillation", MPT,
                  both(shared="prompt", u="prompt", v="prompt"), per_task=True),
    "deep-pt": Method("a gated prompt in every layer for each target, from scratch", DeepPrompts,
                      {"target": {"prompt": "target", "gate": "target"}}),
    "deep-spot": Method("one gated prompt in every layer for all sources, the start of every target's", DeepPrompts,
                        both(prompt="prompt", gate="prompt")),
    "deep-spot-nearest": Method("gated prompts in every layer for each source; a target starts from the nearest",
                                DeepPrompts, both(prompt="prompt", gate="prompt"), per_task=True),
    "deep-mpt": Method("a shared gated prompt in every layer times a rank-1 factor of the task", DeepMPT,
                       {"multitask": {"shared": "prompt", "u": "prompt", "v": "prompt", "gate": "prompt"},
                        "target": {"u": "target", "v": "target"}}, per_task=True),
    "adapter": Method("a bottleneck after attention and MLP of every layer", Adapter, both(backbone="prompt")),
    "lora": Method("low-rank changes of q_proj and v_proj", LoRA, both(backbone="prompt")),
    "bitfit": Method("the backbone's biases", BitFit, both(backbone="prompt")),
    "ft": Method("all weights of the backbone", FullFineTuning, both(backbone="prompt")),
}


def variant(says: str, model: type[TALoRA] = TALoRA, without: dict[str, tuple[str, ...]] | None = None,
            also: dict[str, dict[str, str]] | None = None, fresh_gates: bool = True,
            options: dict | None = None) -> Method:
    """TA-LoRA but for one thing. without: stage -> tensors that do not learn there (all of them: no such stage);
    also: stage -> tensors that do, with their rates."""
    learns = {}
    for stage, rates in METHODS["talora"].learns.items():
        left = {t: rate for t, rate in rates.items() if t not in (without or {}).get(stage, ())}
        left |= (also or {}).get(stage, {})
        if left:
            learns[stage] = left
    return replace(METHODS["talora"], says=says, model=model, learns=learns, fresh_gates=fresh_gates,
                   options=options or {})


NO_GATE = {"base": ("gate",), "multitask": ("gate",)}
VARIANTS = {
    "equal-rates": variant("without fast-slow: B and theta0 learn as fast as u and v [paper's ablation]",
                           options={"slow_rate": "fast_rate"}),
    "slow-eighth": variant("the shared weights at an eighth of the fast rate [paper: slower, ratio open]",
                           options={"slow_rate": "fast_rate/8"}),
    "rates-swapped": variant("the shared weights fast, the task's slow [paper: the other way]",
                             options={"slow_rate": "fast_rate", "fast_rate": "slow_rate"}),
    "open-gate": variant("without zero-init attention: tanh(g) = 1 throughout [paper's ablation]", OpenGate, NO_GATE,
                         fresh_gates=False),
    "one-softmax": variant("without zero-init attention: text and prompt in one softmax [paper's ablation]", OneSoftmax,
                           NO_GATE, fresh_gates=False),
    "reg-frobenius": variant("regulariser ||A_i^T A_j||^2 [paper: printed with - I]",
                             options={"regulariser": "frobenius"}),
    "reg-printed": variant("regulariser ||A_i^T A_j - I||^2, as printed [paper]",
                           options={"regulariser": "printed"}),
    "reg-off": variant("no regulariser [paper: has one; no such ablation is known]", options={"regulariser": "off"}),
    "own-b": variant("a B for each task, learnt on a target too [printed as B_i]", OwnB,
                     also={"target": {"B": "target"}}),
    "side-by-side": variant("the (+) of Eq. (1) as concatenation: all tasks' prompts, no task id; a target starts from "
                            "new weights, as no source is nearest [paper: open]",
                            SideBySide),
    "gate-per-head": variant("a gate per head [paper: per layer]", options={"gate_per_head": True}),
    "keep-gates": variant("gates of the base stage kept, not from zero again [paper: open]", fresh_gates=False),
    "gate-on-the-step": variant("the gate on the low-rank part only, beside one for theta0 [paper: open]",
                                GateOnTheStep, without={"base": ("gate",)},  # without a task there is no step
                                also={"base": {"gate0": "prompt"}, "multitask": {"gate0": "fast"}}),
    "frozen-theta0": variant("theta0 frozen after the base stage [paper: open]", without={"multitask": ("theta0",)}),
    "2-terms": variant("A_i a sum of 2 rank-1 terms [paper: one]", TwoTerms, options={"regulariser": "cosine"}),
    "4-terms": variant("A_i a sum of 4 rank-1 terms [paper: one]", FourTerms, options={"regulariser": "cosine"}),
    "no-base": variant("without the base stage [paper: three stages]", without={"base": ("theta0", "gate")}),
    **{f"rank-{r}": variant(f"B of rank {r} [paper: open]", options={"rank": r}) for r in (1, 2, 4)},
    **{f"length-{P}": variant(f"prompt length {P} [paper: open]", options={"prompt_length": P}) for P in (8, 32)},
}
