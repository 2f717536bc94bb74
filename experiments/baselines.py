r"""The methods TA-LoRA is compared with. All of them adapt a backbone through one interface (model.AdaptedLM), so the
loop, the loss, the batches and the scoring are the same, and two results differ by the method alone.

    prompts at the input           prompt tuning (Lester et al. 2021), SPoT (Vu et al. 2022), ATTEMPT (Asai et al.
                                   2022), MPT (Wang et al. 2023; here without teachers to distil from)
    gated prompts in every layer   the same in TA-LoRA's place, Eq. (2), to tell the effect of the place from sharing
    changes inside the backbone    adapters (Houlsby et al. 2019), LoRA (Hu et al. 2022), BitFit (Ben Zaken et al.
                                   2022), all weights; trained on all source tasks and then on a target

compare.py says what is trained in which stage, at which learning rate.
B batch, T text tokens, P prompt length, d model width, L layers, m bottleneck, n distinct tasks of a batch, N tasks.
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from checkpoint import UserError
from gating import attend, attention_of_layer
from model import NO_TASK, AdaptedLM, GatedPrompts, TALoRAConfig, random_words


class PromptOfEachTask(AdaptedLM):
    """A prompt of its own for each task. Where it stands, another class says; it gives `new_prompt`, random words as
    they are read there, (P, d) or (L, P, d)."""

    def __init__(self, backbone: PreTrainedModel, tasks: list[str], config: TALoRAConfig):
        super().__init__(backbone, config)
        self.prompt = nn.ParameterList()
        for task in tasks:
            self.add_task(task)

    def add_task(self, name: str) -> int:
        """Add a task whose prompt starts as random words, and return its id. Raises UserError if the name is taken."""
        new_id = super().add_task(name)
        self.prompt.append(nn.Parameter(self.new_prompt(self.backbone, self.config.prompt_length)))
        return new_id

    def prompts(self, ids: list[int]) -> Tensor:
        """The prompts of these tasks, (n, P, d) or (L, n, P, d)."""
        refuse_no_task(ids)
        return torch.stack([self.prompt[i] for i in ids], -3)


class SharedPromptTimesFactors(AdaptedLM):
    """P* o (u_i (x) v_i): a prompt P* for all tasks, and factors u = v = 1 at the start. Where, as above."""

    def __init__(self, backbone: PreTrainedModel, tasks: list[str], config: TALoRAConfig):
        super().__init__(backbone, config)
        self.shared = nn.Parameter(self.new_prompt(backbone, config.prompt_length))  # P*, (P, d) or (L, P, d)
        self.u, self.v = nn.ParameterList(), nn.ParameterList()
        for task in tasks:
            self.add_task(task)

    def add_task(self, name: str) -> int:
        new_id = super().add_task(name)
        self.u.append(nn.Parameter(torch.ones_like(self.shared[..., 0])))  # (P,) or (L, P)
        self.v.append(nn.Parameter(torch.ones_like(self.shared[..., 0, :])))  # (d,) or (L, d)
        return new_id

    def prompts(self, ids: list[int]) -> Tensor:
        refuse_no_task(ids)
        u, v = (torch.stack([factor[i] for i in ids], -2) for factor in (self.u, self.v))  # (L, n, P), (L, n, d)
        return self.shared.unsqueeze(-3) * u.unsqueeze(-1) * v.unsqueeze(-2)  # P* o (u_i (x) v_i)


def refuse_no_task(ids: list[int]) -> None:
    """Raise ValueError if NO_TASK is among the ids: only TA-LoRA's theta0 belongs to no task."""
    if NO_TASK in ids:
        raise ValueError(f"a row has no task ({NO_TASK}), but every prompt of this method belongs to a task")


ONE_SOFTMAX = "one_softmax"  # the name under which transformers finds this attention


def one_softmax_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
                          scaling: float, prefix: list | None = None, **_) -> tuple[Tensor, None]:
    """softmax(q [K_theta; K_x]^T / sqrt(h)) [V_theta; V_x]; arguments as gating.attention_of_layer -> (B, T, H, h)."""
    if prefix is None:
        return attention_of_layer(module, query, key, value, attention_mask, scaling)
    K, V, *_ = prefix[module.layer_idx]
    T, S = query.shape[2], key.shape[2]
    if attention_mask is None:  # transformers' way to say causal
        attention_mask = torch.ones(T, S, dtype=torch.bool, device=key.device).tril(S - T)
    mask = F.pad(attention_mask, (K.shape[2], 0), value=True)  # (B, 1, T, P + S)
    out = attend(query, torch.cat([K, key], 2), torch.cat([V, value], 2), mask, False, scaling)
    return out.transpose(1, 2).contiguous(), None  # (B, T, H, h)


AttentionInterface.register(ONE_SOFTMAX, one_softmax_attention)
AttentionMaskInterface.register(ONE_SOFTMAX, sdpa_mask)


