r"""TA-LoRA: a frozen language model, one small prompt per layer, and the prompt's step for every task.

Everything that learns is in five tensors, stacked over the L layers of the backbone:

    theta0 (L, P, d)    the prompt shared by all tasks          base stage, then slow
    B      (L, P, r)    slow weight, shared by all tasks        multitask stage, slow
    u.i    (L, r)       fast weights of task i,                 multitask stage and target stage, fast
    v.i    (L, d)         one pair of tensors for each task
    gate   (L,)         one per layer, or (L, H): per head      base and multitask stage

One forward pass is:  task ids -> theta_i of every layer, Eq. (1) -> its keys and values through the layer's own frozen
projections -> handed to the backbone as an argument -> every layer adds gated attention to them, Eq. (2).
The same path serves training, scoring, generation and the notebooks (frozen.py).

The factors of a task are parameters of their own, not rows of one big tensor: an optimizer with momentum moves every
row of a tensor that has a gradient, so a task that is absent from a batch would drift.

B batch (as a shape; the weight B is always (L, P, r)), T text tokens, P prompt length, d model width, H query heads,
K key/value heads, h head size, L layers, N tasks, r rank, V vocabulary.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from frozen import FAMILIES, NO_TASK, FrozenLM, Output, TALoRAConfig, describe, evaluating, positions
from gating import prefix_key_value
from lowrank import orthogonality, task_cosines, task_prompt

__all__ = ["FAMILIES", "NO_TASK", "Output", "TALoRA", "TALoRAConfig", "describe", "evaluating", "positions"]


class TALoRA(FrozenLM):
    """A frozen causal language model with a gated, task-adaptive low-rank prompt in every layer."""

    reads = ("prompt_length", "rank", "scale", "gate_per_head")

    def __init__(self, backbone: PreTrainedModel, tasks: list[str], config: TALoRAConfig = TALoRAConfig()):  # noqa: B008
        """Wrap ``backbone``, which is frozen, for the tasks of these names.

        Raises ValueError for a backbone of a family that is not supported and for a task named twice.
        """
        super().__init__(backbone, config)
        shape, P, r = backbone.config, config.prompt_length, config.rank
        L = shape.num_hidden_layers

        heads = (L, shape.num_attention_heads) if config.gate_per_head else (L,)
        new = dict(dtype=torch.float32, device=self.device)
        self.theta0 = nn.Parameter(random_words(backbone, P))  # (L, P, d)
        self.B = nn.Parameter(torch.randn(L, P, r, **new) * r**-0.5)
        self.gate = nn.Parameter(torch.zeros(heads, **new))  # the one zero of every path: see gating.py
        self.u = nn.ParameterList()
        self.v = nn.ParameterList()
        for task in tasks:
            self.add_task(task)

    def add_task(self, name: str) -> int:
        """Add a task with new random factors and return its id; nothing else changes, earlier ids stay valid.

        u has variance 1/r, so that (B u)[p] has variance 1/r as well; v is small but not zero. Raises ValueError if
        the name is taken.
        """
        new_id = super().add_task(name)
        L, d, r = len(self.theta0), self.theta0.shape[-1], self.config.rank
        new = dict(dtype=torch.float32, device=self.theta0.device)
        self.u.append(nn.Parameter(torch.randn(L, r, **new) * r**-0.5))
        self.v.append(nn.Parameter(torch.randn(L, d, **new) * 0.02))
        return new_id

    def factors(self, task_ids: list[int] | None = None) -> tuple[Tensor, Tensor]:
        """The fast weights of these tasks (all, if None) side by side: u (L, N, r) and v (L, N, d).

        A row for the id NO_TASK is zero: theta0 + s * B 0 = theta0.
        """
        task_ids = range(len(self.tasks)) if task_ids is None else task_ids
        zero_v = torch.zeros_like(self.theta0[:, 0])  # (L, d)
        zero_u = zero_v[:, :1].expand(-1, self.config.rank)  # (L, r)
        u = [zero_u if i == NO_TASK else self.u[i] for i in task_ids]
        v = [zero_v if i == NO_TASK else self.v[i] for i in task_ids]
        return torch.stack(u, 1), torch.stack(v, 1)

    def prompts(self, ids: list[int]) -> Tensor:
        """The prompts of these tasks in every layer, (L, n, P, d); theta0 itself for NO_TASK."""
        u, v = self.factors(ids)  # (L, n, r), (L, n, d)
        return task_prompt(self.theta0[:, None], self.B[:, None], u, v, self.config.scale)  # Eq. (1)

    def prefix(self, task_ids: Tensor, rows: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Keys, values and gate of every layer's prompt for ``rows`` rows; task_ids (B,) -> L x ((B,K,P,h) x 2, gate).

        Computed anew in every call, once for each *distinct* task. Raises ValueError for an id that is no task's and
        unless there is one id for each row.
        """
        ids, row = self.check_tasks(task_ids, rows)
        layers = zip(self.backbone.model.layers, self.prompts(ids).unbind(), self.gate.unbind())
        key_values = [(*prefix_key_value(layer.self_attn, theta), g) for layer, theta, g in layers]
        return [(K[row], V[row], g) for K, V, g in key_values]

    def inputs(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, task_ids: Tensor,
               text: Tensor) -> dict:
        """The text as it is, and the prompts beside it: every layer finds its own under its number, Eq. (2)."""
        return dict(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
                    prefix=self.prefix(task_ids, len(input_ids)))

    def orthogonality(self, form: str) -> Tensor:
        """The regulariser R over all tasks, a scalar, Eq. (4)."""
        return orthogonality(*self.factors(), form)

    def cosines(self) -> Tensor:
        """cos(A_i, A_j) of every two tasks in every layer, (L, N, N)."""
        return task_cosines(*self.factors())

    @torch.no_grad()
    def diagnose(self) -> dict:
        """What training logs of the adapter: by layer |tanh g| and `norms`, and |cos(A_i, A_j)| of the tasks, mean over
        layers."""
        state = {"gates": torch.tanh(self.gate).abs().reshape(len(self.gate), -1).mean(1)}  # (L,)
        if self.tasks:
            state |= self.norms()
        if len(self.tasks) > 1:
            state["cosines"] = self.cosines().abs().mean(0)  # (N, N)
        return {"tasks": self.tasks} | {name: t.double().round(decimals=5).tolist() for name, t in state.items()}

    def norms(self) -> dict[str, Tensor]:
        """By layer, (L,): the Frobenius norm of theta0, and the mean one of the tasks' steps s B A_i."""
        steps = self.prompts(list(range(len(self.tasks)))) - self.theta0[:, None]  # (L, N, P, d)
        return {"theta0_norms": self.theta0.norm(dim=(-2, -1)), "step_norms": steps.norm(dim=(-2, -1)).mean(1)}


def random_words(backbone: PreTrainedModel, P: int) -> Tensor:
    """A new prompt for every layer that reads like random words, (L, P, d) in fp32.

    A layer's projections expect normed inputs, so the words pass the layer's own norm; raw embeddings are far smaller
    (paper: open).
    """
    layers, words = backbone.model.layers, backbone.get_input_embeddings().weight  # (V, d)
    chosen = torch.randint(len(words), (len(layers), P), device=words.device)  # (L, P)
    with torch.no_grad():
        return torch.stack([layer.input_layernorm(words[row]) for row, layer in zip(chosen, layers)]).float()
