"""Every method and every variant over tiny random backbones: the same questions to all of them, and one reference each.

Nothing is at zero but where a start is tested: a zero gate or factor hides every bug behind it. Tasks "first" and
"second" are sources, "third" is a target that was added later, as train.py does it.
"""

from functools import partial
from unittest.mock import Mock

import pytest
import torch
from test_model import ANSWERS, CHOICES, CLOSE, PROMPTS, batch, gradients, pad, slow_logits, slow_prefix, soft
from torch import nn
from transformers import AutoModelForCausalLM, Qwen2Config

import train
from baselines import METHODS, VARIANTS
from config import parse
from data import Batch
from frozen import FAMILIES, NO_TASK, TALoRAConfig, positions
from model import TALoRA

ALL = METHODS | VARIANTS
CLASSES = {}  # the first name of every class: pt, spot and spot-nearest differ in what learns, not in what is computed
for name, method in ALL.items():
    CLASSES.setdefault(method.model, name)
EVERY = pytest.mark.parametrize("name", CLASSES.values())
IN_FRONT, CHANGED = ("pt", "mpt", "attempt"), ("adapter", "lora", "bitfit", "ft")
TASK_IDS = torch.tensor([0, 2, 1])


@pytest.fixture
def opened(tiny_backbone):
    """opened(name, backbone=None, **config) -> the method with a target task, all tensors of its own far from 0."""

    def make(name, backbone=None, rank=2, scale=1.0):
        backbone = tiny_backbone() if backbone is None else backbone
        torch.manual_seed(1)
        model = ALL[name].model(backbone, ["first", "second"], TALoRAConfig(5, rank, scale))
        model.add_task("third")
        for own, p in model.adapter_state().items():
            if own.startswith("backbone."):
                p.add_(0.2 * torch.randn(p.shape))
            elif p.is_floating_point() and (name, own) != ("open-gate", "gate"):  # that one is fixed
                p.copy_(torch.where(torch.rand(p.shape) < 0.5, -1.0, 1.0) * (0.3 + torch.rand(p.shape)))
        return model

    return make


@torch.no_grad()
def log_p(model, prompt, answer, task):
    """log-softmax of one unpadded row after its last prompt token and after every answer token, (1 + answer, V).

    `forward` without labels would take the answer for text, which is the same but for attempt: it pools the text.
    """
    ids = torch.tensor([prompt + answer])
    ones = torch.ones_like(ids)
    text = torch.arange(ids.shape[1]).expand(1, -1) < len(prompt)
    hidden = model.hidden(ids, ones, positions(ones), torch.tensor([task]), text)
    logits = model.backbone.lm_head(hidden)[0]
    if model.method != "attempt":
        assert torch.equal(model(ids, ones, torch.tensor([task])).logits[0], logits)
    return logits.log_softmax(-1)[len(prompt) - 1:]


# ------------------------------------------------------------------------------ every method answers the same questions

@EVERY
@torch.no_grad()
def test_neither_padding_nor_the_other_rows_change_a_row(name, opened):
    model = opened(name)
    alone = [log_p(model, row, [], task)[0] for row, task in zip(PROMPTS, TASK_IDS.tolist())]
    for left in (0, 4, 20):
        for rows in ([0], [1, 0], [0, 1, 2], [2, 1, 0, 1]):
            ids, mask = pad([PROMPTS[i] for i in rows], left)
            ids[mask == 0] = 21  # what stands under the mask is of no matter
            together = model(ids, mask, TASK_IDS[rows]).logits[:, -1].log_softmax(-1)
            torch.testing.assert_close(together, torch.stack([alone[i] for i in rows]), **CLOSE)
    other = [log_p(model, PROMPTS[0], [], task)[0] for task in range(3)]
    heard = [(a - b).abs().max() > 0.05 for a, b in zip(other, other[1:])]
    assert heard == [name not in CHANGED + ("side-by-side",)] * 2  # those have nothing of a task's own


@pytest.mark.parametrize("family, name", [(family, name) for family in FAMILIES for name in CLASSES.values()
                                          if name != "bitfit" or family == "qwen2"])  # the only one with biases
def test_scores_are_sums_of_log_probabilities_and_losses_their_means(family, name, tiny_backbone, opened):
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


