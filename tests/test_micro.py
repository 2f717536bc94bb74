"""The micro-world: what is apart stays apart, rows mean what they say, and the shipped backbone knows every skill."""

import hashlib
import json
import re
from collections import Counter

import pytest
import torch

from model import load_backbone
from tasks import micro, pretrain


def pairs(text):
    """Pairs of words of one clause, by kind: written from the word lists alone, to check `held_out` and its users."""
    kinds = {"aspect": micro.ASPECTS.values(), "place": micro.PLACES, "adjective": micro.ADJECTIVES,
             "verb": micro.VERBS, "name": [micro.NAMES], "city": [micro.CITIES]}
    found = set()
    for clause in re.split(" [;,] ", text.removesuffix(" =>").split(" ask ")[0]):
        said = {kind: [(word, n) for n, group in enumerate(groups) for word in clause.split() if word in group]
                for kind, groups in kinds.items()}  # (word, number of its group)
        found |= {("topic", topic, place) for _, topic in said["aspect"] for place, _ in said["place"]}
        found |= {("adjective", word, aspect) for word, _ in said["adjective"] for aspect, _ in said["aspect"]}
        found |= {("relation", relation, place) for _, relation in said["verb"] for place, _ in said["place"]}
        found |= {("name", name, city) for name, _ in said["name"] for city, _ in said["city"]}
    return found


def fingerprint(value):
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def test_rows_documents_and_rewritten_prompts_are_those_of_the_first_release():
    """Every published number was measured on them."""
    rows = [micro.rows(task, split) for task in micro.TASKS for split in ("train", "test")]
    rewritten = [micro.perturb(row["prompt"], 0) for test in rows[1::2] for row in test]
    assert (fingerprint(rows), fingerprint(rewritten)) == ("53fc950fc03742a5", "666a1bcd8855580a")
    assert fingerprint(micro.documents(0, 200)) == "ee981f6972a5acae"
    assert fingerprint(micro.vocabulary()) == "39412196e31899a7"
    assert len(micro.SOURCES) == len(micro.TARGETS) == 8 and not set(micro.SOURCES) & set(micro.TARGETS)


@pytest.mark.parametrize("task", micro.TASKS)
def test_rows_hide_the_instruction_hold_their_answers_and_have_balanced_labels(task):
    train, test = micro.rows(task, "train"), micro.rows(task, "test")
    assert len(train) == 2000 and len(test) == 200
    for counts in (Counter(row["answer"] for row in rows) for rows in (train, test)):
        if "choices" in train[0] and task != "toy-c3":
            assert set(counts) == set(train[0]["choices"]) and max(counts.values()) - min(counts.values()) <= 1
        else:
            assert max(counts.values()) < counts.total() / 4
    for row in train + test:
        assert row["hard_prompt"].startswith(row["prompt"].removesuffix(" =>") + " ask ")
        assert row["prompt"].endswith(" =>") and row["hard_prompt"].endswith(" =>") and " ask " not in row["prompt"]
        if "choices" in row:
            assert row["answer"] in row["choices"] and len(set(row["choices"])) == len(row["choices"])
        else:
            assert row["references"] == row["protected"] == [row["answer"]]
            assert f" {row['answer']} " in f" {row['prompt']} "
        if task == "toy-c3":  # an option is never a word of the text
            text, options = row["prompt"].removesuffix(" =>").split(" ; ")
            assert sorted(options.split(" or ")) == sorted(row["choices"]) and not {*row["choices"]} & {*text.split()}


def test_every_test_row_holds_a_pair_of_words_that_no_training_text_shows():
    trained = set()
    for task in micro.TASKS:
        train, test = micro.rows(task, "train"), micro.rows(task, "test")
        assert len({row["prompt"] for row in train + test}) == 2200
        assert not {row["group"] for row in train} & {row["group"] for row in test}
        trained |= set().union(*(pairs(row["prompt"]) for row in train))
    for document in micro.documents(0, 3000):
        trained |= set().union(*(pairs(text) for text, _ in document))
    for task in micro.TASKS:
        assert all(pairs(row["prompt"]) - trained for row in micro.rows(task, "test"))
    kinds = Counter(kind for kind, *_ in trained)
    assert min(kinds.values()) > 25 and len(kinds) == 4  # the check saw pairs of all kinds


