"""TALoRA over tiny random backbones. After the first test every gate is open: a zero gate hides every bug behind it."""

import json
import math
from unittest.mock import Mock

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, GPT2Config, Phi3Config, Qwen2Config

import gating
import toy
from gating import prefix_key_value
from model import FAMILIES, NO_TASK, TALoRA, TALoRAConfig, describe, positions

CLOSE = dict(atol=2e-4, rtol=1e-4)  # fp32, logits of size 10
PROMPTS = [[7, 11, 3, 29, 41, 5], [17, 2, 2, 31], [9, 44, 23, 8, 50, 6, 12, 33]]
ANSWERS = [[4, 19, 38], [25], [13, 46, 13, 1, 40]]


def pad(rows, left=0, side="left"):
    """Token lists -> input_ids, attention_mask (B, T), with ``left`` columns of padding more than needed."""
    width = left + max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), width, dtype=torch.long)
    for b, row in enumerate(rows):
        start = width - len(row) if side == "left" else 0
        ids[b, start:start + len(row)] = torch.tensor(row)
        mask[b, start:start + len(row)] = 1
    return ids, mask


def batch(prompts=PROMPTS, answers=ANSWERS, tasks=(0, 1, 2), side="right", left=0):
    """Rows with answers of different lengths, as forward takes them; labels are -100 outside of the answer."""
    ids, mask = pad([p + a for p, a in zip(prompts, answers)], left, side)
    labels = torch.full_like(ids, -100)
    for b, (prompt, answer) in enumerate(zip(prompts, answers)):
        start = int(mask[b].nonzero()[0]) + len(prompt)
        labels[b, start:start + len(answer)] = torch.tensor(answer)
    return dict(input_ids=ids, attention_mask=mask, task_ids=torch.tensor(tasks), labels=labels)


def rotate(x, position, theta):
    """Rotary embedding of one vector (h,), written out pair by pair."""
    half, out = len(x) // 2, x.clone()
    for i in range(half):
        angle = torch.tensor(position * theta ** (-i / half))
        out[i] = x[i] * angle.cos() - x[i + half] * angle.sin()
        out[i + half] = x[i + half] * angle.cos() + x[i] * angle.sin()
    return out


def slow_logits(backbone, tokens, mix):
    """The whole forward pass of one unpadded row, head by head and token by token; -> (T, V).

    mix(n, head, query, K, V) -> (h,) is what a token takes in layer n from the text so far, and from what else there
    is. Uses the backbone's linear layers and norms, and no attention of the library.
    """
    config, T = backbone.config, len(tokens)
    H, K, base = config.num_attention_heads, config.num_key_value_heads, config.rope_parameters["rope_theta"]
    x = backbone.model.embed_tokens(torch.tensor(tokens))  # (T, d)
    for n, layer in enumerate(backbone.model.layers):
        attend, normed = layer.self_attn, layer.input_layernorm(x)
        q, k, v = (f(normed).view(T, -1, attend.head_dim) for f in (attend.q_proj, attend.k_proj, attend.v_proj))
        if hasattr(attend, "q_norm"):  # Qwen3
            q, k = attend.q_norm(q), attend.k_norm(k)
        heads = torch.zeros(T, H, attend.head_dim)
        for head in range(H):
            group = head // (H // K)
            keys = torch.stack([rotate(k[t, group], t, base) for t in range(T)])  # (T, h)
            for t in range(T):
                heads[t, head] = mix(n, head, rotate(q[t, head], t, base), keys[:t + 1], v[:t + 1, group])
        x = x + attend.o_proj(heads.flatten(1))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return backbone.lm_head(backbone.model.norm(x))


def soft(query, K, V):
    return (K @ query / len(query)**0.5).softmax(0) @ V


def slow_prefix(backbone, n, head, theta):
    """Keys and values of a prompt for one head of layer n; theta (P, d) -> (P, h) x 2."""
    config, attend = backbone.config, backbone.model.layers[n].self_attn
    group = head // (config.num_attention_heads // config.num_key_value_heads)
    K, V = (f(theta).view(len(theta), -1, attend.head_dim)[:, group] for f in (attend.k_proj, attend.v_proj))
    return (attend.k_norm(K) if hasattr(attend, "k_norm") else K), V  # Qwen3


def reference_logits(model, tokens, task):
    """The forward pass of TA-LoRA, slowly; uses nothing of gating.py or lowrank.py."""
    def mix(n, head, query, K, V):
        theta = model.theta0[n]  # (P, d)
        if task != NO_TASK:
            theta = theta + model.config.scale * model.B[n] @ torch.outer(model.u[task][n], model.v[task][n])
        gate = model.gate[n].tanh().expand(model.backbone.config.num_attention_heads)[head]
        return soft(query, K, V) + gate * soft(query, *slow_prefix(model.backbone, n, head, theta))

    return slow_logits(model.backbone, tokens, mix)


def gradients(model):
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def greedy_step_by_step(model, ids, mask, tasks, steps):
    """Greedy decoding with the whole text in every step and no cache; -> (B, T + steps)."""
    for _ in range(steps):
        with torch.no_grad():
            token = model(ids, mask, tasks).logits[:, -1].argmax(-1, keepdim=True)
        ids, mask = torch.cat([ids, token], 1), torch.cat([mask, torch.ones_like(token)], 1)
    return ids


# ---------------------------------------------------------------------------------------------------- the forward pass