@EVERY
def test_generate_is_greedy_decoding_step_by_step(name, opened):
    model = opened(name)
    ids, mask = pad(PROMPTS, left=2)
    out = model.generate(ids, mask, TASK_IDS, 6)
    assert out.shape == (3, ids.shape[1] + 6) and torch.equal(out[:, :-6], ids)
    for row, prompt, task in zip(out[:, -6:].tolist(), PROMPTS, TASK_IDS.tolist()):
        assert log_p(model, prompt, row, task)[:-1].argmax(-1).tolist() == row  # the best word after each word so far
    assert model(**batch(answers=out[:, -6:].tolist(), tasks=TASK_IDS.tolist())).correct.all()
    model.backbone.generation_config.eos_token_id = end = int(out[0, -3])  # a row that has ended is filled with padding
    for row, free in zip(model.generate(ids, mask, TASK_IDS, 6)[:, -6:].tolist(), out[:, -6:].tolist()):
        length = free.index(end) + 1 if end in free else 6
        assert row == free[:length] + [0] * (6 - length)


@EVERY
def test_checkpointing_changes_neither_loss_nor_gradients(name, tiny_backbone, opened):
    results = []
    for checkpointing in (False, True):
        backbone = tiny_backbone()
        if checkpointing:  # before wrapping, as train.py does: a copy of the backbone must have it, too
            backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model = opened(name, backbone).train()
        runs = Mock(return_value=None)
        model.backbone.model.layers[0].self_attn.register_forward_pre_hook(runs)
        loss = model(**batch(tasks=TASK_IDS.tolist())).loss
        loss.backward()
        assert runs.call_count == 1 + checkpointing
        results.append((loss.detach(), {n: g for n, g in gradients(model).items() if g is not None}))
    assert results[0][1]
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-4)


@EVERY
def test_what_is_logged_of_an_adapter(name, opened, tiny_backbone):
    """Layer by layer, from the definitions: |tanh g|, the norms of theta0 and of the steps, or of the prompts."""
    model = opened(name)
    logged = model.diagnose()
    assert "step_norms" not in ALL[name].model(tiny_backbone(), [], TALoRAConfig(5, 2)).diagnose(), "no tasks"
    if not hasattr(model, "gate"):
        assert logged == {}
        return
    assert logged["tasks"] == ["first", "second", "third"]
    if name != "one-softmax":
        gates = [model.gate[layer].tanh().abs().mean().item() for layer in range(3)]
        assert logged["gates"] == pytest.approx(gates, abs=1e-5)
    for layer in range(3):
        prompts = [model.prompts([task])[layer, 0] for task in range(3)]  # 3 x (P, d)
        if hasattr(model, "theta0"):
            steps = sum((prompt - model.theta0[layer]).norm().item() for prompt in prompts) / 3
            assert logged["step_norms"][layer] == pytest.approx(steps, rel=1e-4) and steps > 0.1
            assert logged["theta0_norms"][layer] == pytest.approx(model.theta0[layer].norm().item(), rel=1e-4)
        else:
            size = sum(prompt.norm().item() for prompt in prompts) / 3
            assert logged["prompt_norms"][layer] == pytest.approx(size, rel=1e-4)


@pytest.mark.parametrize("name", [name for name in CLASSES.values() if name not in ("bitfit", "ft")])  # see config.py
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
        found, wanted = model.method or "talora", other.method or "talora"
        with pytest.raises(ValueError, match=f"method '{found}' .* should be '{wanted}' "):
            other.load(tmp_path, tiny_backbone)


def test_what_cannot_work_is_refused(tiny_backbone, opened):
    for name in (*IN_FRONT, "deep-pt", "deep-mpt"):
        with pytest.raises(ValueError, match="no task"):
            opened(name)(*pad(PROMPTS), torch.tensor([0, NO_TASK, 1]))
    for family in set(FAMILIES) - {"qwen2"}:
        with pytest.raises(ValueError, match="bitfit: it has no biases"):
            opened("bitfit", tiny_backbone(family))
    model = opened("pt", tiny_backbone("mistral", sliding_window=12))
    model.score(*pad([PROMPTS[0]]), TASK_IDS[:1], [[[4, 1]]])
    with pytest.raises(ValueError, match="take 13 tokens.*sliding window"):  # the prompt takes five of them
        model.score(*pad([PROMPTS[0]]), TASK_IDS[:1], [[[4, 1, 2]]])


