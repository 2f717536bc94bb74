r"""A frozen language model with something small that learns: what TA-LoRA and the methods it is compared with share.

A method says one thing of its own: what the backbone is given (`inputs`). The rest is the same for all of them and
stands here: the loss of a batch, greedy generation, the scores of an answer's candidates, saving and loading. So a
difference between two methods is never a difference in how they were trained, asked or measured.

Nothing of a call is kept on a module: with gradient checkpointing a layer runs a second time in backward, and would
then find what some other call left there.

B batch, T text tokens, C choices, d model width, V vocabulary.
"""

import hashlib
import json
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from checkpoint import atomic, misfit, write_json
from gating import GATED_PREFIX

# Backbones whose attention has separate k_proj and v_proj and calls transformers' attention interface.
FAMILIES = ("qwen2", "qwen3", "llama", "mistral")
NO_TASK = -1  # the task id of a row that no task's own weights are for
# What a config says beside what the model computes: names, places, who wrote it, how it is held and run.
BESIDE = ("_name_or_path", "architectures", "dtype", "transformers_version", "use_cache", "initializer_range")


@dataclass(frozen=True)
class TALoRAConfig:
    """Sizes of a method; the methods of baselines.py read the same fields and say there what they mean to them."""

    prompt_length: int = 12  # P; with r = 8 and one gate per layer: 1.3 M numbers for one task at 7B, as in the paper
    rank: int = 8  # r
    scale: float = 1.0  # s
    gate_per_head: bool = False  # the paper's g^l has one gate per layer

    def __post_init__(self):
        sizes = (self.prompt_length, self.rank)
        if (not all(type(size) is int and size > 0 for size in sizes) or type(self.gate_per_head) is not bool
                or type(self.scale) not in (int, float) or not abs(self.scale) < 1e38):  # nan is not below it either
            raise ValueError(f"prompt length {self.prompt_length} and rank {self.rank} must be whole numbers above 0, "
                             f"the scale {self.scale} a finite number, and gate_per_head {self.gate_per_head} a bool")


@dataclass
class Output:
    logits: Tensor | None = None  # (B, T, V), when no labels are given
    loss: Tensor | None = None  # mean of losses
    losses: Tensor | None = None  # (B,) mean cross-entropy of each row's answer tokens
    correct: Tensor | None = None  # (B,) bool: greedy decoding would give exactly the answer