@pytest.mark.parametrize("family", FAMILIES)
def test_zero_gates_are_the_backbone_bitwise(family, tiny_backbone):
    backbone = tiny_backbone(family)
    ids, mask = pad(PROMPTS, left=3)
    before = backbone(ids, attention_mask=mask, position_ids=positions(mask)).logits
    model = TALoRA(backbone, ["a", "b"])
    assert torch.equal(model(ids, mask, torch.tensor([0, 1, NO_TASK])).logits, before)
    assert torch.equal(backbone(ids, attention_mask=mask, position_ids=positions(mask)).logits, before)


@torch.no_grad()
@pytest.mark.parametrize("gate_per_head", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_open_gates_equal_a_slow_reference(family, gate_per_head, tiny_backbone, open_adapter):
    model = open_adapter(tiny_backbone(family), scale=0.7, gate_per_head=gate_per_head)
    plain = model.backbone(torch.tensor(PROMPTS[:1])).logits[0]
    for side in ("left", "right"):
        ids, mask = pad(PROMPTS, side=side)
        tasks = [2, NO_TASK, 0]
        logits = model(ids, mask, torch.tensor(tasks)).logits
        assert logits.isfinite().all()
        for b, (tokens, task) in enumerate(zip(PROMPTS, tasks)):
            torch.testing.assert_close(logits[b][mask[b].bool()], reference_logits(model, tokens, task), **CLOSE)
    assert (reference_logits(model, PROMPTS[0], 2) - plain).abs().mean() > 0.1  # the prompt is heard


def test_qwen3_prompt_keys_pass_the_key_norm(tiny_backbone):
    layer = tiny_backbone("qwen3").model.layers[1].self_attn
    theta = torch.randn(2, 5, 32)
    K_theta, V_theta = prefix_key_value(layer, theta)
    keys = layer.k_proj(theta).view(2, 5, 2, 8)
    keys = layer.k_norm.weight * keys / (keys.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(K_theta, keys.transpose(1, 2))
    torch.testing.assert_close(V_theta, layer.v_proj(theta).view(2, 5, 2, 8).transpose(1, 2))


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_batch_of_tasks_equals_single_calls(family, tiny_backbone, open_adapter):
    model = open_adapter(tiny_backbone(family))
    rows, tasks = [PROMPTS[0]] * 4 + PROMPTS, [0, 1, 2, NO_TASK, 1, NO_TASK, 1]
    ids, mask = pad(rows)
    logits = model(ids, mask, torch.tensor(tasks)).logits[:, -1]
    for row, task, together in zip(rows, tasks, logits):
        alone = model(torch.tensor([row]), torch.ones(1, len(row)).long(), torch.tensor([task])).logits[0, -1]
        torch.testing.assert_close(together, alone, **CLOSE)
    for i in range(4):
        for j in range(i):
            assert (logits[i] - logits[j]).abs().max() > 0.1, "different tasks must answer differently"


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("left", [0, 4, 20])
def test_left_padding_changes_nothing(left, family, tiny_backbone, open_adapter):
    model = open_adapter(tiny_backbone(family))
    for row, task in zip(PROMPTS, (1, NO_TASK, 2)):
        ids, tasks = torch.tensor([row]), torch.tensor([task])
        alone = model(ids, torch.ones_like(ids), tasks).logits[0, -1]
        text = model.generate(ids, torch.ones_like(ids), tasks, 5)[0, -5:]
        for rows in ([row], [row, PROMPTS[2], [3]]):
            ids, mask = pad(rows, left)
            ids[mask == 0] = 21  # what stands under the mask is of no matter
            tasks = torch.tensor([task] + [0] * (len(rows) - 1))
            torch.testing.assert_close(model(ids, mask, tasks).logits[0, -1], alone, **CLOSE)
            assert torch.equal(model.generate(ids, mask, tasks, 5)[0, -5:], text)


# --------------------------------------------------------------------------------------------------------------- loss

@torch.no_grad()
def test_loss_is_the_mean_over_examples_of_the_mean_over_answer_tokens(tiny_backbone, open_adapter):
    model = open_adapter(tiny_backbone())
    expected = []
    for prompt, answer, task in zip(PROMPTS, ANSWERS, (0, 1, 2)):
        log_p = reference_logits(model, prompt + answer, task).log_softmax(-1)
        expected.append(-sum(log_p[len(prompt) - 1 + i, token] for i, token in enumerate(answer)) / len(answer))
    expected = torch.stack(expected)
    for side, left in (("right", 0), ("left", 0), ("left", 4)):
        out = model(**batch(side=side, left=left))
        torch.testing.assert_close(out.losses, expected, **CLOSE)
        torch.testing.assert_close(out.loss, expected.mean(), **CLOSE)
    tokens = sum(map(len, ANSWERS))
    assert (expected.mean() - sum(e * len(a) for e, a in zip(expected, ANSWERS)) / tokens).abs() > 0.01


@torch.no_grad()
def test_correct_is_what_greedy_decoding_gives(tiny_backbone, open_adapter):
    model = open_adapter(tiny_backbone())
    ids, mask = pad(PROMPTS)
    greedy = model.generate(ids, mask, torch.tensor([0, 1, 2]), 4)[:, -4:].tolist()
    assert model(**batch(answers=greedy)).correct.tolist() == [True, True, True]
    for place in range(4):
        wrong = [list(answer) for answer in greedy]
        wrong[1][place] = (wrong[1][place] + 1) % 53
        assert model(**batch(answers=wrong)).correct.tolist() == [True, False, True]
    assert model(**batch(answers=[g[:1] for g in greedy])).correct.all()


def test_a_row_without_an_answer_is_refused(tiny_backbone, open_adapter):
    rows = batch()
    rows["labels"][1] = -100
    with pytest.raises(ValueError, match="row 1 .*no answer token"):
        open_adapter(tiny_backbone())(**rows)


# ----------------------------------------------------------------------------------------------------------- gradients

@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_changes_neither_loss_nor_gradients(family, tiny_backbone, open_adapter):
    results = []
    for checkpointing in (False, True):
        model = open_adapter(tiny_backbone(family))
        if checkpointing:
            model.backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        runs = Mock(return_value=None)
        model.backbone.model.layers[0].self_attn.register_forward_pre_hook(runs)
        loss = model(**batch()).loss
        loss.backward()
        assert runs.call_count == 1 + checkpointing  # the layer really runs a second time
        results.append((loss.detach(), gradients(model)))
    torch.testing.assert_close(results[0], results[1], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("between", ["other tasks", "other adapter", "generate", "score", "plain backbone", "no grad"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_runs_between_forward_and_backward_changes_no_gradient(checkpointing, between, tiny_backbone,
                                                                    open_adapter):
    backbone = tiny_backbone()
    if checkpointing:
        backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model, other = open_adapter(backbone), open_adapter(backbone, seed=7, gate_per_head=True, prompt_length=3)
    model.train(), other.train()
    ids, mask = pad(PROMPTS)
    tasks = torch.tensor([2, NO_TASK, 1])
    model(**batch()).loss.backward()
    expected = gradients(model)
    model.zero_grad()

    loss = model(**batch()).loss
    if between == "other tasks":
        model(ids, mask, tasks)
    elif between == "other adapter":
        other(**batch(tasks=(2, 2, 1)))
    elif between == "generate":
        model.generate(ids, mask, tasks, 3)
    elif between == "score":
        model.score(ids, mask, tasks, [[[1, 2]]] * 3)
    elif between == "plain backbone":
        backbone(ids, attention_mask=mask)
    else:
        with torch.no_grad():
            model(**batch(tasks=(2, 0, 1)))
    loss.backward()
    for name, gradient in gradients(model).items():
        assert torch.equal(gradient, expected[name]), name


def test_in_the_first_step_only_the_gates_learn_and_by_the_third_everything(tiny_backbone):
    torch.manual_seed(0)
    model = TALoRA(tiny_backbone(), ["a", "b", "c"], TALoRAConfig(prompt_length=5, rank=2))
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2, weight_decay=0.0)
    for step in range(1, 5):
        optimizer.zero_grad()
        model(**batch()).loss.backward()
        size = {name: g.abs().max() for name, g in gradients(model).items()}
        if step == 1:
            assert [name for name, g in size.items() if g > 0] == ["gate"]
        if step == 3:
            assert all(g > 0 for g in size.values()), size
        optimizer.step()
    for name, p in model.named_parameters():
        assert torch.equal(p, start[name]) == name.startswith("backbone."), name


def test_gradients_are_those_of_finite_differences(tiny_backbone, open_adapter):
    model = open_adapter(tiny_backbone())
    model(**batch()).loss.backward()
    for name in ("theta0", "B", "gate", "u.1", "v.1"):
        p = model.get_parameter(name)
        direction = torch.sign(p.grad)
        losses = []
        for step in (1e-3, -2e-3):
            with torch.no_grad():
                p += step * direction
                losses.append(model(**batch()).loss)
        with torch.no_grad():
            p += 1e-3 * direction
        torch.testing.assert_close((losses[0] - losses[1]) / 2e-3, p.grad.abs().sum(), atol=2e-2, rtol=2e-2)


def test_validation_between_steps_changes_nothing(tiny_backbone):
    def train(validate):
        torch.manual_seed(0)
        model = TALoRA(tiny_backbone(), ["a", "b", "c"], TALoRAConfig(prompt_length=5, rank=2)).train()
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
        ids, mask = pad(PROMPTS)
        for _ in range(4):
            if validate:
                with torch.no_grad():
                    model(**batch())
                model.generate(ids, mask, torch.tensor([0, 1, 2]), 3)
                model.score(ids, mask, torch.tensor([0, 1, 2]), [[[1, 2], [3]]] * 3)
            optimizer.zero_grad()
            model(**batch()).loss.backward()
            optimizer.step()
        return model.adapter_state()

    plain, validated = train(False), train(True)
    for name in plain:
        assert torch.equal(plain[name], validated[name]), name


def test_factors_of_an_absent_task_do_not_move(tiny_backbone, open_adapter):
    model = open_adapter(tiny_backbone())
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2, weight_decay=0.1)
    for tasks in ((0, 1, 1), (0, 1, 2), (0, 2, 0), (2, 0, 0), (NO_TASK, 0, 2)):
        before = {name: p.detach().clone() for name, p in model.adapter_state().items()}
        optimizer.zero_grad()
        model(**batch(tasks=tasks)).loss.backward()
        optimizer.step()
        for name, p in model.adapter_state().items():
            absent = name[0] in "uv" and int(name[2:]) not in tasks
            assert torch.equal(p, before[name]) == absent, (name, tasks)


def test_frozen_weights_are_bitwise_unchanged_by_training(tiny_backbone, open_adapter):
    backbone = tiny_backbone()
    before = {name: t.clone() for name, t in backbone.state_dict().items()}
    model = open_adapter(backbone)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)  # all of them, on purpose
    for _ in range(3):
        optimizer.zero_grad()
        model(**batch()).loss.backward()
        optimizer.step()
    for name, t in backbone.state_dict().items():
        assert torch.equal(t, before[name]), name
    assert all(p.grad is None for p in backbone.parameters())


def test_two_steps_on_one_batch_without_a_rate_have_equal_gradients(tiny_backbone, open_adapter):
    model = open_adapter(tiny_backbone())
    seen = []
    for _ in range(2):
        model.zero_grad()
        model(**batch()).loss.backward()
        seen.append(gradients(model))
    for name, gradient in seen[0].items():
        assert torch.equal(gradient, seen[1][name]), name


def test_one_batch_can_be_learned_by_heart(tiny_backbone):
    torch.manual_seed(0)
    model = TALoRA(tiny_backbone(), ["a", "b", "c"], TALoRAConfig(prompt_length=8, rank=4))
    optimizer = torch.optim.Adam(trainable(model), lr=3e-2)
    rows = batch([PROMPTS[0]] * 3, ANSWERS)  # one text, three answers: only the task tells them apart
    first = float(model(**rows).loss.detach())
    for _ in range(200):
        optimizer.zero_grad()
        loss = model(**rows).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trainable(model), 1.0)
        optimizer.step()
    assert first > 2 and loss < 0.05
    assert model(**rows).correct.all()


# ------------------------------------------------------------------------------------------- what is shared, and counts

def test_the_steps_of_all_tasks_lie_in_the_columns_of_one_b(tiny_backbone, open_adapter):
    rank, names = 2, ["a", "b", "c", "d", "e", "f"]
    model = open_adapter(tiny_backbone(), tasks=names, prompt_length=8, rank=rank)
    prefix = model.prefix(torch.tensor([NO_TASK, *range(len(names))]), len(names) + 1)
    for _, V, _ in prefix:
        steps = (V[1:] - V[:1]).permute(2, 0, 1, 3)  # (P, N, K, h): v_proj(theta_i) - v_proj(theta0), the bias cancels
        singular = torch.linalg.svdvals(steps.flatten(1))
        assert singular[rank - 1] > 1e-2 * singular[0] and singular[rank] < 1e-4 * singular[0]
        for i in range(len(names)):
            singular = torch.linalg.svdvals(steps[:, i].flatten(1))
            assert singular[1] < 1e-4 * singular[0]  # one task: rank 1, whatever r is


def test_a_forward_computes_only_what_is_needed(tiny_backbone, open_adapter):
    model = open_adapter(tiny_backbone())
    projected, asked = Mock(return_value=None), Mock(return_value=None)
    model.backbone.model.layers[1].self_attn.k_proj.register_forward_pre_hook(projected)
    model.backbone.lm_head.register_forward_pre_hook(asked)
    model(**batch([PROMPTS[0]] * 5, [ANSWERS[0]] * 5, tasks=(2, 0, 2, 2, 0)))
    shapes = [tuple(call.args[1][0].shape) for call in projected.call_args_list]
    assert sorted(shapes) == [(2, 5, 32), (5, 9, 32)]  # the prompts of two tasks once, and the text
    assert asked.call_args.args[1][0].shape == (5 * 3, 32)  # the states that predict an answer token, no other


def test_without_tasks_theta0_and_gates_can_be_trained_alone(tiny_backbone, open_adapter):
    model = open_adapter(tiny_backbone(), tasks=[])
    model(**batch(tasks=(NO_TASK,) * 3)).loss.backward()
    assert (model.theta0.grad != 0).any() and (model.gate.grad != 0).all()
    assert model.B.grad is None or not model.B.grad.any()


def test_all_prompts_of_a_task_meet_in_theta0(tiny_backbone, open_adapter):
    model = open_adapter(tiny_backbone())
    with torch.no_grad():
        model.u[1].zero_()
    ids = torch.tensor([PROMPTS[0]] * 3)
    logits = model(ids, torch.ones_like(ids), torch.tensor([1, NO_TASK, 0])).logits
    assert torch.equal(logits[0], logits[1]) and not torch.equal(logits[0], logits[2])


@pytest.mark.parametrize("tasks", [0, 1, 3])
@pytest.mark.parametrize("P, r, gate_per_head", [(1, 1, False), (5, 2, True), (12, 8, False), (3, 7, True)])
def test_the_number_of_trainable_parameters_is_the_closed_form(P, r, gate_per_head, tasks, tiny_backbone):
    model = TALoRA(tiny_backbone(), [f"task {i}" for i in range(tasks)], TALoRAConfig(P, r, 1.0, gate_per_head))
    L, d, H = 3, 32, 4
    count = L * P * d + L * P * r + tasks * L * (r + d) + L * (H if gate_per_head else 1)
    assert sum(p.numel() for p in trainable(model)) == count
    assert sum(t.numel() for t in model.adapter_state().values()) == count


def test_1307516_parameters_at_7b():
    shape = Qwen2Config(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
                        num_key_value_heads=4, vocab_size=152064, tie_word_embeddings=False)
    with torch.device("meta"):
        backbone = AutoModelForCausalLM.from_config(shape)
    model = TALoRA(backbone, ["one"])
    assert sum(p.numel() for p in trainable(model)) == 1_307_516
    assert sum(p.numel() for p in backbone.parameters()) == 7_615_616_512
    model.add_task("two")
    assert sum(p.numel() for p in trainable(model)) == 1_307_516 + 100_576


def test_parameter_names_carry_the_symbols(tiny_backbone):
    model = TALoRA(tiny_backbone(), ["a", "b"], TALoRAConfig(prompt_length=5, rank=2, gate_per_head=True))
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    assert shapes == {"theta0": (3, 5, 32), "B": (3, 5, 2), "gate": (3, 4),
                      "u.0": (3, 2), "v.0": (3, 32), "u.1": (3, 2), "v.1": (3, 32)}
    assert all(p.dtype == torch.float32 for p in trainable(model))


def test_a_new_model_has_exactly_one_zero_factor(tiny_backbone):
    torch.manual_seed(0)
    model = TALoRA(tiny_backbone(), ["a"], TALoRAConfig(prompt_length=64, rank=16))
    assert (model.gate == 0).all()
    for name in ("theta0", "B", "u.0", "v.0"):
        assert (model.get_parameter(name) != 0).all(), name
    assert float(model.B.detach().var()) == pytest.approx(1 / 16, rel=0.1)
    assert float(model.u[0].detach().var()) == pytest.approx(1 / 16, rel=0.5)
    assert model.v[0].std() < 0.1


# -------------------------------------------------------------------------------------------------- generate and score

@pytest.mark.parametrize("family", FAMILIES)
def test_generate_with_a_cache_equals_step_by_step_without(family, tiny_backbone, open_adapter):
    model = open_adapter(tiny_backbone(family))
    ids, mask = pad(PROMPTS, left=2)
    tasks = torch.tensor([1, NO_TASK, 2])
    out = model.generate(ids, mask, tasks, 10)
    assert out.shape == (3, ids.shape[1] + 10)
    assert torch.equal(out, greedy_step_by_step(model, ids, mask, tasks, 10))
    assert not torch.equal(out, model.generate(ids, mask, torch.tensor([0, 0, 0]), 10))  # and the tasks are heard


@pytest.mark.parametrize("several", [False, True])
def test_generate_pads_after_the_end_of_a_row(several, tiny_backbone, open_adapter):
    model = open_adapter(tiny_backbone())
    ids, mask = pad(PROMPTS)
    T, tasks = ids.shape[1], torch.tensor([0, 1, 2])
    free = model.generate(ids, mask, tasks, 10)
    eos = int(free[0, T + 2])
    settings = model.backbone.generation_config
    stops = [eos, int(free[1, T + 4])] if several else [eos]
    settings.eos_token_id, settings.pad_token_id = stops if several else eos, 51
    out = model.generate(ids, mask, tasks, 10)
    assert out.shape == free.shape
    ends = []
    for row, expected in zip(out[:, T:].tolist(), free[:, T:].tolist()):
        ends.append(next((i + 1 for i, token in enumerate(expected) if token in stops), 10))
        assert row == expected[:ends[-1]] + [51] * (10 - ends[-1])
    assert len(set(ends)) > 1  # rows end at different places
    alone = model.generate(ids[:1], mask[:1], tasks[:1], 10)  # every row has ended early: still T + 10 columns
    assert torch.equal(alone, out[:1]) and out[0, -1] == 51


def test_generate_ignores_the_settings_of_the_backbone_and_leaves_them(tiny_backbone, open_adapter):
    model = open_adapter(tiny_backbone())
    ids, mask = pad(PROMPTS)
    tasks = torch.tensor([0, 1, NO_TASK])
    expected = model.generate(ids, mask, tasks, 8)
    own = GenerationConfig(do_sample=True, temperature=9.0, top_k=3, top_p=0.5, repetition_penalty=5.0, max_length=3,
                           min_new_tokens=2, no_repeat_ngram_size=1, pad_token_id=0, use_cache=False,
                           suppress_tokens=expected[:, -8:].flatten().tolist())
    model.backbone.generation_config, told = own, own.to_dict()
    for training in (True, False):
        model.train(training)
        assert torch.equal(model.generate(ids, mask, tasks, 8), expected)
        assert model.backbone.generation_config is own and own.to_dict() == told
        assert model.training == training and all(m.training == training for m in model.backbone.modules())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.backbone.modules())