# ---------------------------------------------------------------------------------------------- the start, and training

@EVERY
@torch.no_grad()
def test_what_is_computed_before_training(name, tiny_backbone):
    backbone = tiny_backbone()
    ids, mask = pad(PROMPTS, left=3)
    plain = backbone(ids, attention_mask=mask, position_ids=positions(mask)).logits
    model = ALL[name].model(backbone, ["a", "b", "c"], TALoRAConfig(5, 2))
    logits = model(ids, mask, TASK_IDS).logits
    if name in ("open-gate", "one-softmax", *IN_FRONT):  # a prompt is heard from the first step
        assert (logits - plain).abs().max() > 0.1
    else:
        assert torch.equal(logits, plain)
    if name == "open-gate":
        assert (model.gate.tanh() == 1).all()
    if name in ("mpt", "deep-mpt"):  # every task starts at P*
        with_text = (torch.tensor([0, 1]), None, None) if name == "mpt" else ()
        assert (model.prompts([0, 2], *with_text) == model.shared.unsqueeze(-3)).all()
    if name in IN_FRONT:  # words of the vocabulary, far better than noise
        words = backbone.get_input_embeddings().weight
        assert all((words == row).all(1).any() for row in (model.shared if name == "mpt" else model.prompt[1]))
    assert torch.equal(backbone(ids, attention_mask=mask, position_ids=positions(mask)).logits, plain)


@pytest.mark.parametrize("name", ALL)
def test_in_every_stage_what_should_learn_does_by_the_third_step_and_nothing_else(name, tiny_backbone):
    """The stages one after another as train.py runs them, with the method's own table, optimizer and step."""
    torch.manual_seed(0)
    method, backbone = ALL[name], tiny_backbone()
    cfg = parse(["--method", name] if name in METHODS else ["--variant", name])[0]
    sources = ["a", "b", "c"] if method.per_task else ["all"]
    model = method.model(backbone, sources, TALoRAConfig(5, cfg.rank, cfg.scale, cfg.gate_per_head))
    for stage in method.stages:
        ids = [NO_TASK] if stage == "base" else list(range(len(sources)))
        if stage == "target" and method.per_task:
            ids = [model.add_task("target")]
            model.copy_task(1, ids[0])
        learns = train.learning_tensors(model, method, stage, ids)
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
    given = {t.data_ptr() for t in backbone.parameters()}
    model = opened(name, backbone)
    for own, p in model.named_parameters():
        assert (p.data_ptr() in given) == (own not in model.adapter_state()), own
    assert (model.backbone.lm_head.weight is model.backbone.get_input_embeddings().weight) == tied


# --------------------------------------------------------------------------------------------------- one reference each

def slow_prompt(model, name, task, n):
    """The prompt of a task in layer n, (P, d) (all tasks' under one another for side-by-side), term by term."""
    if name.startswith("deep"):
        return model.shared[n] * torch.outer(model.u[task][n], model.v[task][n]) if name == "deep-mpt" else \
            model.prompt[task][n]
    if name == "side-by-side":
        return torch.cat([slow_prompt(model, "talora", i, n) for i in range(3)])
    B = model.B[task][n] if name == "own-b" else model.B[n]
    u, v = (f[task][n].view(-1, f[task].shape[-1]) for f in (model.u, model.v))  # (terms, r), (terms, d)
    assert len(u) == {"2-terms": 2, "4-terms": 4}.get(name, 1)
    return model.theta0[n] + sum(model.config.scale * B @ torch.outer(u_t, v_t) for u_t, v_t in zip(u, v))


@pytest.mark.parametrize("name", [name for model, name in CLASSES.items() if issubclass(model, TALoRA)])
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

    ids, mask = pad(PROMPTS)
    logits = model(ids, mask, TASK_IDS).logits
    for b, task in enumerate(TASK_IDS.tolist()):
        slow = slow_logits(model.backbone, PROMPTS[b], partial(mix, task))
        torch.testing.assert_close(logits[b][mask[b].bool()], slow, **CLOSE)


