"""Every method and every ablation over tiny random backbones: the same questions for all, one reference for each.

Nothing is at zero except where a start is tested: a zero gate or factor hides every bug behind it.
"""

from functools import partial

import pytest
import torch
from test_model import ANSWERS, CHOICES, CLOSE, PROMPTS, batch, gradients, pad, slow_logits, slow_prefix, soft
from torch import nn

import train
from checkpoint import FAMILIES
from data import Batch
from experiments import baselines
from experiments.compare import METHODS, VARIANTS
from model import NO_TASK, GatedPrompts, TALoRAConfig, positions

ALL = METHODS | VARIANTS
CLASSES = {ALL[name].model: name for name in reversed(ALL)}  # class -> its first method: pt, not spot
EVERY = pytest.mark.parametrize("name", CLASSES.values())
IN_EVERY_FAMILY = pytest.mark.parametrize("family, name", [  # bitfit: only Qwen2 has biases
    (family, name) for family in FAMILIES for name in CLASSES.values() if name != "bitfit" or family == "qwen2"])
IN_FRONT, IN_EVERY_LAYER, CHANGED = ([name for model, name in CLASSES.items() if issubclass(model, kind)] for kind in
                                     (baselines.PromptInFront, GatedPrompts, baselines.ChangedBackbone))
DEEP = ("deep-pt", "deep-mpt", "own-b", "2-terms", "4-terms", "side-by-side", "talora", "open-gate", "one-softmax",
        "gate-on-the-step")  # those that slow_prompt knows
TASK_IDS = torch.tensor([0, 2, 1])


@pytest.fixture
def opened(tiny_backbone):
    """opened(name, backbone=None, **config) -> the method with two sources and a target, all its tensors far from 0."""

    @torch.no_grad()
    def make(name, backbone=None, rank=2, scale=1.0):
        backbone = backbone or tiny_backbone()
        torch.manual_seed(1)
        model = ALL[name].model(backbone, ["first", "second"], TALoRAConfig(5, rank, scale))
        model.add_task("third")
        for own, p in model.adapter_state().items():
            if own.startswith("backbone."):
                p.add_(0.2 * torch.randn(p.shape))
            elif p.is_floating_point() and (name, own) != ("open-gate", "gate"):  # that one is fixed
                p.copy_(torch.where(torch.rand(p.shape) < 0.5, -1.0, 1.0) * (0.3 + torch.rand(p.shape)))
        if name == "attempt":  # tau is large: prompts of one size are mixed nearly equally, whatever the text
            model.prompt[0][:, ::2] *= 40
        return model

    return make


@torch.no_grad()
def log_p(model, prompt, answer, task):
    """log-softmax of one unpadded row after its last prompt token and after every answer token, (1 + answer, V).

    The prompt alone is text: attempt mixes its prompts by the text, and neither an answer in training, nor candidates,
    nor what was generated may be part of that.
    """
    ids = torch.tensor([prompt + answer])
    ones, text = torch.ones_like(ids), torch.arange(ids.shape[1]).expand(1, -1) < len(prompt)
    given = model.inputs(ids, ones, positions(ones), torch.tensor([task]), text)
    states = model.read(given, use_cache=False)[0]  # (T, d)
    return model.backbone.lm_head(states).log_softmax(-1)[len(prompt) - 1:]


@IN_EVERY_FAMILY
def test_scores_are_sums_of_log_probabilities_and_losses_their_means(family, name, tiny_backbone, opened):
    """Of a padded batch of several tasks, against one unpadded row at a time."""
    model = opened(name, tiny_backbone(family))
    scores = model.score(*pad(PROMPTS, left=2), TASK_IDS, CHOICES)
    for b, row in enumerate(CHOICES):
        expected = [log_p(model, PROMPTS[b], c, int(TASK_IDS[b]))[range(len(c)), c].sum() for c in row]
        torch.testing.assert_close(scores[b, :len(row)], torch.stack(expected), **CLOSE)
        assert (scores[b, len(row):] == -torch.inf).all()
    expected = torch.stack([-log_p(model, p, a, int(i))[range(len(a)), a].mean()
                            for p, a, i in zip(PROMPTS, ANSWERS, TASK_IDS)])
    for side, left in (("right", 0), ("left", 4)):
        out = model(**batch(tasks=TASK_IDS.tolist(), side=side, left=left))
        torch.testing.assert_close(out.losses, expected, **CLOSE)
        torch.testing.assert_close(out.loss, expected.mean(), **CLOSE)