def test_generate_cleans_up_after_an_error(tiny_backbone, open_adapter, monkeypatch):
    model = open_adapter(tiny_backbone()).train()
    own = model.backbone.generation_config
    monkeypatch.setattr(model.backbone.lm_head, "forward", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.generate(*pad(PROMPTS), torch.tensor([0, 1, 2]), 2)
    assert model.backbone.generation_config is own and model.backbone.training
    assert not any(m._forward_pre_hooks for m in model.backbone.modules())


def test_generate_refuses_right_padding(tiny_backbone, open_adapter):
    ids, mask = pad(PROMPTS, side="right")
    with pytest.raises(ValueError, match="left"):
        open_adapter(tiny_backbone()).generate(ids, mask, torch.tensor([0, 1, 2]), 2)


CHOICES = [[[4], [5, 6, 7], [5, 6]], [[8, 9, 10, 11, 12]], [[13, 1], [14, 15]]]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_score_is_the_sum_of_log_probabilities(side, family, tiny_backbone, open_adapter):
    model = open_adapter(tiny_backbone(family))
    tasks = torch.tensor([2, NO_TASK, 0])
    scores = model.score(*pad(PROMPTS, left=2, side=side), tasks, CHOICES)
    assert scores.shape == (3, 3) and scores.dtype == torch.float32
    for b, row in enumerate(CHOICES):
        for c, choice in enumerate(row):
            ids = torch.tensor([PROMPTS[b] + choice])
            with torch.no_grad():
                log_p = model(ids, torch.ones_like(ids), tasks[b:b + 1]).logits[0].log_softmax(-1)
            expected = sum(log_p[len(PROMPTS[b]) - 1 + i, token] for i, token in enumerate(choice))
            torch.testing.assert_close(scores[b, c], expected, **CLOSE)
        assert (scores[b, len(row):] == -torch.inf).all()


def test_score_is_minus_the_loss_of_the_answer(tiny_backbone, open_adapter):
    model, tasks = open_adapter(tiny_backbone()), torch.tensor([0, 1, 2])
    with torch.no_grad():
        losses = model(**batch()).losses
    scores = model.score(*pad(PROMPTS), tasks, [[answer] for answer in ANSWERS])[:, 0]
    torch.testing.assert_close(scores, -losses * torch.tensor([len(a) for a in ANSWERS]), **CLOSE)


@pytest.mark.parametrize("choices", [[[[1]], [], [[2]]], [[[1]], [[2], []], [[3]]]])
def test_score_refuses_an_empty_choice(choices, tiny_backbone, open_adapter):
    with pytest.raises(ValueError, match="at least one"):
        open_adapter(tiny_backbone()).score(*pad(PROMPTS), torch.tensor([0, 1, 2]), choices)


# ------------------------------------------------------------------------------------- several adapters, one backbone

def test_two_adapters_on_one_backbone_do_not_disturb_each_other(tiny_backbone, open_adapter):
    backbone = tiny_backbone()
    ids, mask = pad(PROMPTS)
    tasks = torch.tensor([0, 1, 2])
    plain = backbone(ids, attention_mask=mask).logits
    one, two = open_adapter(backbone), open_adapter(backbone, seed=5, prompt_length=3, gate_per_head=True)
    alone = [open_adapter(tiny_backbone(), **kw)(ids, mask, tasks).logits
             for kw in ({}, dict(seed=5, prompt_length=3, gate_per_head=True))]
    for _ in range(2):
        for model, expected in zip((one, two), alone):
            assert torch.equal(model(ids, mask, tasks).logits, expected)
            model.generate(ids, mask, tasks, 2)
            model.score(ids, mask, tasks, CHOICES)
            assert torch.equal(backbone(ids, attention_mask=mask).logits, plain)
    assert not torch.equal(*alone)


def test_add_task_touches_nothing_else(tiny_backbone, open_adapter):
    model = open_adapter(tiny_backbone())
    ids, mask = pad(PROMPTS)
    tasks = torch.tensor([2, 0, NO_TASK])
    logits, state = model(ids, mask, tasks).logits, {n: t.clone() for n, t in model.adapter_state().items()}
    assert model.add_task("fourth") == 3 and model.tasks == ["first", "second", "third", "fourth"]
    for name, t in state.items():
        assert torch.equal(model.adapter_state()[name], t), name
    assert set(model.adapter_state()) - set(state) == {"u.3", "v.3"}
    assert torch.equal(model(ids, mask, tasks).logits, logits)
    new = model(ids, mask, torch.tensor([3, 3, 3]))
    assert not torch.equal(new.logits, model(ids, mask, torch.tensor([NO_TASK] * 3)).logits)


# ------------------------------------------------------------------------------------------------------------ bad input

def test_a_task_name_is_taken_once(tiny_backbone):
    with pytest.raises(ValueError, match="'a' is there already"):
        TALoRA(tiny_backbone(), ["a", "b", "a"])


@pytest.mark.parametrize("bad", [3, -2])
def test_unknown_task_ids_are_refused(bad, tiny_backbone, open_adapter):
    model, tasks = open_adapter(tiny_backbone()), torch.tensor([0, bad, 1])
    for call in (lambda: model(*pad(PROMPTS), tasks), lambda: model.generate(*pad(PROMPTS), tasks, 2),
                 lambda: model.score(*pad(PROMPTS), tasks, CHOICES)):
        with pytest.raises(ValueError, match=str(bad)):
            call()


@pytest.mark.parametrize("config", [
    GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=53),
    Phi3Config(vocab_size=53, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
               num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2),  # q, k, v in one projection
])
def test_other_families_are_refused_by_name(config):
    backbone = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=f"'{config.model_type}'.*qwen2, qwen3, llama, mistral"):
        TALoRA(backbone, ["a"])
    assert all(p.requires_grad for p in backbone.parameters())


