r"""TA-LoRA: a frozen language model, one small prompt per layer, and the step of each task away from it.

Everything that learns is in five kinds of tensors, stacked over the L layers of the backbone:

    theta0 (L, P, d)    the prompt shared by all tasks          base stage, then slow
    B      (L, P, r)    slow weight, shared by all tasks        multitask stage, slow
    u.i    (L, r)       fast weights of task i,                 multitask stage and target stage, fast
    v.i    (L, d)         one pair of tensors for each task
    gate   (L,)         one per layer, or (L, H): per head      base and multitask stage

One forward pass is:  task ids -> theta_i of every layer, Eq. (1) -> its keys and values through the layer's own frozen
projections -> handed to the backbone as an argument -> every layer adds gated attention to them, Eq. (2).
Training, scoring and generation all take this path. Each of three classes adds one thing:

    AdaptedLM       a frozen backbone: loss, greedy generation, scores of given answers, saving and loading
    GatedPrompts    a prompt in every layer, behind a gate
    TALoRA          the low-rank form of the prompts

B batch (as a shape; the weight B is always (L, P, r)), T text tokens, P prompt length, d model width, H query heads,
K key/value heads, h head size, L layers, N tasks, n distinct tasks of a batch, r rank, C choices, V vocabulary.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from checkpoint import UserError, check_backbone, describe, read_adapter, write_adapter
from checkpoint import load_backbone as load_backbone  # its public place is here
from gating import GATED_PREFIX, prefix_key_value
from lowrank import orthogonality, task_cosines, task_prompt

NO_TASK = -1  # the task id of a row that uses theta0 alone


@dataclass(frozen=True)
class TALoRAConfig:
    """Sizes of an adapter. The baselines of experiments/ read the same fields."""

    prompt_length: int = 12  # P; with r = 8 and one gate per layer 1.3 M parameters for one task at 7B, as in the paper
    rank: int = 8  # r
    scale: float = 1.0  # s
    gate_per_head: bool = False  # the paper's g^l has one gate per layer


@dataclass
class Output:
    logits: Tensor | None = None  # (B, T, V), when no labels are given
    loss: Tensor | None = None  # mean of losses
    losses: Tensor | None = None  # (B,) mean cross-entropy of each row's answer tokens
    correct: Tensor | None = None  # (B,) bool: greedy decoding would give exactly the answer


class AdaptedLM(nn.Module):
    """A frozen causal language model. Subclasses add tensors that learn and say what the backbone is given (`inputs`).

    Nothing of a call is kept on a module: with checkpointing a layer runs again in backward and would find another's.
    `score` and `generate` leave the backbone in eval mode (in training mode, checkpointing would refuse a cache).
    """

    method = "frozen"  # the name in adapter.json
    reads: tuple[str, ...] = ()  # the fields of TALoRAConfig that it uses
    in_layers: tuple[str, ...] = ()  # tensors (L, .., d) on the scale of a layer's normed text
    attention = GATED_PREFIX  # the attention function of the backbone's layers; without a prompt it is the plain one

    def __init__(self, backbone: PreTrainedModel, config: TALoRAConfig = TALoRAConfig()):  # noqa: B008
        """Wrap and freeze ``backbone``, of any dtype; what learns is fp32 on its device. Several adapters can share it.
        Raises UserError for a model that is no such backbone."""
        super().__init__()
        check_backbone(backbone)
        self.backbone, self.config, self.described = backbone.requires_grad_(False), config, describe(backbone)
        self.tasks: list[str] = []  # tasks with weights of their own; a task id is an index into this list
        self.about: dict = {}  # what else adapter.json says: "chat_template", "tasks" -> name -> data.spec_of

    def add_task(self, name: str) -> int:
        """Add a task with weights of its own and return its id; earlier ids stay valid. UserError for a taken name."""
        if name in self.tasks:
            raise UserError(f"task '{name}' is there already; the tasks are {', '.join(self.tasks)}")
        self.tasks.append(name)
        return len(self.tasks) - 1

    @torch.no_grad()
    def copy_task(self, old: int, new: int) -> str:
        """Give task ``new`` the weights of task ``old`` and return the name of that one."""
        state = self.adapter_state()
        for name, tensor in state.items():
            if name.endswith(f".{old}"):
                state[name.removesuffix(f".{old}") + f".{new}"].copy_(tensor)
        return self.tasks[old]

    def check_tasks(self, task_ids: Tensor, rows: int) -> tuple[list[int], Tensor]:
        """The n distinct task ids of a batch, and which of them each row has, (B,). ValueError for wrong ids."""
        distinct, row = torch.unique(task_ids, return_inverse=True)  # (n,), (B,)
        ids = distinct.tolist()
        if task_ids.shape != (rows,) or ids[0] < NO_TASK or ids[-1] >= len(self.tasks):
            raise ValueError(f"task ids {ids} of shape {tuple(task_ids.shape)} should be one for each of {rows} rows, "
                             f"from 0 to {len(self.tasks) - 1} ({NO_TASK} = none)")
        return ids, row.to(self.device)

    def inputs(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, task_ids: Tensor,
               text: Tensor) -> dict:
        """The arguments of the backbone's forward; a method adds its own, which every layer's attention is given.
        (B, T) x 3 (a mask also (B, 1, T, T): who sees whom), task_ids (B,); text (B, <= T): no padding, no answer."""
        return dict(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids)

    def read(self, given: dict, **cache) -> Tensor:
        """The backbone's last hidden states of what `inputs` gives, (B, T, d)."""
        # For good, not for the call: under checkpointing the layers run again in backward, after forward has returned.
        if self.backbone.config._attn_implementation != self.attention:
            self.backbone.set_attn_implementation(self.attention)
        self.check_window(given["attention_mask"].shape[-1])
        return self.backbone.model(**given, **cache).last_hidden_state

    def check_window(self, tokens: int) -> None:
        """Raise UserError for more tokens than a sliding window holds: the masks of `score` have none, nor has a prompt
        in front of the text."""
        window = getattr(self.backbone.config, "sliding_window", None)
        if window and tokens > window:
            raise UserError(f"prompt, text and answers take {tokens} tokens, but the sliding window of the backbone is "
                            f"{window}; lower --max-length, or take another --backbone")

    def forward(self, input_ids: Tensor, attention_mask: Tensor, task_ids: Tensor,
                labels: Tensor | None = None) -> Output:
        """Logits of a batch, or with labels its loss; rows may belong to different tasks and be padded on any side.

        input_ids, attention_mask, labels (B, T), task_ids (B,), all long; labels are -100 where nothing is asked.
        ``.loss`` is L_PLM of Eq. (3). Only hidden states that predict an answer token pass the output layer: with a
        vocabulary of 152,064 that is most of the memory of a step. Raises ValueError for a row without any label."""
        text = attention_mask.bool() if labels is None else attention_mask.bool() & (labels == -100)  # (B, T)
        given = self.inputs(input_ids, attention_mask, positions(attention_mask), task_ids, text)
        hidden = self.read(given, use_cache=False)  # (B, T, d)
        if labels is None:
            return Output(logits=self.backbone.get_output_embeddings()(hidden))
        asked = labels[:, 1:] != -100  # (B, T-1): the state at t predicts the token at t + 1
        count = asked.sum(1)  # (B,)
        if not count.all():
            raise ValueError(f"row {int(count.argmin())} of the batch has no answer token: every label is -100")
        logits = self.backbone.get_output_embeddings()(hidden[:, :-1][asked]).float()  # (answer tokens, V)
        token_losses = F.cross_entropy(logits, labels[:, 1:][asked], reduction="none")  # (answer tokens,)
        row = asked.nonzero()[:, 0]  # (answer tokens,): the example of each token
        losses = token_losses.new_zeros(len(labels)).index_add(0, row, token_losses) / count  # (B,)
        wrong = torch.zeros_like(count).index_add(0, row, (logits.argmax(-1) != labels[:, 1:][asked]).long())  # (B,)
        return Output(loss=losses.mean(), losses=losses, correct=wrong == 0)

    @torch.no_grad()
    def generate(self, input_ids: Tensor, attention_mask: Tensor, task_ids: Tensor, max_new_tokens: int) -> Tensor:
        """Greedy continuation of left-padded prompts; (B, T) x 2, (B,) -> (B, T + max_new_tokens). A row that has ended
        is filled with the first end token. Raises ValueError if a prompt does not end in the last column."""
        if not attention_mask[:, -1].all():
            raise ValueError("generate needs prompts padded on the left: every row must end with a token of its own")
        ends = torch.tensor(self.end_tokens, dtype=torch.long, device=self.device)
        fill = self.end_tokens[0] if self.end_tokens else 0
        cache, done, new = DynamicCache(config=self.backbone.config), torch.zeros_like(input_ids[:, 0]).bool(), []
        given = self.inputs(input_ids, attention_mask, positions(attention_mask), task_ids, attention_mask.bool())
        self.backbone.eval()
        while len(new) < max_new_tokens and not done.all():
            state = self.read(given, past_key_values=cache, use_cache=True)[:, -1]  # (B, d)
            token = self.backbone.get_output_embeddings()(state).argmax(-1).masked_fill(done, fill)  # (B,)
            new.append(token)
            done = done | torch.isin(token, ends)
            given |= dict(input_ids=token[:, None], attention_mask=F.pad(given["attention_mask"], (0, 1), value=1),
                          position_ids=given["position_ids"][:, -1:] + 1)
        return F.pad(torch.cat([input_ids, torch.stack(new, 1)], 1), (0, max_new_tokens - len(new)), value=fill)

    @property
    def end_tokens(self) -> list[int]:
        """The tokens that end an answer; a model may name several or none."""
        eos = self.backbone.generation_config.eos_token_id
        return eos if isinstance(eos, list) else [] if eos is None else [eos]

    @torch.no_grad()
    def score(self, input_ids: Tensor, attention_mask: Tensor, task_ids: Tensor,
              choices: list[list[list[int]]]) -> Tensor:
        """log p(choice | prompt) of whole choices; (B, T) x 2, (B,), choices[b][c] token ids -> (B, C) in fp32.

        A row with fewer than C choices has -inf in the rest. A choice is scored exactly as given: end it with the end
        token to ask for the whole answer. All choices of a row are read in one pass behind one copy of the text: each
        sees the text and itself, not its siblings, and its positions follow the text's. Raises ValueError for an empty
        choice and a row without text or choices."""
        if len(choices) != len(input_ids) or not all(row and all(row) for row in choices):
            raise ValueError("every row needs at least one choice, and every choice at least one token")
        if not attention_mask.any(1).all():
            raise ValueError("every row needs at least one token of text")
        T, device, text = input_ids.shape[1], input_ids.device, attention_mask.bool()
        last = [max(t for t, real in enumerate(row) if real) for row in text.tolist()]  # place of the last text token
        lengths, behind, where = text.sum(1).tolist(), [[] for _ in choices], []
        for b, row in enumerate(choices):  # behind: (token, position, segment) of what is read behind the text
            for c, choice in enumerate(row):
                start, read = T + len(behind[b]), choice[:-1]  # a choice's last token predicts nothing
                behind[b] += [(token, lengths[b] + t, c + 1) for t, token in enumerate(read)]
                # where: (row, choice, place of the state that predicts the token, token)
                where += [(b, c, *pair) for pair in zip([last[b], *range(start, start + len(read))], choice)]
        S = T + max(map(len, behind))
        padded = [tokens + [(0, 0, -1)] * (S - T - len(tokens)) for tokens in behind]
        after = torch.tensor(padded, dtype=torch.long, device=device).view(len(choices), S - T, 3)
        front = torch.stack([input_ids, positions(attention_mask), text.long() - 1], -1)  # (B, T, 3)
        # segment: -1 padding, 0 the text, c + 1 choice c
        ids, position, segment = torch.cat([front, after], 1).unbind(-1)  # (B, S) x 3
        allowed = ((segment[:, None] == 0) | (segment[:, None] == segment[:, :, None])).tril()  # (B, S, S)
        self.backbone.eval()
        given = self.inputs(ids, allowed[:, None], position, task_ids, text)
        hidden = self.read(given, use_cache=False)  # (B, S, d)
        rows, columns, states, tokens = torch.tensor(where, device=device).T  # 4 x (answer tokens,)
        log_p = torch.cat([  # in slices: (answer tokens, V) would be gigabytes at V = 152,064
            -F.cross_entropy(self.backbone.get_output_embeddings()(hidden[rows[some], states[some]]).float(),
                             tokens[some], reduction="none")
            for some in torch.arange(len(where), device=device).split(1024)])  # (answer tokens,)
        scores = torch.full((len(ids), max(map(len, choices))), -torch.inf, device=device)  # (B, C)
        scores[rows, columns] = 0.0
        return scores.index_put_((rows, columns), log_p, accumulate=True)

    def adapter_state(self) -> dict[str, Tensor]:
        """All tensors of the adapter by name, none of the backbone's."""
        return {name: t for name, t in self.state_dict().items() if not name.startswith("backbone.")}

    def input_sizes(self) -> dict[str, Tensor]:
        """Of each tensor of ``in_layers`` the size of a layer's normed text, |weight| of its input norm, (L, .., d)."""
        w = torch.stack([layer.input_layernorm.weight.float().abs() for layer in self.backbone.model.layers])  # (L, d)
        return {name: w.view(len(w), *[1] * (tensor.dim() - 2), -1) for name, tensor in self.adapter_state().items()
                if name.partition(".")[0] in self.in_layers}

    def diagnose(self) -> dict:
        """What training logs of the adapter in addition to losses and learning rates."""
        return {}

    def save(self, folder: str | Path) -> None:
        """Write adapter.safetensors (the adapter's tensors alone) and adapter.json (what they mean) into ``folder``."""
        write_adapter(Path(folder), "adapter", self, self.adapter_state(), config=asdict(self.config),
                      tasks=self.tasks, about=self.about)

    @classmethod
    def load(cls, folder: str | Path, backbone: PreTrainedModel) -> "AdaptedLM":
        """Read what ``save`` wrote, bit for bit. Raises UserError for files that are missing, broken or of another
        method, and for another backbone than the adapter was trained on."""
        saved, state = read_adapter(Path(folder), "adapter", cls.method, describe(backbone))
        model = cls(backbone, saved["tasks"], TALoRAConfig(**saved["config"]))
        own, found = ({name: tuple(t.shape) for name, t in s.items()} for s in (model.adapter_state(), state))
        if own != found:
            raise UserError(f"the tensors {sorted(dict(own.items() ^ found.items()))[:3]} of the adapter in '{folder}' "
                            "do not fit its adapter.json; take the two files that were saved together")
        model.about = saved.get("about", {})
        model.load_state_dict(state, strict=False)  # names and shapes were compared above; the backbone has its own
        return model

    def save_task(self, name: str, folder: str | Path) -> None:
        """Write one task alone, u and v of TALoRA: 4 (r + d) L bytes in task.safetensors. task.json says which shared
        part it belongs to. Raises ValueError for a name that is not among the tasks."""
        end = f".{self.tasks.index(name)}"
        own = {tensor.removesuffix(end): t for tensor, t in self.adapter_state().items() if tensor.endswith(end)}
        specs = {task: spec for task, spec in self.about.get("tasks", {}).items() if task == name}
        write_adapter(Path(folder), "task", self, own, task=name, shared=self.hash_shared(),
                      about=self.about | {"tasks": specs})

    def load_task(self, folder: str | Path) -> int:
        """Add the task that ``save_task`` wrote and return its id. Raises UserError for files as in ``load``, another
        shared part or a taken name; the model is unchanged after an error."""
        saved, own = read_adapter(Path(folder), "task", self.method, self.described)
        if saved["shared"] != self.hash_shared():
            raise UserError(f"the task in '{folder}' was trained on a shared part with hash {saved['shared']}, but "
                            f"this adapter's has {self.hash_shared()}; load the multitask adapter of the task's run")
        new = self.add_task(saved["task"])
        self.load_state_dict({f"{tensor}.{new}": t for tensor, t in own.items()}, strict=False)
        specs = self.about.get("tasks", {}) | saved["about"]["tasks"]
        self.about = self.about | saved["about"] | {"tasks": specs}  # of several tasks the last one's lengths
        return new

    def hash_shared(self) -> str:
        """Identifies all that tasks have in common: theta0, B and gates, sizes and backbone."""
        digest = hashlib.sha256(json.dumps([self.method, asdict(self.config), self.described]).encode())
        for name, tensor in sorted(self.adapter_state().items()):
            if not name.rpartition(".")[2].isdigit():  # not u.0
                digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    @property
    def device(self) -> torch.device:
        return self.backbone.device


