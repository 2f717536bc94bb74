"""TALoRA over tiny random backbones. After the first test every gate is open: a zero gate hides every bug behind it.

What TA-LoRA shares with all methods (losses, scores, greedy decoding, what learns) is asked in test_baselines.py."""

import json
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, Qwen2Config

from checkpoint import FAMILIES, UserError
from model import NO_TASK, TALoRA, TALoRAConfig, describe, load_backbone, positions

CLOSE = dict(atol=2e-4, rtol=1e-4)  # fp32, logits of size 10
PROMPTS = [[7, 11, 3, 29, 41, 5], [17, 2, 2, 31], [9, 44, 23, 8, 50, 6, 12, 33]]
ANSWERS = [[4, 19, 38], [25], [13, 46, 13, 1, 40]]
CHOICES = [[[4], [5, 6, 7], [5, 6]], [[8, 9, 10, 11, 12]], [[13, 1], [14, 15]]]
TASK_IDS = torch.tensor([2, NO_TASK, 0])
IN_EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)


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


def use_checkpointing(model):
    model.backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


@IN_EVERY_FAMILY
def test_zero_gates_are_the_backbone_bit_for_bit_and_learn_first(family, tiny_backbone):
    backbone = tiny_backbone(family)
    ids, mask = pad(PROMPTS, left=3)
    before = backbone(ids, attention_mask=mask, position_ids=positions(mask)).logits
    model = TALoRA(backbone, ["a", "b"])
    assert torch.equal(model(ids, mask, torch.tensor([0, 1, NO_TASK])).logits, before)
    assert torch.equal(backbone(ids, attention_mask=mask, position_ids=positions(mask)).logits, before)
    model(**batch(tasks=(0, 1, NO_TASK))).loss.backward()
    assert [name for name, g in gradients(model).items() if g.any()] == ["gate"], "the others wait for an open gate"


@torch.no_grad()
@pytest.mark.parametrize("gate_per_head", [False, True])
@IN_EVERY_FAMILY
def test_open_gates_equal_a_slow_reference(family, gate_per_head, tiny_backbone, open_adapter):
    """Rows of several tasks, two of one task and one of none, padded on either side."""
    model = open_adapter(tiny_backbone(family), scale=0.7, gate_per_head=gate_per_head)
    rows, tasks = [*PROMPTS, PROMPTS[0], PROMPTS[0]], [2, NO_TASK, 0, 2, 1]
    expected = [reference_logits(model, tokens, task) for tokens, task in zip(rows, tasks)]
    for side in ("left", "right"):
        ids, mask = pad(rows, left=3, side=side)
        ids[mask == 0] = 21  # what stands under the mask does not matter
        for b, logits in enumerate(model(ids, mask, torch.tensor(tasks)).logits):
            torch.testing.assert_close(logits[mask[b].bool()], expected[b], **CLOSE)
    plain = model.backbone(torch.tensor(PROMPTS[:1])).logits[0]
    assert (expected[0] - plain).abs().mean() > 0.1 and (expected[0] - expected[4]).abs().mean() > 0.1, "it is heard"


@torch.no_grad()
def test_correct_says_whether_greedy_decoding_gives_the_answer(tiny_backbone, open_adapter):
    model = open_adapter(tiny_backbone())
    greedy = model.generate(*pad(PROMPTS), torch.tensor([0, 1, 2]), 4)[:, -4:]
    assert model(**batch(answers=greedy[:, :1].tolist())).correct.all()
    for place in range(4):
        wrong = greedy.clone()
        wrong[1, place] = (wrong[1, place] + 1) % 53
        assert model(**batch(answers=wrong.tolist())).correct.tolist() == [True, False, True]