@IN_EVERY_FAMILY
def test_generate_is_greedy_decoding_step_by_step(family, name, tiny_backbone, opened):
    model = opened(name, tiny_backbone(family))
    for rows, left in ((3, 2), (1, 0)):  # without padding, transformers makes no mask
        out = model.generate(*pad(PROMPTS[:rows], left), TASK_IDS[:rows], 6)[:, -6:].tolist()
        for row, prompt, task in zip(out, PROMPTS, TASK_IDS.tolist()):
            assert log_p(model, prompt, row, task)[:-1].argmax(-1).tolist() == row  # the best token after those so far
        assert model(**batch(PROMPTS[:rows], out, TASK_IDS[:rows].tolist())).correct.all()


@pytest.mark.parametrize("name", [name for name in CLASSES.values() if name not in ("bitfit", "ft")])  # see compare.py
def test_own_tensors_stay_fp32_over_a_bf16_backbone(name, tiny_backbone, opened):
    models = opened(name, tiny_backbone().to(torch.bfloat16)), opened(name)
    losses = [model(**batch(tasks=TASK_IDS.tolist())).loss for model in models]
    [loss.backward() for loss in losses]
    for (own, gradient), expected in zip(*(gradients(model).items() for model in models), strict=True):
        if expected[1] is not None and expected[1].any():
            assert gradient.dtype == models[0].get_parameter(own).dtype == torch.float32
            assert torch.cosine_similarity(gradient.flatten(), expected[1].flatten(), dim=0) > 0.8, own
    assert losses[0].dtype == torch.float32


@EVERY
def test_load_equals_save_and_other_methods_refuse_the_file(name, tiny_backbone, opened, tmp_path):
    model = opened(name)
    model.save(tmp_path)
    loaded = ALL[name].model.load(tmp_path, tiny_backbone())
    assert loaded.tasks == model.tasks and loaded.adapter_state().keys() == model.adapter_state().keys()
    assert all(torch.equal(loaded.adapter_state()[own], t) for own, t in model.adapter_state().items())
    ids, mask = pad(PROMPTS)
    assert torch.equal(loaded(ids, mask, TASK_IDS).logits, model(ids, mask, TASK_IDS).logits)
    for other in set(CLASSES) - {ALL[name].model}:
        with pytest.raises(ValueError, match=f"method '{model.method}', not '{other.method}'"):
            other.load(tmp_path, model.backbone)


def test_what_would_be_silently_wrong_is_refused(tiny_backbone, opened):
    for name in ("pt", "mpt", "attempt", "deep-pt", "deep-mpt"):
        with pytest.raises(ValueError, match="no task"):
            opened(name)(*pad(PROMPTS), torch.tensor([0, NO_TASK, 1]))
    with pytest.raises(ValueError, match="with and without a task"):
        opened("side-by-side")(*pad(PROMPTS), torch.tensor([0, NO_TASK, 1]))
    for family in set(FAMILIES) - {"qwen2"}:
        with pytest.raises(ValueError, match="bitfit trains the biases .* has none"):
            opened("bitfit", tiny_backbone(family))
    model = opened("pt", tiny_backbone("mistral", sliding_window=12))
    model.score(*pad([PROMPTS[0]]), TASK_IDS[:1], [[[4, 1]]])
    with pytest.raises(ValueError, match="take 13 tokens.*sliding window of the backbone is 12"):
        model.score(*pad([PROMPTS[0]]), TASK_IDS[:1], [[[4, 1, 2]]])  # 5 + 8 tokens


@EVERY
@torch.no_grad()
def test_what_is_computed_before_training(name, tiny_backbone):
    backbone = tiny_backbone()
    ids, mask = pad(PROMPTS, left=3)
    plain = backbone(ids, attention_mask=mask, position_ids=positions(mask)).logits
    model = ALL[name].model(backbone, ["a", "b", "c"], TALoRAConfig(5, 2))
    logits = model(ids, mask, TASK_IDS).logits
    if name in ("open-gate", "one-softmax", *IN_FRONT):  # a prompt has an effect from the first step
        assert (logits - plain).abs().max() > 0.1
    else:
        assert torch.equal(logits, plain)
    if name in ("mpt", "deep-mpt"):  # every task starts at P*
        assert all((factor == 1).all() for factor in (*model.u, *model.v))
    if name in ("pt", "mpt", "attempt"):  # words of the vocabulary, far better than noise
        words = backbone.get_input_embeddings().weight
        assert all((words == row).all(1).any() for row in (model.shared if name == "mpt" else model.prompt[1]))
    assert torch.equal(backbone(ids, attention_mask=mask, position_ids=positions(mask)).logits, plain)