@pytest.mark.parametrize("name", IN_FRONT)
@torch.no_grad()
def test_prompts_at_the_input_equal_a_slow_reference(name, opened):
    model = opened(name, rank=3)
    if name == "attempt":
        model.prompt[0][:, ::2] *= 40  # tau is large: prompts of one size are mixed nearly equally, whatever the text
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

    ids, mask = pad(PROMPTS)
    logits = model(ids, mask, TASK_IDS).logits
    for b, task in enumerate(TASK_IDS.tolist()):
        words = embed(torch.tensor(PROMPTS[b]))  # (T, d)
        if name == "mpt":
            prompt = model.shared * torch.outer(model.u[task], model.v[task])
        else:  # a source task of attempt uses its prompt as it is
            prompt = attempt(words) if (name, task) == ("attempt", 2) else model.prompt[task]
        slow = model.backbone(inputs_embeds=torch.cat([prompt, words])[None]).logits[0, 5:]
        torch.testing.assert_close(logits[b][mask[b].bool()], slow, **CLOSE)


def test_the_mixture_of_attempt_sees_the_text_alone(opened, monkeypatch):
    """Neither an answer in training, nor candidates, nor what was generated, nor padding decides which prompts join."""
    model, seen = opened("attempt"), []
    model.prompt[0].data[:, ::2] *= 40
    inputs = model.inputs
    monkeypatch.setattr(model, "inputs", lambda *args: (seen.append(inputs(*args)), seen[-1].copy())[1])
    tasks = torch.tensor([2, 2, 2])
    for left in (0, 7):
        ids, mask = pad(PROMPTS, left)
        ids[mask == 0] = 33
        model(ids, mask, tasks)
        model.score(ids, mask, tasks, CHOICES)
        model.generate(ids, mask, tasks, 3)
    for answers in (ANSWERS, [[52] * 9, [30, 31], [1]]):
        for side in ("left", "right"):
            model(**batch(answers=answers, tasks=(2, 2, 2), side=side))
    prompts = [given["inputs_embeds"][:, :5].detach() for given in seen]
    assert len(prompts) == 10 and (prompts[0][0] - prompts[0][1]).abs().max() > 0.1  # each text has its own
    for prompt in prompts[1:]:
        torch.testing.assert_close(prompt, prompts[0])


@pytest.mark.parametrize("name, places", [("lora", ("self_attn.q_proj", "self_attn.v_proj")),
                                          ("adapter", ("self_attn.o_proj", "mlp.down_proj"))])
@torch.no_grad()
def test_changed_layers_equal_hooks_on_the_plain_backbone(name, places, tiny_backbone, opened):
    model, plain = opened(name, rank=3, scale=0.7), tiny_backbone()

    def change(own, module, args, y):
        if name == "lora":
            return y + 0.7 * args[0] @ (own.B @ own.A).T
        z = y @ own.down.weight.T + own.down.bias
        z = 0.5 * z * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3)))  # gelu
        return y + z @ own.up.weight.T + own.up.bias

    for layer, own in zip(plain.model.layers, model.backbone.model.layers):
        for place in places:
            layer.get_submodule(place).register_forward_hook(partial(change, own.get_submodule(place)))
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


# --------------------------------------------------------------------------------------------------------------- counts

def closed_forms(L, d, Hh, Kh, f, V, P, r):
    """Numbers that learn on a target; Hh and Kh are the widths of all query and of all key heads, f the MLP's."""
    return {
        "ft": L * (d * Hh + Hh + 2 * (d * Kh + Kh) + Hh * d + 3 * d * f + 2 * d) + 2 * V * d + d,
        "adapter": 2 * L * (2 * d * r + r + d), "lora": L * (r * (d + Hh) + r * (d + Kh)), "bitfit": L * (Hh + 2 * Kh),
        "pt": P * d, "spot": P * d, "mpt": P * d + P + d, "attempt": P * d + 2 * r * d,
        "deep-pt": L * P * d + L, "deep-mpt": L * (P + d),
        "talora": L * (r + d), "own-b": L * (P * r + r + d), "2-terms": 2 * L * (r + d),
    }