def test_a_backbone_without_an_output_layer_is_refused(tiny_backbone):
    with pytest.raises(ValueError, match="Qwen2Model.*causal language model"):
        TALoRA(tiny_backbone().model, ["a"])


# -------------------------------------------------------------------------------------------------------- save and load

def test_load_equals_save_bit_for_bit(tiny_backbone, open_adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "load", None)
    monkeypatch.setattr(torch, "save", None)
    model = open_adapter(tiny_backbone(), scale=0.7, gate_per_head=True)
    model.add_task("第四")
    model.save(tmp_path / "new" / "folder")
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == ["adapter.json", "adapter.safetensors"]
    with safe_open(tmp_path / "new" / "folder" / "adapter.safetensors", "pt") as file:
        assert set(file.keys()) == {"theta0", "B", "gate"} | {f"{f}.{i}" for f in "uv" for i in range(4)}
    loaded = TALoRA.load(tmp_path / "new" / "folder", tiny_backbone())
    assert loaded.tasks == model.tasks and loaded.config == model.config
    for name, t in model.adapter_state().items():
        assert torch.equal(loaded.adapter_state()[name], t), name
    ids, mask = pad(PROMPTS)
    tasks = torch.tensor([0, 3, NO_TASK])
    assert torch.equal(loaded(ids, mask, tasks).logits, model(ids, mask, tasks).logits)
    assert [n for n, p in loaded.named_parameters() if p.requires_grad] == list(model.adapter_state())