@pytest.mark.parametrize("name", ALL)
def test_in_every_stage_what_should_learn_does_by_the_third_step_and_nothing_else(name, tiny_backbone):
    """The stages one after another as train.py runs them, with the method's own table, optimizer and step."""
    torch.manual_seed(0)
    method, backbone = ALL[name], tiny_backbone()
    cfg = train.parse(["--run", "new"], method)
    sources = ["a", "b", "c"] if method.per_task else ["all"]
    model = method.model(backbone, sources, TALoRAConfig(5, cfg.rank, cfg.scale, cfg.gate_per_head))
    for stage in method.learns:
        ids = [NO_TASK] if stage == "base" else list(range(len(sources)))
        if stage == "target" and method.per_task:
            ids = [model.add_task("target")]
            model.copy_task(1, ids[0])
        learns = train.learning_tensors(model, method.learns[stage], ids)
        assert {n.partition(".")[0] for n in learns} == set(method.learns[stage])
        optimizer = train.build_optimizer(model, learns, cfg)
        if stage == "multitask" and method.fresh_gates:
            nn.init.zeros_(model.gate)
        before = {n: t.clone() for n, t in {**model.state_dict(), **backbone.state_dict(prefix="given.")}.items()}
        for _ in range(3):
            train.train_step(model, optimizer, [Batch(**batch(tasks=[ids[b % len(ids)] for b in range(3)]))], cfg,
                             regularise=stage == "multitask" and method.regularised)
        for own in learns:
            assert model.get_parameter(own).grad.any(), f"{own} has no gradient in stage {stage}"
        now = {**model.state_dict(), **backbone.state_dict(prefix="given.")}
        assert {n for n, t in now.items() if not torch.equal(t, before[n])} == set(learns), stage


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", CHANGED)
def test_a_changed_backbone_shares_what_it_does_not_change(name, tied, tiny_backbone, opened):
    backbone = tiny_backbone(tie_word_embeddings=tied)
    backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    given = {t.data_ptr() for t in backbone.parameters()}
    model = opened(name, backbone)
    for own, p in model.named_parameters():
        assert (p.data_ptr() in given) == (own not in model.adapter_state()), own
    assert (model.backbone.lm_head.weight is model.backbone.get_input_embeddings().weight) == tied
    assert model.backbone.model.layers[0].gradient_checkpointing, "a setting of the original, as train.py makes it"


def slow_prompt(model, name, task, n):
    """The prompt of a task in layer n, (P, d) (all tasks' below each other for side-by-side), term by term."""
    if task == NO_TASK:
        return model.theta0[n]
    if name == "deep-pt":
        return model.prompt[task][n]
    if name == "deep-mpt":
        return model.shared[n] * torch.outer(model.u[task][n], model.v[task][n])
    if name == "side-by-side":
        return torch.cat([slow_prompt(model, "talora", i, n) for i in range(3)])
    B = model.B[task][n] if name == "own-b" else model.B[n]
    u, v = (f[task][n].view(-1, f[task].shape[-1]) for f in (model.u, model.v))  # (terms, r), (terms, d)
    assert len(u) == {"2-terms": 2, "4-terms": 4}.get(name, 1)
    return model.theta0[n] + sum(model.config.scale * B @ torch.outer(u_t, v_t) for u_t, v_t in zip(u, v))


@pytest.mark.parametrize("name", DEEP)
@torch.no_grad()
def test_prompts_in_every_layer_equal_a_slow_reference(name, opened):
    model = opened(name, scale=0.7)

    def mix(task, n, head, query, K, V):
        prefix = partial(slow_prefix, model.backbone, n, head)
        K_theta, V_theta = prefix(slow_prompt(model, name, task, n))
        if name == "one-softmax":
            return soft(query, torch.cat([K_theta, K]), torch.cat([V_theta, V]))
        text, own, gate = soft(query, K, V), soft(query, K_theta, V_theta), model.gate[n].tanh()
        if name == "gate-on-the-step":
            shared = soft(query, *prefix(model.theta0[n]))
            return text + model.gate0[n].tanh() * shared + gate * (own - shared)
        return text + (1 if name == "open-gate" else gate) * own

    ids, mask = pad(PROMPTS, left=4)
    for task_ids in (TASK_IDS, torch.full((3,), NO_TASK)) if hasattr(model, "theta0") else (TASK_IDS,):
        logits = model(ids.masked_fill(mask == 0, 21), mask, task_ids).logits  # what is padded does not matter
        for b, task in enumerate(task_ids.tolist()):
            slow = slow_logits(model.backbone, PROMPTS[b], partial(mix, task))
            torch.testing.assert_close(logits[b][mask[b].bool()], slow, **CLOSE)