AT_7B = {  # name: prompt length, rank, numbers
    "ft": (12, 8, 7_615_616_512), "adapter": (12, 64, 25_894_400), "lora": (12, 8, 2_523_136),
    "bitfit": (12, 8, 129_024), "pt": (100, 8, 358_400), "spot": (100, 8, 358_400), "mpt": (100, 8, 362_084),
    "attempt": (100, 100, 1_075_200), "deep-pt": (12, 8, 1_204_252), "deep-mpt": (12, 8, 100_688),
    "talora": (12, 8, 100_576), "own-b": (12, 8, 103_264), "2-terms": (12, 8, 201_152),
}


@pytest.fixture(scope="module")
def backbone_7b():
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(Qwen2Config(
            hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
            num_key_value_heads=4, vocab_size=152064, tie_word_embeddings=False))


@pytest.mark.parametrize("name", AT_7B)
def test_numbers_that_learn_on_a_target(name, tiny_backbone, backbone_7b):
    assert closed_forms(28, 3584, 3584, 512, 18944, 152064, *AT_7B[name][:2])[name] == AT_7B[name][2]
    tiny = closed_forms(3, 32, 32, 16, 48, 53, 5, 2)[name]
    for backbone, P, r, count in ((tiny_backbone(), 5, 2, tiny), (backbone_7b, *AT_7B[name])):
        model = ALL[name].model(backbone, ["source"], TALoRAConfig(P, r))
        task = model.add_task("target") if ALL[name].per_task else 0
        assert train.count(model, train.learning_tensors(model, ALL[name], "target", [task])) == count


# --------------------------------------------------------------------------------------- a second opinion, if installed

@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft's own
@pytest.mark.parametrize("name", ["pt", "mpt", "lora"])
@torch.no_grad()
def test_the_same_weights_in_peft_give_the_same_logits(name, tiny_backbone, opened):
    peft = pytest.importorskip("peft", reason="pip install peft, to compare our forward passes with another program's")
    model, shape = opened(name, rank=8), dict(task_type="CAUSAL_LM")
    if name == "lora":
        theirs = peft.get_peft_model(tiny_backbone(), peft.LoraConfig(
            r=8, lora_alpha=8, target_modules=["q_proj", "v_proj"], **shape)).eval()
        for layer, own in zip(theirs.base_model.model.model.layers, model.backbone.model.layers):
            for linear in ("q_proj", "v_proj"):
                pair, change = getattr(layer.self_attn, linear), getattr(own.self_attn, linear)
                pair.lora_A.default.weight.copy_(change.A), pair.lora_B.default.weight.copy_(change.B)
    else:
        shape |= dict(num_virtual_tokens=5, token_dim=32, num_transformer_submodules=1, num_attention_heads=4,
                      num_layers=3)
        settings = peft.PromptTuningConfig(**shape) if name == "pt" else peft.MultitaskPromptTuningConfig(
            num_tasks=3, num_ranks=1, **shape)
        theirs = peft.get_peft_model(tiny_backbone(), settings).eval()
        encoder = theirs.prompt_encoder.default
        encoder.embedding.weight.copy_(model.shared if name == "mpt" else model.prompt[1])
        if name == "mpt":
            encoder.prefix_task_cols.copy_(torch.stack([*model.u]).unsqueeze(-1))
            encoder.prefix_task_rows.copy_(torch.stack([*model.v]).unsqueeze(-2))
    for row in PROMPTS:  # one at a time: peft puts a prompt before left padding, but counts positions with it
        ids, task = torch.tensor([row]), torch.tensor([1])
        given = dict(task_ids=task) if name == "mpt" else {}
        expected = theirs(input_ids=ids, attention_mask=torch.ones_like(ids), **given).logits[:, -len(row):]
        torch.testing.assert_close(model(ids, torch.ones_like(ids), task).logits, expected, **CLOSE)


def test_what_would_be_silently_wrong_is_refused(tiny_backbone, opened):
    model = opened("pt", tiny_backbone("mistral", sliding_window=12))
    with pytest.raises(ValueError, match="sliding window is 12"):
        model(*pad(PROMPTS), TASK_IDS)  # 5 + 8 tokens
    with pytest.raises(ValueError, match="with and without a task"):
        opened("side-by-side")(*pad(PROMPTS), torch.tensor([0, NO_TASK, 1]))
    model = opened("own-b")
    with pytest.raises(ValueError, match="third"):
        model.add_task("third")
    assert len(model.B) == len(model.u) == len(model.tasks) == 3
