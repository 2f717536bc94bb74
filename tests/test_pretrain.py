"""Packing changes the cost and nothing else; pretraining is reproducible and learns."""

import json
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import pretrain
import toy

DOCUMENTS = [(list(range(3, 3 + n)), [0.5] * n) for n in (7, 4, 9, 6, 3, 8, 5)]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return pretrain.new_backbone(40, pad_id=0, eos_id=1, width=32, layers=2).eval()


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
    with pytest.raises(ValueError, match="9 tokens, a row holds 8"):
        pretrain.pack(DOCUMENTS, 8, pad_id=0)


@torch.no_grad()
def test_a_document_is_blind_to_its_neighbours(model):
    ids, _, segments, positions = pretrain.pack(DOCUMENTS, 16, pad_id=0)
    read = lambda ids: model(input_ids=ids, attention_mask=pretrain.block_diagonal(segments),  # noqa: E731
                             position_ids=positions).logits
    logits = read(ids)
    changed = torch.where(segments == 0, ids + 11, ids)
    new = read(changed)
    torch.testing.assert_close(new[segments > 0], logits[segments > 0], atol=1e-6, rtol=0)
    assert (new[segments == 0] - logits[segments == 0]).abs().max() > 0.01
    for r in range(len(ids)):  # and reads as if it stood alone
        where = segments[r] == 1
        alone = model(input_ids=ids[r][where][None]).logits[0]
        torch.testing.assert_close(logits[r][where], alone, atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_loss_is_the_weighted_mean_over_documents(model):
    documents = [([3, 4, 5, 6], [1.0, 0.0, 2.0, 1.0]), ([7, 8, 9], [5.0, 1.0, 0.0])]
    loss = pretrain.step_loss(model, *pretrain.pack(documents, 16, pad_id=0))
    total, norm = 0.0, 0.0
    for ids, weights in documents:
        log_p = F.log_softmax(model(input_ids=torch.tensor([ids])).logits[0], -1)
        for t in range(1, len(ids)):
            total, norm = total - weights[t] * log_p[t - 1, ids[t]].item(), norm + weights[t]
    assert loss.item() == pytest.approx(total / norm, rel=1e-5)


def test_a_short_run_learns_and_is_reproducible():
    tokenizer = toy.tokenizer()
    documents = pretrain.toy_documents(0, 300, tokenizer)

    def run(seed):
        torch.manual_seed(seed)
        model = pretrain.new_backbone(len(tokenizer), tokenizer.pad_token_id, tokenizer.eos_token_id, 32, 2)
        lines = []
        losses, _ = pretrain.pretrain(model, documents, tokenizer.pad_token_id, seed, 60, rows_per_step=8,
                                      log=lines.append)
        return losses, lines, model.state_dict()

    losses, lines, weights = run(0)
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert "60/60 (100%)" in lines[-1] and "ETA" in lines[-1]
    again = run(0)
    assert again[0] == losses and all(torch.equal(weights[name], again[2][name]) for name in weights)
    assert run(1)[0] != losses


def test_answers_carry_the_loss_of_toy_documents():
    tokenizer = toy.tokenizer()
    for (ids, weights), questions in zip(pretrain.toy_documents(0, 50, tokenizer), toy.documents(0, 50)):
        assert len(ids) == len(weights) <= pretrain.ROW_TOKENS
        answers = tokenizer.decode([i for i, w in zip(ids, weights) if w == 1])
        wanted = "".join(f"{answer} {toy.EOS} " for _, answer in questions).replace("  ", " ").strip()
        assert wanted.startswith(answers) and answers.endswith(toy.EOS)


def test_answers_right_wants_every_word_and_the_end(tmp_path):
    """A model that says the same word always is right only where that is the whole answer."""
    tokenizer = toy.tokenizer()

    class Parrot(torch.nn.Module):  # after `=>` soup, after soup the end, after oslo cafe
        def forward(self, input_ids, **_):
            logits = torch.zeros(*input_ids.shape, len(tokenizer))
            for word, after in (("=>", "soup"), ("soup", toy.EOS), ("oslo", "cafe"), ("cafe", "cafe")):
                word, after = tokenizer.convert_tokens_to_ids([word, after])
                logits[..., after] += (input_ids == word).float()
            return type("Output", (), {"logits": logits})

    rows = [("the soup =>", "soup"), ("the =>", "tea"), ("who =>", "oslo cafe"), ("a =>", "soup tea")]
    assert [pretrain.answers_right(Parrot(), tokenizer, [row]) for row in rows] == [1, 0, 0, 0]
    assert pretrain.answers_right(Parrot(), tokenizer, rows) == 0.25


def test_pretrain_text_from_plain_texts(tmp_path):
    texts = ["今天天气很好。\n我们去公园吧!", "他说:“明天 见”", ""] * 20
    lines = []
    model, tokenizer = pretrain.pretrain_text(tmp_path, texts, steps=30, width=32, layers=2, row_tokens=12,
                                              rows_per_step=4, log=lines.append)
    text = "今天 天气\n很好。"
    ids = tokenizer(text).input_ids
    assert len(ids) == len(text) and tokenizer.decode(ids) == text
    assert tokenizer("鑫").input_ids == [tokenizer.unk_token_id]
    loaded, again = toy.load_backbone(tmp_path)
    assert again(text).input_ids == ids
    x = torch.tensor([tokenizer(texts[0]).input_ids])
    with torch.no_grad():
        logits = loaded(input_ids=x).logits
        assert torch.equal(logits, model(input_ids=x).logits)
        loss = F.cross_entropy(logits[0, :-1], x[0, 1:])
    assert loss < 0.8 * torch.tensor(float(len(tokenizer))).log()  # better than guessing
    with pytest.raises(ValueError, match="no text"):
        pretrain.pretrain_text(tmp_path, ["", ""])


def test_a_small_toy_run_writes_everything(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "score_capabilities", partial(pretrain.score_capabilities, count=10))
    written, write = [], pretrain.write_json
    monkeypatch.setattr(pretrain, "write_json", lambda path, value: (written.append(path), write(path, value)))
    pretrain.pretrain_toy(tmp_path, seed=3, steps=2, width=32, layers=2, log=lambda line: None)
    assert written == [tmp_path / "scores.json"], "whole or not there"
    record = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    assert record["seed"] == 3 and record["steps"] == 2 and "pretrain" in record["command"]
    assert min(record["scores"].values()) < 0.5  # two steps teach nothing, and the score says so
    assert len(record["scores"]) == 38
    model, tokenizer = toy.load_backbone(tmp_path)
    assert model.config.vocab_size == len(tokenizer) == len(toy.vocabulary())
    assert (model.config.hidden_size, model.config.num_hidden_layers) == (32, 2)
    with pytest.raises(FileNotFoundError, match="--stage pretrain"):
        toy.load_backbone(tmp_path / "nothing")