def test_the_readme_shows_real_rows():
    readme = (micro.FOLDER.parent / "README.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\| `(toy-\S+)` \| `(.+)` \| (\S+) \| (.+) \|$", readme, re.M)
    assert [name for name, *_ in shown] == list(micro.TASKS)
    for name, prompt, answer, answers in shown:
        assert (prompt, answer) in [(row["prompt"], row["answer"]) for row in micro.rows(name, "train")]
        assert micro.TASKS[name].words in ("", answers)


def test_the_tokenizer_knows_every_word_and_needs_every_word():
    tokenizer = micro.tokenizer()
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}) == 3
    texts = [row[key] for task in micro.TASKS for split in ("train", "test") for row in micro.rows(task, split)[::2]
             for key in ("prompt", "hard_prompt", "answer")]
    texts += [micro.perturb(row["prompt"], 0) for task in micro.TASKS for row in micro.rows(task, "test")[::4]]
    texts += [part for document in micro.documents(0, 300) for pair in document for part in pair]
    for text, ids in zip(texts[::5], tokenizer(texts[::5]).input_ids):
        assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids) == text
    assert tokenizer("the zebra").input_ids[1] == tokenizer.unk_token_id
    assert {word for text in texts for word in text.split()} == set(micro.vocabulary()[3:])  # after pad, eos and unk


@pytest.mark.parametrize("task", micro.TASKS)
def test_perturb_changes_the_text_and_not_the_answer(task):
    seen, seeds_differ = {row["prompt"] for row in micro.rows(task, "train")}, False
    for row in micro.rows(task, "test")[:50]:
        new = micro.perturb(row["prompt"], 3)
        assert new == micro.perturb(row["prompt"], 3) and new != row["prompt"] and new not in seen
        assert "it was" in new and all(f" {span} " in f" {new} " for span in row.get("protected", ()))
        for old_side, new_side in zip(row["prompt"].split(" ; "), new.split(" ; "), strict=True):  # every word with a
            assert sorted(w for w in old_side.split() if w in micro.KIND) == sorted(  # meaning stays on its side
                w for w in new_side.split() if w in micro.KIND)
        ask = row["hard_prompt"].partition(" ask ")[2]
        assert micro.perturb(row["hard_prompt"], 3) == f"{new.removesuffix(' =>')} ask {ask}"
        seeds_differ |= new != micro.perturb(row["prompt"], 4)
    assert seeds_differ


@pytest.fixture(scope="module")
def shipped():
    return load_backbone()


def test_the_shipped_scores_are_high_and_belong_to_the_weights(shipped):
    recorded = json.loads((micro.FOLDER / "scores.json").read_text(encoding="utf-8"))["scores"]
    again = pretrain.score_capabilities(*shipped, count=25)
    assert again.keys() == recorded.keys() and min(recorded.values()) >= 0.95
    assert min(again.values()) >= 0.88 and sum(again.values()) / len(again) >= 0.97  # 22 of 25
    assert (micro.FOLDER / "model.safetensors").stat().st_size <= 4_000_000


@pytest.mark.parametrize("task", micro.TASKS)
def test_the_instruction_in_words_solves_every_task(task, shipped):
    plain = [(row["hard_prompt"], row["answer"]) for row in micro.rows(task, "test")[:60]]
    rewritten = [(micro.perturb(prompt, 0), answer) for prompt, answer in plain]
    assert min(pretrain.share_right(*shipped, plain), pretrain.share_right(*shipped, rewritten)) >= 0.95


@torch.no_grad()
def test_without_the_instruction_the_backbone_is_near_chance(shipped):
    model, tokenizer = shipped
    above = []
    for task in micro.TASKS:
        rows = micro.rows(task, "test")[:100]
        if "choices" not in rows[0]:
            above.append(pretrain.share_right(model, tokenizer, [(row["prompt"], row["answer"]) for row in rows]))
            assert above[-1] <= 0.2, task
            continue
        right = 0
        for row in rows:  # every choice is one word
            logits = model(torch.tensor([tokenizer(row["prompt"]).input_ids])).logits[0, -1]
            ids = tokenizer.convert_tokens_to_ids(row["choices"])
            right += row["choices"][logits[ids].argmax()] == row["answer"]
        above.append(right / len(rows) - 1 / len(rows[0]["choices"]))
    assert max(above) <= 0.3 and sum(above) / len(above) <= 0.1