def test_a_forward_computes_only_what_is_needed(tiny_backbone, open_adapter):
    model = open_adapter(tiny_backbone())
    projected, asked = Mock(return_value=None), Mock(return_value=None)
    model.backbone.model.layers[1].self_attn.k_proj.register_forward_pre_hook(projected)
    model.backbone.lm_head.register_forward_pre_hook(asked)
    model(**batch([PROMPTS[0]] * 5, [ANSWERS[0]] * 5, tasks=(2, 0, 2, 2, 0)))
    shapes = [tuple(call.args[1][0].shape) for call in projected.call_args_list]
    assert sorted(shapes) == [(2, 5, 32), (5, 9, 32)]  # the prompts of two tasks once, and the text
    assert asked.call_args.args[1][0].shape == (5 * 3, 32)  # the states that predict an answer token, no other


@IN_EVERY_FAMILY
def test_checkpointing_changes_neither_loss_nor_gradients(family, tiny_backbone, open_adapter):
    results = []
    for checkpointing in (False, True):
        model = open_adapter(tiny_backbone(family)).train()
        if checkpointing:
            use_checkpointing(model)
        runs = Mock(return_value=None)
        model.backbone.model.layers[0].self_attn.register_forward_pre_hook(runs)
        loss = model(**batch()).loss
        loss.backward()
        assert runs.call_count == 1 + checkpointing, "the layer really runs a second time"
        results.append((loss.detach(), gradients(model)))
    torch.testing.assert_close(results[0], results[1], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_runs_between_forward_and_backward_changes_no_gradient(checkpointing, tiny_backbone, open_adapter):
    backbone, (ids, mask) = tiny_backbone(), pad(PROMPTS)
    model, other = open_adapter(backbone).train(), open_adapter(backbone, seed=7, gate_per_head=True, prompt_length=3)
    if checkpointing:
        use_checkpointing(model)
    plain, alone = backbone(ids, attention_mask=mask).logits, other(ids, mask, TASK_IDS).logits
    model(**batch()).loss.backward()
    expected = gradients(model)
    for call in (lambda: model(ids, mask, TASK_IDS), lambda: other(**batch(tasks=(2, 2, 1))),
                 lambda: model.generate(ids, mask, TASK_IDS, 3), lambda: model.score(ids, mask, TASK_IDS, CHOICES),
                 lambda: backbone(ids, attention_mask=mask)):
        model.zero_grad()
        loss = model(**batch()).loss
        call()
        loss.backward()
        assert all(torch.equal(gradient, expected[name]) for name, gradient in gradients(model).items())
        assert torch.equal(other(ids, mask, TASK_IDS).logits, alone), "two adapters on one backbone"
        assert torch.equal(backbone(ids, attention_mask=mask).logits, plain), "and the backbone alone"


def test_one_task_at_7b_has_1307516_parameters_and_a_further_one_100576():
    shape = Qwen2Config(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
                        num_key_value_heads=4, vocab_size=152064, tie_word_embeddings=False)
    with torch.device("meta"):
        backbone = AutoModelForCausalLM.from_config(shape)
    model = TALoRA(backbone, ["one"])
    assert sum(p.numel() for p in trainable(model)) == 1_307_516
    assert sum(p.numel() for p in backbone.parameters()) == 7_615_616_512
    model.add_task("two")
    assert sum(p.numel() for p in trainable(model)) == 1_307_516 + 100_576


def test_a_new_model_has_named_fp32_tensors_of_which_exactly_the_gates_are_zero(tiny_backbone):
    torch.manual_seed(0)
    model = TALoRA(tiny_backbone().to(torch.bfloat16), ["a"], TALoRAConfig(64, 16, gate_per_head=True))
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    assert shapes == {"theta0": (3, 64, 32), "B": (3, 64, 16), "gate": (3, 4), "u.0": (3, 16), "v.0": (3, 32)}
    assert all(p.dtype == torch.float32 for p in trainable(model))
    for name in shapes:
        assert ((model.get_parameter(name) == 0) == (name == "gate")).all(), name
    assert float(model.B.detach().var()) == pytest.approx(1 / 16, rel=0.1) and model.v[0].std() < 0.1


@torch.no_grad()
def test_what_training_logs_follows_its_definitions(tiny_backbone, open_adapter):
    model = open_adapter(tiny_backbone(), scale=0.7, gate_per_head=True)
    logged = model.diagnose()
    assert logged["tasks"] == model.tasks
    assert logged["gates"] == pytest.approx(model.gate.tanh().mean(1).tolist(), abs=1e-5)  # with their signs
    assert logged["theta0_norms"] == pytest.approx([theta.norm().item() for theta in model.theta0], abs=1e-4)
    A = torch.stack([torch.einsum("lr, ld -> lrd", u, v) for u, v in zip(model.u, model.v)], 1)  # (L, N, r, d)
    steps = (0.7 * model.B[:, None] @ A).norm(dim=(-2, -1)).mean(1)
    assert logged["step_norms"] == pytest.approx(steps.tolist(), abs=1e-4)
    A = nn.functional.normalize(A.flatten(2), dim=-1)
    torch.testing.assert_close(torch.tensor(logged["cosines"]), (A @ A.mT).abs().mean(0), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("ends", [0, 1, 2])
@IN_EVERY_FAMILY
def test_with_zero_gates_generate_is_that_of_transformers(family, ends, rows, tiny_backbone):
    backbone, (ids, mask) = tiny_backbone(family), pad(PROMPTS[:rows], left=2)
    free = backbone.generate(input_ids=ids, attention_mask=mask, max_new_tokens=10, do_sample=False)
    stops = [int(free[0, -8]), int(free[-1, -6])][:ends]  # rows end at different places, and alone before the tenth
    settings = backbone.generation_config
    settings.eos_token_id, settings.pad_token_id = stops or None, stops[0] if stops else None
    expected = backbone.generate(input_ids=ids, attention_mask=mask, max_new_tokens=10, do_sample=False)
    out = TALoRA(backbone, ["a"]).generate(ids, mask, torch.zeros(rows, dtype=torch.long), 10)
    filled = nn.functional.pad(expected, (0, free.shape[1] - expected.shape[1]), value=stops[0] if stops else 0)
    assert torch.equal(out, filled)


@pytest.mark.parametrize("family, shape", [
    ("mistral", dict(sliding_window=16)),
    ("qwen2", dict(use_sliding_window=True, sliding_window=16, max_window_layers=1)),
])
def test_within_a_sliding_window_all_is_as_without_and_a_longer_text_is_refused(family, shape, tiny_backbone,
                                                                               open_adapter):
    plain, model = (open_adapter(tiny_backbone(family, **more)) for more in ({}, shape))
    rows = pad([PROMPTS[2], PROMPTS[0]], left=1)  # 9 tokens with the padding
    rest = (*rows, torch.tensor([0, 1]))
    choices = [[[1, 2, 3, 4], [5, 6, 7]], [[8]]]  # 5 of them are read
    for call in (lambda model: model(*rest).logits, lambda model: model.score(*rest, choices),
                 lambda model: model.generate(*rest, 8)):  # the eighth is not read
        torch.testing.assert_close(call(model), call(plain))
    for call in (lambda: model(*pad([PROMPTS[2] * 2, PROMPTS[0]], left=1), rest[2]),
                 lambda: model.score(*rest, [[[1] * 9], [[8]]]), lambda: model.generate(*rest, 9)):
        with pytest.raises(UserError, match="take 17 tokens, but the sliding window .* is 16; lower --max-length"):
            call()


@pytest.mark.parametrize("task_ids", [[0, 3, 1], [0, -2, 1], [0], [0, 1, 2, 0], [[0], [1], [2]], []])
def test_an_unknown_task_id_and_a_wrong_number_of_them_are_refused(task_ids, tiny_backbone, open_adapter):
    model, tasks, rows = open_adapter(tiny_backbone()), torch.tensor(task_ids, dtype=torch.long), pad(PROMPTS)
    for call in (lambda: model(*rows, tasks), lambda: model.generate(*rows, tasks, 2),
                 lambda: model.score(*rows, tasks, CHOICES)):
        with pytest.raises(ValueError, match="task ids"):
            call()


def test_rows_without_an_answer_a_choice_or_a_text_and_padding_on_the_right_are_refused(tiny_backbone, open_adapter):
    model = open_adapter(tiny_backbone())
    with pytest.raises(ValueError, match="left"):
        model.generate(*pad(PROMPTS, side="right"), TASK_IDS, 2)
    with pytest.raises(ValueError, match="row 1 .*no answer token"):
        model(**batch(answers=[ANSWERS[0], [], ANSWERS[2]]))
    for choices in (CHOICES[:2], [*CHOICES, [[1]]], [[[1]], [], [[2]]], [[[1]], [[2], []], [[3]]]):
        with pytest.raises(ValueError, match="at least one choice"):
            model.score(*pad(PROMPTS), TASK_IDS, choices)
    ids, mask = pad(PROMPTS)
    with pytest.raises(ValueError, match="token of text"):
        model.score(ids, mask * torch.tensor([[1], [0], [1]]), TASK_IDS, CHOICES)


def test_load_equals_save_bit_for_bit(tiny_backbone, open_adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "load", None)
    monkeypatch.setattr(torch, "save", None)
    model, folder = open_adapter(tiny_backbone(), scale=0.7), tmp_path / "new" / "folder"
    model.add_task("第四")
    model.save(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["adapter.json", "adapter.safetensors"]
    assert load_file(folder / "adapter.safetensors").keys() == model.adapter_state().keys()
    loaded = TALoRA.load(folder, tiny_backbone())
    assert loaded.tasks == model.tasks and loaded.config == model.config
    assert [name for name, p in loaded.named_parameters() if p.requires_grad] == list(model.adapter_state())


@pytest.mark.parametrize("other, word", [
    (dict(seed=1), "hash"), (dict(num_hidden_layers=2), "num_hidden_layers"), (dict(family="llama"), "model_type"),
    (dict(rms_norm_eps=1e-5), "hash"), (dict(use_sliding_window=True, sliding_window=9, max_window_layers=0), "hash"),
    (dict(rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}), "hash"),
])
def test_the_adapter_of_another_backbone_is_refused(other, word, tiny_backbone, open_adapter, tmp_path):
    open_adapter(tiny_backbone()).save(tmp_path)
    with pytest.raises(UserError, match=word):
        TALoRA.load(tmp_path, tiny_backbone(**other))


@pytest.mark.parametrize("file, old, new, words", [
    ("adapter.json", '"method": "talora"', '"method": "lora"', "'lora'"),
    ("adapter.json", '"rank": 2', '"rank": 3', "'B', 'u.0'"), ("adapter.json", "{", "", "adapter.json"),
    ("adapter.safetensors", "theta0", "theta", "adapter.safetensors"),
])
def test_a_damaged_adapter_is_refused_in_a_sentence(file, old, new, words, tiny_backbone, open_adapter, tmp_path):
    open_adapter(tiny_backbone()).save(tmp_path)
    (tmp_path / file).write_bytes((tmp_path / file).read_bytes().replace(old.encode(), new.encode(), 1))
    with pytest.raises(UserError, match=words) as error:
        TALoRA.load(tmp_path, tiny_backbone())
    assert str(tmp_path) in str(error.value)


EIGHT, OTHERS = ([f"{role} {n}" for n in range(8)] for role in ("source", "target"))


def save_tasks(model, folder):
    """A run with eight sources, from which eight targets were trained, each by itself and each in a file of its own."""
    model.about["tasks"] = {name: {"template": name} for name in EIGHT}
    model.save(folder / "shared")
    for n, name in enumerate(OTHERS):
        trained = TALoRA.load(folder / "shared", model.backbone)
        trained.add_task(name)
        for factor in (trained.u[8], trained.v[8]):
            factor.detach().copy_(0.5 * torch.randn(factor.shape, generator=torch.Generator().manual_seed(n)) + 0.3)
        trained.about["tasks"][name] = {"template": name}
        trained.save_task(name, folder / name)


@torch.no_grad()
def test_sixteen_tasks_on_one_shared_part_answer_a_mixed_batch_as_each_does_alone(tiny_backbone, open_adapter,
                                                                                 tmp_path):
    backbone = tiny_backbone()
    save_tasks(open_adapter(backbone, EIGHT, scale=0.7), tmp_path)
    model, order = TALoRA.load(tmp_path / "shared", backbone), [3, 0, 7, 1, 6, 2, 5, 4]
    shared = {name: t.clone() for name, t in model.adapter_state().items()}
    for n in order:  # in any order
        assert sorted(path.name for path in (tmp_path / OTHERS[n]).iterdir()) == ["task.json", "task.safetensors"]
        header = (tmp_path / OTHERS[n] / "task.safetensors").stat().st_size - 4 * (2 + 32) * 3  # 4 (r + d) L
        assert 0 < header < 200 and model.load_task(tmp_path / OTHERS[n]) == len(model.tasks) - 1
    assert model.tasks == [*EIGHT, *(OTHERS[n] for n in order)] == list(model.about["tasks"])
    assert all(torch.equal(model.adapter_state()[name], t) for name, t in shared.items())

    mixed = torch.arange(16).flip(0)
    rows, choices = (PROMPTS * 6)[:16], (CHOICES * 6)[:16]
    ids, mask = pad(rows)
    logits, scores = model(ids, mask, mixed).logits, model.score(ids, mask, mixed, choices)
    for b, i in enumerate(mixed.tolist()):
        alone = TALoRA.load(tmp_path / "shared", backbone)
        own = torch.tensor([i if i < 8 else alone.load_task(tmp_path / model.tasks[i])])
        torch.testing.assert_close(logits[b, mask[b].bool()], alone(*pad(rows[b:b + 1]), own).logits[0], **CLOSE)
        score = alone.score(*pad(rows[b:b + 1]), own, choices[b:b + 1])[0]
        torch.testing.assert_close(scores[b, :len(score)], score, **CLOSE)
    assert torch.pdist(model(*pad(PROMPTS[:1] * 16), mixed).logits[:, -1]).min() > 0.1, "each is heard"


def test_a_task_of_another_shared_part_or_backbone_a_taken_name_and_no_task_are_refused(tiny_backbone, open_adapter,
                                                                                       tmp_path):
    backbone = tiny_backbone()
    save_tasks(model := open_adapter(backbone, EIGHT), tmp_path)
    model.load_task(tmp_path / OTHERS[0])
    for other, folder, words in (
            (model, OTHERS[0], "'target 0' is there already"), (model, "shared", "task.json"),
            (model, "nowhere", "task.json"), (open_adapter(backbone, EIGHT, seed=2), OTHERS[1], "a shared part with"),
            (open_adapter(backbone, EIGHT, scale=0.5), OTHERS[1], "a shared part with hash"),
            (open_adapter(tiny_backbone(seed=1), EIGHT), OTHERS[1], "trained on a backbone with hash")):
        before = [*other.tasks], json.dumps(other.about), other.hash_shared(), [t.clone() for t in other.v]
        with pytest.raises(UserError, match=words) as refused:
            other.load_task(tmp_path / folder)
        assert "\n" not in str(refused.value)
        after = other.tasks, json.dumps(other.about), other.hash_shared(), [*other.v]
        assert after[:3] == before[:3] and len(after[3]) == len(other.u) == len(before[3])
        assert all(map(torch.equal, after[3], before[3]))
    for tensor, counts in ((model.u[0], False), (model.theta0, True), (model.B, True), (model.gate, True)):
        before = model.hash_shared()
        tensor.data += 1
        assert (model.hash_shared() != before) == counts, "all that tasks share, and nothing of a task"


@IN_EVERY_FAMILY
def test_a_backbone_is_the_same_in_another_folder_and_dtype(family, tiny_backbone, tmp_path):
    first = describe(tiny_backbone(family))
    for dtype in (torch.float32, torch.bfloat16):
        tiny_backbone(family).to(dtype).save_pretrained(tmp_path)
        assert describe(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)) == first
    assert describe(tiny_backbone(family, seed=1)) != first


def test_the_shipped_backbone_has_one_description_under_every_version_of_transformers():
    """An adapter outlives the version that it was trained with."""
    assert describe(load_backbone()[0])["hash"] == "8bcda606deb4070c"
