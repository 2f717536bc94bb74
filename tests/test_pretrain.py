"""Packing changes the cost and nothing else; pretraining is reproducible and learns."""

import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from checkpoint import UserError
from model import load_backbone
from tasks import micro, pretrain

DOCUMENTS = [(list(range(3, 3 + n)), [0.5] * n) for n in (7, 4, 9, 6, 3, 8, 5)]


@pytest.fixture(scope="module")
def model():
    return pretrain.new_backbone(micro.tokenizer(), seed=0, width=32, layers=2).eval()


def test_every_document_is_packed_once_and_whole():
    ids, weights, segments, positions = pretrain.pack(DOCUMENTS, 16, pad_id=0)
    found = []
    for r in range(len(ids)):
        for segment in range(int(segments[r].max()) + 1):
            where = segments[r] == segment
            found.append(ids[r][where].tolist())
            assert positions[r][where].tolist() == list(range(len(found[-1])))
            assert weights[r][where].tolist() == [0] + [0.5] * (len(found[-1]) - 1)  # a first word is not predicted
    assert sorted(found) == sorted(ids for ids, _ in DOCUMENTS)
    assert (ids[segments == -1] == 0).all() and (weights[segments == -1] == 0).all()
    assert len(ids) == 3  # 42 tokens in rows of 16


@torch.no_grad()
def test_a_document_is_blind_to_its_neighbours(model):
    ids, _, segments, positions = pretrain.pack(DOCUMENTS, 16, pad_id=0)
    logits = pretrain.read_packed(model, ids, segments, positions)
    for row, text, owner in zip(logits, ids, segments):  # reads as if it stood alone
        for where in (owner == segment for segment in range(int(owner.max()) + 1)):
            torch.testing.assert_close(row[where], model(input_ids=text[where][None]).logits[0], atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_loss_is_the_weighted_mean_over_the_tokens_of_all_documents(model):
    documents = [([3, 4, 5, 6], [1.0, 0.0, 2.0, 1.0]), ([7, 8, 9], [5.0, 1.0, 0.0])]
    ids, weights, segments, positions = pretrain.pack(documents, 16, pad_id=0)
    loss = pretrain.weighted_loss(pretrain.read_packed(model, ids, segments, positions), ids, weights)
    total, norm = 0.0, 0.0
    for ids, weights in documents:
        log_p = F.log_softmax(model(input_ids=torch.tensor([ids])).logits[0], -1)
        for t in range(1, len(ids)):
            total, norm = total - weights[t] * log_p[t - 1, ids[t]].item(), norm + weights[t]
    assert loss.item() == pytest.approx(total / norm, rel=1e-5)


def test_a_short_run_learns_and_is_reproducible(capsys):
    tokenizer = micro.tokenizer()
    documents, runs = pretrain.weigh_documents(0, 300, tokenizer), []
    for seed in (0, 0, 1):
        model = pretrain.new_backbone(tokenizer, seed, width=32, layers=2)
        runs.append((pretrain.pretrain(model, documents, seed, steps=60, rows_per_step=8), model.lm_head.weight))
    (losses, weight), (again, same), (other, _) = runs
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5]) and "step    60/60  loss" in capsys.readouterr().out
    assert again == losses != other and torch.equal(weight, same)


def test_answers_carry_the_loss():
    tokenizer = micro.tokenizer()
    for (ids, weights), questions in zip(pretrain.weigh_documents(0, 50, tokenizer), micro.documents(0, 50)):
        assert len(ids) == len(weights) <= pretrain.ROW_TOKENS
        answers = tokenizer.decode([i for i, w in zip(ids, weights) if w == 1])
        wanted = "".join(f"{answer} {micro.EOS} " for _, answer in questions).strip()
        assert wanted.startswith(answers) and answers.endswith(micro.EOS)


def test_an_answer_is_right_with_every_word_and_the_end():
    tokenizer = micro.tokenizer()
    says = torch.zeros(len(tokenizer), dtype=torch.long)  # what a parrot says after each word
    for pair in (("=>", "soup"), ("soup", micro.EOS), ("oslo", "cafe"), ("cafe", "cafe")):
        word, after = tokenizer.convert_tokens_to_ids(pair)
        says[word] = after

    def parrot(input_ids):
        return SimpleNamespace(logits=F.one_hot(says[input_ids], len(tokenizer)))

    rows = [("the soup =>", "soup"), ("the =>", "tea"), ("who =>", "oslo cafe"), ("a =>", "soup tea")]
    assert [pretrain.share_right(parrot, tokenizer, part) for part in ([rows[0]], rows[1:], rows)] == [1, 0, 0.25]


def test_the_command_writes_a_backbone_that_loads_and_its_scores(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "score_capabilities", partial(pretrain.score_capabilities, count=10))
    pretrain.main(["--out", str(tmp_path), "--seed", "3", "--steps", "2", "--width", "32", "--layers", "2"])
    record = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    assert (record["seed"], record["steps"], record["width"]) == (3, 2, 32) and len(record["scores"]) == 38
    assert min(record["scores"].values()) < 0.5  # two steps teach nothing, and the score says so
    model, tokenizer = load_backbone(tmp_path)
    assert model.config.vocab_size == len(tokenizer) == len(micro.vocabulary())
    assert (model.config.hidden_size, model.config.num_hidden_layers) == (32, 2)
    with pytest.raises(UserError, match="--out"):
        pretrain.main([])