class GatedPrompts(AdaptedLM):
    """A prompt for each task in every layer, attended to through a gate. Subclasses say what the prompts are:

    `prompts(ids)` -> (L, n, P, d), and for the log `cosines()` -> (L, N, N) and `norms()` -> name: (L,)."""

    def __init__(self, backbone: PreTrainedModel, config: TALoRAConfig = TALoRAConfig()):  # noqa: B008
        super().__init__(backbone, config)
        L, H = backbone.config.num_hidden_layers, backbone.config.num_attention_heads
        gates = torch.zeros((L, H) if config.gate_per_head else (L,), device=self.device)
        self.gate = nn.Parameter(gates)  # the only zero on the path: see gating.py

    def prefix(self, task_ids: Tensor, rows: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Keys, values and gate of every layer's prompt for ``rows`` rows; task_ids (B,) -> L x ((B,K,P,h) x 2, gate).
        Computed in every call, once for each *distinct* task. Raises ValueError as `check_tasks` does."""
        ids, row = self.check_tasks(task_ids, rows)
        layers = zip(self.backbone.model.layers, self.prompts(ids).unbind(), self.gate.unbind())
        key_values = [(*prefix_key_value(layer.self_attn, theta), g) for layer, theta, g in layers]
        return [(K[row], V[row], g) for K, V, g in key_values]

    def inputs(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, task_ids: Tensor,
               text: Tensor) -> dict:
        """The text as it is and, as one more argument, the prompts: layer l finds its own at index l, Eq. (2)."""
        given = super().inputs(input_ids, attention_mask, position_ids, task_ids, text)
        return given | {"prefix": self.prefix(task_ids, len(input_ids))}

    @torch.no_grad()
    def diagnose(self) -> dict:
        """By layer tanh g, with its sign (a mean over heads), and `norms`; |cosines| of tasks, a mean over layers."""
        state = {"gates": torch.tanh(self.gate).reshape(len(self.gate), -1).mean(1)}  # (L,)
        state |= self.norms() if self.tasks else {}
        if len(self.tasks) > 1:
            state["cosines"] = self.cosines().abs().mean(0)  # (N, N)
        return {"tasks": self.tasks} | {name: t.double().round(decimals=5).tolist() for name, t in state.items()}


class TALoRA(GatedPrompts):
    """A frozen causal language model with a gated, task-adaptive low-rank prompt in every layer."""

    method, in_layers = "talora", ("theta0", "v")
    reads = ("prompt_length", "rank", "scale", "gate_per_head")

    def __init__(self, backbone: PreTrainedModel, tasks: list[str], config: TALoRAConfig = TALoRAConfig()):  # noqa: B008
        super().__init__(backbone, config)
        self.theta0, r = nn.Parameter(random_words(backbone, config.prompt_length)), config.rank  # (L, P, d)
        self.B = nn.Parameter(torch.randn(*self.theta0.shape[:2], r, device=self.device) * r**-0.5)  # (L, P, r)
        # Separate parameters, so that a target trains its own pair alone and, without the regulariser, absent tasks do
        # not drift: an optimizer with momentum moves every row of a tensor that has a gradient.
        self.u, self.v = nn.ParameterList(), nn.ParameterList()
        for task in tasks:
            self.add_task(task)

    def add_task(self, name: str) -> int:
        """Add a task with new random factors and return its id; nothing else changes, earlier ids stay valid. u has
        variance 1/r, so that (B u)[p] has it as well; v is small but not zero. UserError for a taken name."""
        new_id, r, (L, _, d) = super().add_task(name), self.config.rank, self.theta0.shape
        self.u.append(nn.Parameter(torch.randn(L, r, device=self.device) * r**-0.5))
        self.v.append(nn.Parameter(torch.randn(L, d, device=self.device) * 0.02))
        return new_id

    def factors(self, ids: list[int] | None = None) -> tuple[Tensor, Tensor]:
        """The fast weights of these tasks (all, if None), u (L, n, r) and v (L, n, d); zero for NO_TASK."""
        L, _, d = self.theta0.shape
        zero = self.theta0.new_zeros(L, self.config.rank), self.theta0.new_zeros(L, d)
        ids = range(len(self.tasks)) if ids is None else ids
        u, v = zip(*(zero if i == NO_TASK else (self.u[i], self.v[i]) for i in ids))
        return torch.stack(u, 1), torch.stack(v, 1)

    def prompts(self, ids: list[int]) -> Tensor:
        """The prompts of these tasks in every layer, (L, n, P, d); theta0 + s * B 0 = theta0 for NO_TASK."""
        return task_prompt(self.theta0[:, None], self.B[:, None], *self.factors(ids), self.config.scale)  # Eq. (1)

    def orthogonality(self, form: str) -> Tensor:
        """The regulariser R over all tasks, a scalar, Eq. (4)."""
        return orthogonality(*self.factors(), form)

    def cosines(self) -> Tensor:
        """cos(A_i, A_j) of every two tasks in every layer, (L, N, N)."""
        return task_cosines(*self.factors())

    def norms(self) -> dict[str, Tensor]:
        """By layer, (L,): the Frobenius norm of theta0, and the mean one of the tasks' steps s B A_i."""
        steps = self.prompts(list(range(len(self.tasks)))) - self.theta0[:, None]  # (L, N, P, d)
        return {"theta0_norms": self.theta0.norm(dim=(-2, -1)), "step_norms": steps.norm(dim=(-2, -1)).mean(1)}


def random_words(backbone: PreTrainedModel, P: int) -> Tensor:
    """A new prompt for every layer that reads like random words, (L, P, d) in fp32. A layer's projections expect normed
    inputs, so the words pass the layer's own norm (paper: open)."""
    layers, words = backbone.model.layers, backbone.get_input_embeddings().weight  # (V, d)
    chosen = torch.randint(len(words), (len(layers), P), device=words.device)  # (L, P)
    with torch.no_grad():
        return torch.stack([layer.input_layernorm(words[row]) for row, layer in zip(chosen, layers)]).float()


def positions(attention_mask: Tensor) -> Tensor:
    """Position of every token counted over real tokens, so that padding moves nothing; (B, T) -> (B, T)."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