@pytest.mark.parametrize("other, word", [
    (dict(seed=1), "weights"), (dict(hidden_size=48), "hidden_size"), (dict(num_hidden_layers=2), "num_hidden_layers"),
    (dict(family="llama"), "model_type"), (dict(num_key_value_heads=4), "num_key_value_heads"),
    (dict(rms_norm_eps=1e-5), "config"), (dict(hidden_act="gelu"), "config"), (dict(attention_dropout=0.1), "config"),
    (dict(rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}), "config"),
    (dict(use_sliding_window=True, sliding_window=9, max_window_layers=0), "config"),
])
def test_another_backbone_is_refused(other, word, tiny_backbone, open_adapter, tmp_path):
    open_adapter(tiny_backbone()).save(tmp_path)
    with pytest.raises(ValueError, match=f"{word} = .*own backbone"):
        TALoRA.load(tmp_path, tiny_backbone(**other))


def drop_tensor(folder):
    save_file({n: t for n, t in load_file(folder / "adapter.safetensors").items() if n != "v.1"},
              folder / "adapter.safetensors")


def reshape_tensor(folder):
    state = load_file(folder / "adapter.safetensors")
    save_file({**state, "theta0": state["theta0"][:, :4].contiguous()}, folder / "adapter.safetensors")


def edit_json(**changes):
    def damage(folder):
        about = json.loads((folder / "adapter.json").read_text())
        (folder / "adapter.json").write_text(json.dumps({**about, **changes}))
    return damage