class FrozenLM(nn.Module):
    """A frozen causal language model and the tensors of a method; subclasses add the tensors and override `inputs`."""

    method = ""  # the name in adapter.json
    in_front = 0  # rows that `inputs` puts in front of the text
    reads: tuple[str, ...] = ()  # the sizes in TALoRAConfig that it makes something of
    attention = GATED_PREFIX  # the attention function of the backbone's layers; without a prompt it is the plain one

    def __init__(self, backbone: PreTrainedModel, config: TALoRAConfig):
        """Wrap ``backbone``, a causal language model of one of FAMILIES.

        The backbone's weights are frozen, in whatever dtype they are; all tensors of ours are fp32 on its device.
        Called by itself the backbone goes on computing what it did before (its attention stays torch's fused one, under
        our name), so that several wrappers can share it. Raises ValueError for a backbone of another family.
        """
        super().__init__()
        self.check(backbone)
        self.backbone = backbone.requires_grad_(False)
        self.config = config
        self.tasks: list[str] = []  # tasks with weights of their own; a row's task id counts in here
        self.described = describe(backbone)

    @classmethod
    def check(cls, backbone: PreTrainedModel) -> None:
        """Raise ValueError for a backbone that this method cannot work with."""
        shape = backbone.config
        if getattr(shape, "model_type", None) not in FAMILIES or backbone.get_output_embeddings() is None:
            raise ValueError(
                f"the backbone is a {type(backbone).__name__} (model type '{getattr(shape, 'model_type', '?')}'), but "
                f"the gated prefix needs a causal language model of one of the families {', '.join(FAMILIES)}"
            )

    def add_task(self, name: str) -> int:
        """Add a task with new weights of its own and return its id; nothing else changes, earlier ids stay valid.

        Raises ValueError if the name is taken.
        """
        if name in self.tasks:
            raise ValueError(f"task '{name}' is there already; the tasks are {', '.join(self.tasks)}")
        self.tasks.append(name)
        return len(self.tasks) - 1

    def copy_task(self, old: int, new: int) -> None:
        """Give task ``new`` the weights of task ``old``."""
        own = {name: p for name, p in self.adapter_state().items()}
        for name, p in own.items():
            tensor, _, task = name.partition(".")
            if task == str(old):
                own[f"{tensor}.{new}"].copy_(p)

    def check_tasks(self, task_ids: Tensor, rows: int) -> tuple[list[int], Tensor]:
        """The distinct task ids of a batch, and which of them each row has; (B,) -> n ids, (B,).

        Raises ValueError for an id that is no task's and unless there is one id for each row.
        """
        if task_ids.shape != (rows,):
            raise ValueError(f"task ids have shape {tuple(task_ids.shape)}, but {rows} rows need one number each")
        distinct, row = torch.unique(task_ids, return_inverse=True)  # (n,), (B,)
        ids = distinct.tolist()
        if ids[0] < NO_TASK or ids[-1] >= len(self.tasks):
            raise ValueError(f"task ids {ids} are not all among the {len(self.tasks)} tasks ({NO_TASK} = none)")
        return ids, row.to(self.device)

    def inputs(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, task_ids: Tensor,
               text: Tensor) -> dict:
        """What the backbone is given: the arguments of its forward; a method may add to them or put tokens in front.

        (B, T) x 3 ((B, 1, T, T) for a mask that says who sees whom), task_ids (B,); text (B, <= T) is True for the
        tokens of the input: no padding, no answer.
        """
        return dict(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids)

    def hidden(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, task_ids: Tensor,
               text: Tensor) -> Tensor:
        """The backbone's last hidden states, seen with what the method adds; as `inputs` -> (B, T, d)."""
        self._use_our_attention()
        given = self.inputs(input_ids, attention_mask, position_ids, task_ids, text)
        return self.backbone.model(**given, use_cache=False).last_hidden_state[:, -input_ids.shape[1]:]

    def forward(self, input_ids: Tensor, attention_mask: Tensor, task_ids: Tensor,
                labels: Tensor | None = None) -> Output:
        """Logits of a batch, or with labels its loss; rows may belong to different tasks and be padded on any side.

        input_ids, attention_mask, labels (B, T), task_ids (B,), all long; labels are -100 where nothing is asked.
        Without labels: ``.logits`` (B, T, V). With labels: ``.losses`` (B,), cross-entropy averaged within each
        example over its answer tokens, and ``.loss``, their mean: L_PLM of Eq. (3); ``.correct`` (B,), whether
        greedy decoding would give the answer. Only hidden states that predict an answer token pass the output layer:
        with a vocabulary of 152,064 that is most of the memory of a step.
        Raises ValueError for a row without any label.
        """
        text = attention_mask.bool() if labels is None else attention_mask.bool() & (labels == -100)  # (B, T)
        hidden = self.hidden(input_ids, attention_mask, positions(attention_mask), task_ids, text)  # (B, T, d)
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

    def diagnose(self) -> dict:
        """What training logs of the adapter beside losses and rates."""
        return {}

    @torch.no_grad()
    def generate(self, input_ids: Tensor, attention_mask: Tensor, task_ids: Tensor, max_new_tokens: int) -> Tensor:
        """Greedy continuation of left-padded prompts; (B, T) x 2, (B,) -> (B, T + max_new_tokens).

        The last max_new_tokens columns are the new tokens; after its end-of-sequence token a row is filled with
        padding. Raises ValueError if a prompt does not end in the last column.
        """
        if not attention_mask[:, -1].all():
            raise ValueError("generate needs prompts padded on the left: every row must end with a token of its own")
        # Qwen pads with its end token; a model that names neither runs to max_new_tokens.
        settings = self.backbone.generation_config
        eos = settings.eos_token_id if settings.eos_token_id is not None else self.backbone.config.eos_token_id
        pad = next((i for i in (settings.pad_token_id, eos, 0) if i is not None), 0)
        pad = pad[0] if isinstance(pad, list) else pad
        # All settings are given: a model's own (sampling, a repetition penalty) would make the answer another one.
        greedy = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, repetition_penalty=1.0,
                                  eos_token_id=eos, pad_token_id=pad, use_cache=True)
        self._use_our_attention()
        given = self.inputs(input_ids, attention_mask, positions(attention_mask), task_ids, attention_mask.bool())
        start = {name: given.pop(name) for name in ("input_ids", "inputs_embeds", "attention_mask") if name in given}
        del given["position_ids"]  # `generate` counts them from the mask, as we do
        # `generate` refuses arguments it does not know, so a hook adds them to each of its forward calls.
        hook = self.backbone.model.register_forward_pre_hook(
            lambda module, args, kwargs: (args, {**kwargs, **given}), with_kwargs=True
        )
        own, self.backbone.generation_config = self.backbone.generation_config, greedy
        try:
            with evaluating(self.backbone):
                tokens = self.backbone.generate(**start, generation_config=greedy)
        finally:
            hook.remove()
            self.backbone.generation_config = own
        new = tokens[:, start["input_ids"].shape[1]:] if "input_ids" in start else tokens  # (B, <= max_new_tokens)
        return torch.cat([input_ids, F.pad(new, (0, max_new_tokens - new.shape[1]), value=pad)], 1)

    @torch.no_grad()
    def score(self, input_ids: Tensor, attention_mask: Tensor, task_ids: Tensor,
              choices: list[list[list[int]]]) -> Tensor:
        """log p(choice | prompt) of whole choices; (B, T) x 2, (B,), choices[b][c] token ids -> (B, C) in fp32.

        C is the largest number of choices of a row; a row with fewer has -inf in the rest. A choice is scored
        exactly as given: end it with the end-of-sequence token to ask for the whole answer. All choices of a row
        are read in one forward pass behind one copy of the text: each sees the text and itself, not its siblings,
        and starts at the position that follows the text. Raises ValueError for an empty choice, a row without text or
        choices, and a text longer than the sliding window of a backbone that has one.
        """
        if len(choices) != len(input_ids) or not all(row and all(row) for row in choices):
            raise ValueError("every row needs at least one choice, and every choice at least one token")
        if not attention_mask.any(1).all():
            raise ValueError("every row needs at least one token of text")
        T, device = input_ids.shape[1], input_ids.device
        text = attention_mask.bool()  # (B, T)
        S = T + max(sum(len(c) - 1 for c in row) for row in choices)  # a choice's last token predicts nothing asked
        window = getattr(self.backbone.config, "sliding_window", None)
        if window and self.in_front + S > window:  # our own mask is taken as it is: the layers would look further back
            raise ValueError(f"prompt, text and choices take {self.in_front + S} tokens, but the backbone's sliding "
                             f"window is {window}, which score cannot keep to; shorten the text")
        ids = F.pad(input_ids, (0, S - T))  # (B, S)
        position = F.pad(positions(attention_mask), (0, S - T))  # (B, S)
        allowed = torch.eye(S, dtype=torch.bool, device=device).repeat(len(ids), 1, 1)  # (B, S, S); no row all False
        allowed[:, :T, :T] |= text[:, None] & torch.ones(T, T, dtype=torch.bool, device=device).tril()
        where = []  # (row, choice, position of the state that predicts the token, token)
        for b, row in enumerate(choices):
            last, start, length = int(text[b].nonzero()[-1]), T, int(text[b].sum())
            for c, choice in enumerate(row):
                end = start + len(choice) - 1
                ids[b, start:end] = torch.tensor(choice[:-1], device=device)
                position[b, start:end] = torch.arange(length, length + end - start, device=device)
                allowed[b, start:end, :T] = text[b]
                allowed[b, start:end, start:end] = allowed.new_ones(end - start, end - start).tril()
                states = [last, *range(start, end)]
                where += [(b, c, state, token) for state, token in zip(states, choice)]
                start = end
        with evaluating(self.backbone):
            hidden = self.hidden(ids, allowed[:, None], position, task_ids, text)  # (B, S, d)
        rows, columns, states, tokens = torch.tensor(where, device=device).T  # 4 x (answer tokens,)
        head = self.backbone.get_output_embeddings()
        log_p = torch.cat([  # in slices: (answer tokens, V) would be gigabytes at V = 152,064
            -F.cross_entropy(head(hidden[rows[part], states[part]]).float(), tokens[part], reduction="none")
            for part in torch.arange(len(where), device=device).split(1024)
        ])  # (answer tokens,)
        scores = torch.zeros(len(ids), max(map(len, choices)), device=device)  # (B, C)
        scores.index_put_((rows, columns), log_p, accumulate=True)
        counts = torch.tensor([len(row) for row in choices], device=device)
        return scores.masked_fill(torch.arange(scores.shape[1], device=device) >= counts[:, None], -torch.inf)

    def adapter_state(self) -> dict[str, Tensor]:
        """All tensors of ours by name, none of the backbone's."""
        named = [*self.named_parameters(), *self.named_buffers()]
        return {name: t.detach() for name, t in named if self.owns(name)}

    def owns(self, name: str) -> bool:
        """Whether a tensor belongs to the adapter."""
        return not name.startswith("backbone.")

    def save(self, folder: str | Path) -> None:
        """Write adapter.safetensors (tensors of ours alone) and adapter.json (what they mean) into ``folder``."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with atomic(folder / "adapter.safetensors") as file:
            file.write(save({name: t.cpu().contiguous() for name, t in self.adapter_state().items()}))
        write_json(folder / "adapter.json", {"method": self.method, "config": asdict(self.config), "tasks": self.tasks,
                                             "backbone": self.described})

    @classmethod
    def load(cls, folder: str | Path, backbone: PreTrainedModel) -> "FrozenLM":
        """Read what ``save`` wrote, bit for bit.

        Raises ValueError if files are missing or unreadable, if the backbone is not the one the adapter was trained
        on, or if tensors are missing, unknown or of another shape. Nothing is changed then.
        """
        folder = Path(folder)
        try:
            about = json.loads((folder / "adapter.json").read_text(encoding="utf-8"))
            state = load_file(folder / "adapter.safetensors")
            config, tasks, trained_on = TALoRAConfig(**about["config"]), about["tasks"], dict(about["backbone"])
            distinct = type(tasks) is list and all(type(t) is str for t in tasks) and len(set(tasks)) == len(tasks)
            if about["method"] != cls.method or not distinct:
                raise ValueError(f"method '{about['method'] or 'talora'}' and tasks {tasks} should be "
                                 f"'{cls.method or 'talora'}' and a list of distinct names")
            found = {size for tensor in state.values() for size in tensor.shape}
            for name in {"prompt_length", "rank"}.intersection(cls.reads):  # before a tensor of that size is made
                if getattr(config, name) not in found:
                    raise ValueError(f"{name} is {getattr(config, name)}, but no tensor has that size")
        except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
            raise ValueError(f"no adapter can be read from '{folder}' ({error}); it should hold adapter.json and "
                             "adapter.safetensors as written by a training run") from error
        for key, value in describe(backbone).items():
            if trained_on.get(key) != value:
                raise ValueError(f"the adapter in '{folder}' was trained on a backbone with {key} = "
                                 f"{trained_on.get(key)}, but this one has {value}; load it with its own backbone")
        model = cls(backbone, tasks, config)
        wrong = misfit(model.adapter_state(), state)
        if wrong:
            raise ValueError(f"the adapter in '{folder}' does not fit its own adapter.json: {wrong}; take another one")
        model.load_state_dict(state, strict=False)  # names and shapes were compared above; the backbone has its own
        return model

    @property
    def device(self) -> torch.device:
        return self.backbone.device

    def _use_our_attention(self) -> None:
        # For good, not for the call: under checkpointing the layers run again in backward, after forward has returned.
        if self.backbone.config._attn_implementation != self.attention:
            self.backbone.set_attn_implementation(self.attention)


def positions(attention_mask: Tensor) -> Tensor:
    """Position of every token counted over real tokens, so that padding moves nothing; (B, T) -> (B, T)."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