@pytest.mark.parametrize("name", ("pt", "mpt", "attempt"))
@torch.no_grad()
def test_prompts_at_the_input_equal_a_slow_reference(name, opened):
    model = opened(name, rank=3)
    embed, d = model.backbone.get_input_embeddings(), 32

    def attempt(words):  # of the target; the equations of the class, number by number
        x = torch.tensor([max(word[c] for word in words) for c in range(d)])
        z = model.down @ x
        h = model.up @ (z / (1 + torch.exp(-z)))
        h = (h - h.mean()) / (h.var(unbiased=False) + 1e-5).sqrt()
        prompts = [model.prompt[j] for j in range(3)]  # two sources and its own
        a = torch.stack([h @ torch.stack([p[:, c].max() for c in range(d)]) / (2.718281828 * d) for p in prompts])
        a = a.exp() / a.exp().sum()
        assert (a - 1 / 3).abs().max() > 0.1
        return model.prompt[2] + sum(a_j * p for a_j, p in zip(a, prompts))

    ids, mask = pad(PROMPTS, left=4)
    logits = model(ids.masked_fill(mask == 0, 21), mask, TASK_IDS).logits  # what is padded does not matter
    for b, task in enumerate(TASK_IDS.tolist()):
        words = embed(torch.tensor(PROMPTS[b]))  # (T, d)
        if name == "mpt":
            prompt = model.shared * torch.outer(model.u[task], model.v[task])
        else:  # a source task of attempt uses its prompt as it is
            prompt = attempt(words) if (name, task) == ("attempt", 2) else model.prompt[task]
        slow = model.backbone(inputs_embeds=torch.cat([prompt, words])[None]).logits[0, 5:]
        torch.testing.assert_close(logits[b][mask[b].bool()], slow, **CLOSE)


@pytest.mark.parametrize("name", IN_FRONT)
def test_checkpointing_changes_neither_loss_nor_gradients_of_a_prompt_in_front(name, tiny_backbone, opened):
    found = []
    for model in (opened(name), opened(name)):
        if found:
            model.backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        loss = model.train()(**batch(tasks=TASK_IDS.tolist())).loss
        loss.backward()
        found.append({"loss": loss.detach()} | gradients(model))
    assert model.backbone.training and sum(bool(t is not None and t.any()) for t in found[0].values()) > 1
    torch.testing.assert_close(found[1], found[0], **CLOSE)


@pytest.mark.parametrize("name, linears", [("adapter", ("self_attn.o_proj", "mlp.down_proj")),
                                           ("lora", ("self_attn.q_proj", "self_attn.v_proj"))])
@torch.no_grad()
def test_changes_equal_hooks_on_the_plain_backbone(name, linears, tiny_backbone, opened):
    model, plain = opened(name, rank=3, scale=0.5), tiny_backbone()

    def change(own, module, args, y):
        if name == "lora":
            return y + 0.5 * args[0] @ own.A.T @ own.B.T
        z = y @ own.down.weight.T + own.down.bias
        z = 0.5 * z * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3)))  # gelu
        return y + z @ own.up.weight.T + own.up.bias

    for layer, own in zip(plain.model.layers, model.backbone.model.layers):
        for linear in linears:
            layer.get_submodule(linear).register_forward_hook(partial(change, own.get_submodule(linear)))
    ids, mask = pad(PROMPTS, side="right")
    expected = plain(ids, attention_mask=mask).logits
    torch.testing.assert_close(model(ids, mask, TASK_IDS).logits[mask.bool()], expected[mask.bool()], **CLOSE)


def test_regulariser_and_cosines_of_sums_of_terms(tiny_backbone, opened):
    model = opened("2-terms")
    A = torch.stack([torch.stack([u[n].T @ v[n] for u, v in zip(model.u, model.v)]) for n in range(3)])  # (L, N, r, d)
    cosines = torch.cosine_similarity(A[:, :, None].flatten(3), A[:, None].flatten(3), dim=-1)  # (L, N, N)
    torch.testing.assert_close(model.cosines(), cosines)
    pairs = [cosines[n, i, j] ** 2 for n in range(3) for i in range(3) for j in range(3) if i != j]
    torch.testing.assert_close(model.orthogonality("cosine"), sum(pairs) / len(pairs))
    assert ALL["2-terms"].model(tiny_backbone(), ["only"], TALoRAConfig(5, 2)).orthogonality("cosine") == 0  # no pair