@pytest.mark.parametrize("damage", [
    lambda folder: (folder / "adapter.json").unlink(),
    lambda folder: (folder / "adapter.safetensors").unlink(),
    lambda folder: (folder / "adapter.json").write_text("{not json"),
    lambda folder: (folder / "adapter.json").write_text("[1, 2]"),
    lambda folder: (folder / "adapter.json").write_bytes(b"\xff\xfe\x00"),
    lambda folder: (folder / "adapter.safetensors").write_bytes(b"garbage"),
    drop_tensor, reshape_tensor,
    edit_json(config={"rank": 2, "unknown": 1}),
    edit_json(config={"prompt_length": 5, "rank": 3}),
    edit_json(tasks=["first", "second"]),
    edit_json(tasks=["first", "first", "second"]),
    edit_json(tasks=3),
    edit_json(tasks="abc"),
    edit_json(backbone="qwen2"),
    edit_json(config={"prompt_length": "five", "rank": 2}),
    edit_json(config={"prompt_length": -5, "rank": 2}),
    edit_json(config={"prompt_length": 5, "rank": 0}),
    edit_json(method="lora"),
    edit_json(tasks=[1, 2, 3]),
    edit_json(tasks=[{}, [], 3]),
    edit_json(config={"prompt_length": 5, "rank": 2, "scale": math.nan}),
    edit_json(config={"prompt_length": 5, "rank": 2, "scale": 10**400}),
    edit_json(config={"prompt_length": 5, "rank": 2, "gate_per_head": "no"}),
    edit_json(config={"prompt_length": 5, "rank": 10**13}),
    edit_json(config={"prompt_length": 10**12, "rank": 2}),
    lambda folder: (folder / "adapter.json").write_text("[" * 100_000),
], ids=["no json", "no tensors", "garbage json", "json list", "json no text", "garbage tensors", "tensor missing",
        "tensor shape", "unknown option", "other rank", "fewer tasks", "a task twice", "tasks a number", "tasks a word",
        "backbone a word", "length a word", "negative length", "rank 0", "another method", "tasks numbers",
        "tasks lists", "scale nan", "scale beyond floats", "gates a word", "rank without end", "length without end",
        "nested too deep"])