@contextmanager
def evaluating(module: nn.Module):
    """Run in eval mode and go back to what was before (in training mode, checkpointing would refuse a cache)."""
    before = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(before)


def describe(backbone: PreTrainedModel) -> dict:
    """What makes a backbone the one an adapter was trained on: its family and shape, hashes of its config and weights.

    By content alone: the same one in another folder is the same, another revision of the same name is another one. The
    config's hash leaves out BESIDE. The weights' is taken of the first 64 numbers of every tensor, in bf16, so that the
    same weights loaded in fp32 and in bf16 are the same backbone. Weights on the meta device hash as "meta".
    """
    shape = backbone.config
    about = {name: getattr(shape, name) for name in (
        "model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")}
    about["rope_theta"] = (getattr(shape, "rope_parameters", None) or {}).get("rope_theta")
    computes = {name: value for name, value in shape.to_dict().items() if name not in BESIDE}
    about["config"] = hashlib.sha256(json.dumps(computes, sort_keys=True, default=str).encode()).hexdigest()[:16]
    if backbone.device.type == "meta":
        return {**about, "weights": "meta"}
    some = [p.detach().flatten()[:64].to(torch.bfloat16) for _, p in sorted(backbone.named_parameters())]
    digest = hashlib.sha256(torch.cat(some).cpu().view(torch.uint8).numpy().tobytes())
    return {**about, "weights": digest.hexdigest()[:16]}