class PromptInFront(AdaptedLM):
    """The backbone reads [P; E(x)], P rows in front of the text. The prompt does not see the text behind it: it is read
    once for each task of a batch, and the task's rows attend to its keys and values."""

    reads, attention = ("prompt_length",), ONE_SOFTMAX

    @staticmethod
    def new_prompt(backbone: PreTrainedModel, P: int) -> Tensor:
        """The embeddings of P random words, (P, d): a far better start than noise (Lester et al., section 3.2)."""
        words = backbone.get_input_embeddings().weight  # (V, d)
        return words[torch.randint(len(words), (P,), device=words.device)].detach().float()

    def choose_prompts(self, ids: list[int], row: Tensor, input_ids: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """The prompts of a batch, (n, P, d), and which of them each row has, (B,). The distinct tasks of the batch are
        ids, row b has task ids[row[b]]; input_ids (B, T), text (B, <= T)."""
        return self.prompts(ids), row

    def inputs(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, task_ids: Tensor,
               text: Tensor) -> dict:
        """The text behind P positions and, as one more argument, the keys and values of its prompt in every layer;
        arguments of AdaptedLM.inputs. Raises ValueError for a row without a task, UserError as
        `check_window` does for prompt and text."""
        ids, row = self.check_tasks(task_ids, len(input_ids))
        prompts, row = self.choose_prompts(ids, row, input_ids, text)  # (n, P, d), (B,)
        n, P, _ = prompts.shape
        self.check_window(P + attention_mask.shape[-1])
        cache, training = DynamicCache(config=self.backbone.config), self.backbone.training
        self.backbone.eval()  # in training mode, checkpointing would refuse a cache
        self.read(dict(inputs_embeds=prompts.to(self.backbone.dtype), attention_mask=row.new_ones(n, P)),
                  past_key_values=cache, use_cache=True)
        self.backbone.train(training)
        given = super().inputs(input_ids, attention_mask, P + position_ids, task_ids, text)
        return given | {"prefix": [(layer.keys[row], layer.values[row]) for layer in cache.layers]}


class InputPrompts(PromptOfEachTask, PromptInFront):
    """One prompt for each task: prompt tuning and SPoT. P d parameters a task."""

    method = "input-prompt"


class MPT(SharedPromptTimesFactors, PromptInFront):
    """P_i = P* o (u_i (x) v_i), which starts at P* for every task: u = v = 1. P d + (P + d) parameters a task."""

    method = "mpt"


class Attempt(InputPrompts):
    """P_i + sum_j a_j P_j: the text decides how much of each frozen source prompt is added to the target's own.

        h = LayerNorm(W_up SiLU(W_down max_t E(x)_t)),   a = softmax_j(h . max_p P_j / tau),   tau = e d

    j runs over the S sources and the target itself. P d + 2 m d parameters a target (m is `rank`; 100 in the paper).
    Source tasks use their prompt as it is; a task that was added later is a target. x is the text, without its answer.
    """

    method, reads = "attempt", ("prompt_length", "rank")

    def __init__(self, backbone: PreTrainedModel, tasks: list[str], config: TALoRAConfig):
        super().__init__(backbone, tasks, config)
        m, d = config.rank, backbone.config.hidden_size
        self.down = nn.Parameter(torch.randn(m, d, device=self.device) * d**-0.5)
        self.up = nn.Parameter(torch.randn(d, m, device=self.device) * m**-0.5)
        self.register_buffer("sources", torch.tensor(len(tasks), device=self.device))  # saved with the adapter

    def choose_prompts(self, ids: list[int], row: Tensor, input_ids: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        prompts = self.prompts(ids)  # (n, P, d)
        target = torch.tensor(ids, device=row.device)[row] >= self.sources  # (B,)
        if not target.any():
            return prompts, row
        own, words = prompts[row], self.backbone.get_input_embeddings()(input_ids[:, : text.shape[1]])  # (B, .., d) x 2
        x = words.float().masked_fill(~text.unsqueeze(-1), -torch.inf).amax(1)  # (B, d)
        h = F.layer_norm(F.silu(x @ self.down.mT) @ self.up.mT, x.shape[-1:])  # (B, d)
        bank = torch.stack(list(self.prompt[: int(self.sources)])).expand(len(own), -1, -1, -1)  # (B, S, P, d)
        bank = torch.cat([bank, own.unsqueeze(1)], 1)  # (B, S + 1, P, d)
        a = ((bank.amax(2) @ h.unsqueeze(-1)).squeeze(-1) / (math.e * x.shape[-1])).softmax(-1)  # (B, S + 1)
        mixed = torch.where(target[:, None, None], own + torch.einsum("bs,bspd->bpd", a, bank), own)
        return mixed, torch.arange(len(own), device=row.device)  # one for each row


# ---------------------------------------------------------------------------- gated prompts in every layer, Eq. (2)

class WholePrompts(GatedPrompts):
    """A gated prompt in every layer for each task. What is logged is about the prompts as wholes."""

    reads, new_prompt = ("prompt_length", "gate_per_head"), staticmethod(random_words)

    def cosines(self) -> Tensor:
        flat = F.normalize(self.prompts(list(range(len(self.tasks)))).flatten(2), dim=-1)  # (L, N, P d)
        return flat @ flat.mT  # (L, N, N)

    def norms(self) -> dict[str, Tensor]:
        return {"prompt_norms": self.prompts(list(range(len(self.tasks)))).norm(dim=(-2, -1)).mean(1)}  # (L,)


class DeepPrompts(PromptOfEachTask, WholePrompts):
    """Only the gates are shared. L P d parameters a task."""

    method, in_layers = "deep-prompt", ("prompt",)


class DeepMPT(SharedPromptTimesFactors, WholePrompts):
    """MPT in every layer, theta_i = P* o (u_i (x) v_i). Only u and v are trained on a target: L (P + d) parameters."""

    method, in_layers = "deep-mpt", ("shared",)  # u and v are factors around 1


# ------------------------------------------------------------------------------------ changes inside the backbone

class ChangedBackbone(AdaptedLM):
    """A copy of the backbone that shares every tensor it does not change with the original."""

    trains: tuple[str, ...] = ()  # endings of the backbone's own parameters that are trained

    def __init__(self, backbone: PreTrainedModel, tasks: list[str], config: TALoRAConfig):
        super().__init__(backbone, config)
        shared = {id(p): p for name, p in backbone.named_parameters() if not name.endswith(self.trains)}
        self.backbone = copy.deepcopy(backbone, shared)  # deepcopy takes what it finds in `shared` instead of copying
        for name, p in self.backbone.named_parameters():
            p.requires_grad_(name.endswith(self.trains))
        self.insert_modules()
        self.trained = {name for name, p in self.named_parameters() if p.requires_grad}
        self.tasks += tasks

    def insert_modules(self) -> None:
        """Put trainable modules into `self.backbone`."""

    def adapter_state(self) -> dict[str, Tensor]:
        return {name: t for name, t in self.state_dict().items() if name in self.trained}


class FullFineTuning(ChangedBackbone):
    """Every weight is trained, and every weight is stored."""

    method, trains = "ft", ("",)


class BitFit(ChangedBackbone):
    """The biases the backbone has are trained: L (H h + 2 K h) parameters in a Qwen2, none in a Llama."""

    method, trains = "bitfit", (".bias",)

    def insert_modules(self) -> None:
        if not any(p.requires_grad for p in self.backbone.parameters()):
            family = type(self.backbone).__name__
            raise UserError(f"bitfit trains the biases of a backbone; {family} has none; take a Qwen2")


class LowRankLinear(nn.Module):
    """W x + s B A x; B starts at zero. r (in + out) parameters."""

    def __init__(self, linear: nn.Linear, r: int, s: float):
        super().__init__()
        self.linear, self.s, device = linear, s, linear.weight.device
        self.A = nn.Parameter(torch.randn(r, linear.in_features, device=device) * linear.in_features**-0.5)
        self.B = nn.Parameter(torch.zeros(linear.out_features, r, device=device))
        self.weight, self.bias = linear.weight, linear.bias  # transformers asks a projection for its weight's dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.s * F.linear(F.linear(x, self.A.to(x.dtype)), self.B.to(x.dtype))


class LoRA(ChangedBackbone):
    """(W + s B A) x in q_proj and v_proj of every layer; r is `rank`, and s = 1 is alpha = r elsewhere."""

    method, reads = "lora", ("rank", "scale")

    def insert_modules(self) -> None:
        for layer in self.backbone.model.layers:
            for name in ("q_proj", "v_proj"):
                linear = getattr(layer.self_attn, name)
                setattr(layer.self_attn, name, LowRankLinear(linear, self.config.rank, self.config.scale))


class Bottleneck(nn.Module):
    """y + W_up gelu(W_down y + b) + b' for the output y of a linear layer; W_up and b' start at zero. 2 m d + m + d."""

    def __init__(self, linear: nn.Linear, m: int):
        super().__init__()
        self.linear, d, device = linear, linear.out_features, linear.weight.device
        self.down, self.up = nn.Linear(d, m, device=device), nn.Linear(m, d, device=device)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        change = self.up(F.gelu(self.down(y.float()), approximate="tanh"))  # its weights are fp32
        return y + change.to(y.dtype)


class Adapter(ChangedBackbone):
    """A bottleneck of m = `rank` after attention and one after the MLP, each before it is added to the stream."""

    method, reads = "adapter", ("rank",)

    def insert_modules(self) -> None:
        for layer in self.backbone.model.layers:
            layer.self_attn.o_proj = Bottleneck(layer.self_attn.o_proj, self.config.rank)
            layer.mlp.down_proj = Bottleneck(layer.mlp.down_proj, self.config.rank)