def test_a_damaged_adapter_is_refused_in_a_sentence(damage, tiny_backbone, open_adapter, tmp_path):
    open_adapter(tiny_backbone()).save(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match="adapter in|no adapter can be read") as error:
        TALoRA.load(tmp_path, tiny_backbone())
    assert str(tmp_path) in str(error.value)


def test_a_missing_folder_is_refused(tiny_backbone, tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        TALoRA.load(tmp_path / "nowhere", tiny_backbone())


# --------------------------------------------------------------------------------------------------------------- dtypes

@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_stay_fp32_over_a_bf16_backbone(family, tiny_backbone, open_adapter):
    wide = open_adapter(tiny_backbone(family))
    model = open_adapter(tiny_backbone(family).to(torch.bfloat16))
    loss = model(**batch()).loss
    loss.backward()
    wide(**batch()).loss.backward()
    assert loss.isfinite() and loss.dtype == torch.float32
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.dtype == p.grad.dtype == torch.float32 and p.grad.isfinite().all()
            expected = wide.get_parameter(name).grad
            assert torch.cosine_similarity(p.grad.flatten(), expected.flatten(), dim=0) > 0.9, name
    ids, mask = pad(PROMPTS)
    tasks = torch.tensor([0, 1, NO_TASK])
    assert model(ids, mask, tasks).logits.dtype == torch.bfloat16
    assert model.score(ids, mask, tasks, CHOICES).dtype == torch.float32
    assert model.generate(ids, mask, tasks, 3).shape == (3, ids.shape[1] + 3)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_under_bf16_autocast(family, checkpointing, tiny_backbone, open_adapter):
    model, wide = open_adapter(tiny_backbone(family)), open_adapter(tiny_backbone(family))
    if checkpointing:
        model.backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch()).loss
    loss.backward()
    wide(**batch()).loss.backward()
    assert loss.isfinite()
    for name, gradient in gradients(model).items():
        expected = wide.get_parameter(name).grad
        assert gradient is not None and gradient.dtype == torch.float32, name
        assert torch.cosine_similarity(gradient.flatten(), expected.flatten(), dim=0) > 0.9, name


def test_the_fingerprint_is_that_of_the_weights_in_bf16(tiny_backbone):
    wide, narrow, other = tiny_backbone(), tiny_backbone().to(torch.bfloat16), tiny_backbone(seed=1)
    assert describe(wide) == describe(narrow) == describe(narrow.float()) != describe(other)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_backbone_in_another_folder_and_dtype_is_the_same(family, tiny_backbone, tmp_path):
    first, kinds = describe(tiny_backbone(family)), (("a", torch.float32), ("b", torch.bfloat16))
    for name, dtype in kinds:
        tiny_backbone(family).to(dtype).save_pretrained(tmp_path / name)
    for name, _ in kinds:
        for _, dtype in kinds:
            backbone = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=dtype)
            backbone.set_attn_implementation("eager")
            assert describe(backbone) == first


def test_the_shipped_backbone_has_one_description_under_every_version():
    """As transformers 5.0.0 and 5.23.0 give it: an adapter outlives the version that it was trained with."""
    assert describe(toy.load_backbone()[0])["config"] == "84a93c9c1062b186"


def test_a_bf16_adapter_file_fits_the_same_backbone_in_fp32(tiny_backbone, open_adapter, tmp_path):
    open_adapter(tiny_backbone().to(torch.bfloat16)).save(tmp_path)
    assert TALoRA.load(tmp_path, tiny_backbone()).tasks == ["first", "second", "third"]


# --------------------------------------------------------------------------------------------------------------- window

WINDOWS = pytest.mark.parametrize("family, shape", [
    ("mistral", dict(sliding_window=6)),
    ("qwen2", dict(use_sliding_window=True, sliding_window=6, max_window_layers=1)),
])


@WINDOWS
def test_a_sliding_window_is_kept_by_forward_and_generate(family, shape, tiny_backbone, open_adapter):
    backbone = tiny_backbone(family, **shape)
    ids, mask = pad([PROMPTS[2] * 2, PROMPTS[0]])
    before = backbone(ids, attention_mask=mask, position_ids=positions(mask)).logits
    tasks = torch.tensor([0, 1])
    assert torch.equal(TALoRA(backbone, ["a", "b"])(ids, mask, tasks).logits, before)
    model = open_adapter(backbone)
    assert torch.equal(model.generate(ids, mask, tasks, 6), greedy_step_by_step(model, ids, mask, tasks, 6))


@WINDOWS
def test_score_refuses_a_text_beyond_the_sliding_window(family, shape, tiny_backbone, open_adapter):
    model = open_adapter(tiny_backbone(family, **shape))
    with pytest.raises(ValueError, match="sliding window"):
        model.score(*pad([PROMPTS[2] * 2, PROMPTS[0]]), torch.tensor([0, 2]), [[[4, 19, 38]], [[25]]])


@pytest.mark.parametrize("ids", [torch.tensor([0]), torch.tensor([0, 1, 2, 0]), torch.tensor([[0], [1], [2]]),
                                 torch.tensor([], dtype=torch.long), torch.tensor(0)])
def test_one_task_id_for_each_row_or_a_sentence(ids, tiny_backbone, open_adapter):
    model, (tokens, mask) = open_adapter(tiny_backbone()), pad([PROMPTS[0]] * 3)
    for call in (lambda: model(tokens, mask, ids), lambda: model.generate(tokens, mask, ids, 2),
                 lambda: model.score(tokens, mask, ids, [[[1]]] * 3)):
        with pytest.raises(ValueError, match="task ids"):
            call()


@pytest.mark.parametrize("choices", [[[[1]]], [[[1]], []], [[[1]], [[]]], [[[1]]] * 3])
def test_score_wants_choices_for_every_row(choices, tiny_backbone, open_adapter):
    model, (tokens, mask) = open_adapter(tiny_backbone()), pad([PROMPTS[0]] * 2)
    with pytest.raises(ValueError, match="choice"):
        model.score(tokens, mask, torch.tensor([0, 1]), choices)
    with pytest.raises(ValueError, match="token of text"):
        model.score(tokens, mask * torch.tensor([[1], [0]]), torch.tensor([0, 1]), [[[1]]] * 2)


@pytest.mark.parametrize("shape", [{"prompt_length": 0}, {"rank": 0}, {"rank": 2.0}, {"prompt_length": -1}])
def test_a_prompt_has_a_size(shape):
    with pytest.raises(ValueError, match="whole numbers above 0"):
        TALoRAConfig(**shape)


@pytest.mark.parametrize("harm, words", [
    (lambda state: state["v.1"].view(-1)[3:4].fill_(torch.nan), ["not finite", "v.1"]),
    (lambda state: state["gate"].fill_(-torch.inf), ["not finite", "gate"]),
    (lambda state: state.update({"B": state["B"].half()}), ["B", "float16", "float32"]),
    (lambda state: state.update({"extra": torch.ones(2)}), ["extra", "absent"]),
    (lambda state: state.pop("theta0"), ["theta0", "absent"]),
])
def test_a_damaged_adapter_is_refused_by_the_name_of_its_tensor(harm, words, tiny_backbone, open_adapter, tmp_path):
    backbone = tiny_backbone()
    open_adapter(backbone).save(tmp_path)
    state = load_file(tmp_path / "adapter.safetensors")
    harm(state)
    save_file(state, tmp_path / "adapter.safetensors")
    with pytest.raises(ValueError) as caught:
        TALoRA.load(tmp_path, backbone)
    assert all(word in str(caught.value) for word in [*words, str(tmp_path)])


def test_a_mask_is_built_only_where_something_is_padded(tiny_backbone, open_adapter, monkeypatch):
    """Without one the flash kernel can run on a GPU."""
    masks, attention = [], gating.attention

    def spy(q, k, v, mask, *rest):
        masks.append(mask)
        return attention(q, k, v, mask, *rest)

    monkeypatch.setattr(gating, "attention", spy)
    model = open_adapter(tiny_backbone())
    for rows, padded in ((PROMPTS[:1] * 2, False), (PROMPTS, True)):
        ids, mask = pad(rows)
        masks.clear()
        model(ids, mask, torch.arange(len(rows)))
        texts, prompts = masks[::2], masks[1::2]
        assert len(texts) == len(prompts) > 0 and prompts == [None] * len(prompts), "nobody is kept from the prompt"
        assert all((mask is not None) == padded for mask in texts)
