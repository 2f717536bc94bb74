"""The micro-world: what is apart stays apart, rows mean what they say, and the shipped backbone knows every skill."""

import itertools
import json
from collections import Counter

import pytest
import torch

import pretrain
import toy

ALL = [*toy.SOURCES, *toy.TARGETS]


def apart(clause):
    """Pairs of words of one clause, by kind: written anew, from word lists alone, to check `held_out` and its users."""
    words = clause.split()
    topic = [t for t, aspects in enumerate(toy.ASPECTS.values()) for w in words if w in aspects.split()]
    aspect = [w for w in words if any(w in a.split() for a in toy.ASPECTS.values())]
    place = [w for w in words if w in itertools.chain(*toy.PLACES)]
    adjective = [w for w in words if w in itertools.chain(*toy.ADJECTIVES)]
    relation = [r for r, verbs in enumerate(toy.VERBS) for w in words if w in verbs]
    name, city = [w for w in words if w in toy.NAMES], [w for w in words if w in toy.CITIES]
    return {*itertools.product(["topic"], topic, place), *itertools.product(["adjective"], adjective, aspect),
            *itertools.product(["relation"], relation, place), *itertools.product(["name"], name, city)}


def pairs(text):
    body = text.removesuffix(" =>").split(" ask ")[0]
    return set().union(*(apart(clause) for side in body.split(" ; ") for clause in side.split(" , ")))


def test_sixteen_tasks_of_the_right_shape():
    assert len(toy.SOURCES) == len(toy.TARGETS) == 8 and not set(toy.SOURCES) & set(toy.TARGETS)
    for task in ALL:
        train, test = toy.rows(task, "train"), toy.rows(task, "test")
        assert len(train) == 2000 and len(test) == 200
        for row in train + test:
            assert row["prompt"].endswith(" =>") and row["hard_prompt"].endswith(" =>")
            assert row["hard_prompt"].startswith(row["prompt"].removesuffix(" =>") + " ask ")
            assert " ask " not in row["prompt"]
            if "choices" in row:
                assert row["answer"] in row["choices"] and len(set(row["choices"])) == len(row["choices"])
            else:
                assert row["references"] == [row["answer"]]
                assert all(f" {span} " in f" {row['prompt']} " for span in row["protected"])
    with pytest.raises(ValueError, match="dev"):
        toy.rows("toy-bq", "dev")


def test_train_and_test_share_no_example_and_no_held_out_pair():
    trained = set()
    for task in ALL:
        train, test = toy.rows(task, "train"), toy.rows(task, "test")
        assert len({row["prompt"] for row in train + test}) == 2200
        assert not {row["group"] for row in train} & {row["group"] for row in test}
        trained |= set().union(*(pairs(row["prompt"]) for row in train))
    for document in toy.documents(0, 3000):
        for text, _ in document:
            trained |= pairs(text)
    for task in ALL:
        for row in toy.rows(task, "test"):
            assert pairs(row["prompt"]) - trained, row["prompt"]
    kinds = Counter(kind for kind, *_ in trained)
    assert min(kinds.values()) > 25 and len(kinds) == 4  # the check saw pairs of all kinds


@pytest.mark.parametrize("task", ALL)
def test_labels_are_balanced(task):
    for split in ("train", "test"):
        rows = toy.rows(task, split)
        if "choices" not in rows[0] or task == "toy-c3":
            assert max(Counter(row["answer"] for row in rows).values()) < len(rows) / 4
            continue
        counts = Counter(row["answer"] for row in rows)
        assert set(counts) == set(rows[0]["choices"]) and max(counts.values()) - min(counts.values()) <= 1


def test_an_option_is_never_a_word_of_the_text():
    for row in toy.rows("toy-c3", "test"):
        text, options = row["prompt"].removesuffix(" =>").split(" ; ")
        assert sorted(options.split(" or ")) == sorted(row["choices"])
        assert not set(row["choices"]) & set(text.split())


def test_rows_and_documents_are_deterministic():
    first = toy.rows("toy-cmnli", "train")
    first[0]["prompt"] = "changed by a caller"
    again = toy.rows("toy-cmnli", "train")
    assert again[0]["prompt"] != "changed by a caller"
    toy._rows.cache_clear()
    assert toy.rows("toy-cmnli", "train") == again
    assert toy.documents(1, 20) == toy.documents(1, 20) != toy.documents(2, 20)


def test_the_tokenizer_knows_every_word(tmp_path):
    tokenizer = toy.tokenizer()
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}) == 3
    texts = [row[key] for task in ALL for split in ("train", "test") for row in toy.rows(task, split)[::2]
             for key in ("prompt", "hard_prompt", "answer")]
    texts += [toy.perturb(row["prompt"], 0) for task in ALL for row in toy.rows(task, "test")[::4]]
    texts += [part for document in toy.documents(0, 300) for pair in document for part in pair]
    for text, ids in zip(texts, tokenizer(texts).input_ids):
        assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids) == text
    assert tokenizer("the zebra").input_ids[1] == tokenizer.unk_token_id
    used = {word for text in texts for word in text.split()}
    assert used == set(toy.vocabulary()) - {toy.PAD, toy.EOS, toy.UNK}  # and no word is there for nothing
    tokenizer.save_pretrained(tmp_path)
    assert type(tokenizer).from_pretrained(tmp_path)(texts[0]).input_ids == tokenizer(texts[0]).input_ids


@pytest.mark.parametrize("task", ALL)
def test_perturb_changes_the_text_and_not_the_answer(task):
    seen = {row["prompt"] for row in toy.rows(task, "train")}
    variants = set()
    for row in toy.rows(task, "test")[:50]:
        new = toy.perturb(row["prompt"], 3)
        assert new == toy.perturb(row["prompt"], 3) and new != row["prompt"] and new not in seen
        assert "it was" in new and new.endswith(" =>")
        assert all(f" {span} " in f" {new} " for span in row.get("protected", ()))
        # Every word that carries meaning is still there, in its order among the sides.
        for old_side, new_side in zip(row["prompt"].split(" ; "), new.split(" ; "), strict=True):
            assert sorted(w for w in old_side.split() if w in toy.KIND) == sorted(
                w for w in new_side.split() if w in toy.KIND)
        ask = row["hard_prompt"].partition(" ask ")[2]
        assert toy.perturb(row["hard_prompt"], 3) == f"{new.removesuffix(' =>')} ask {ask}"
        variants.add(new != toy.perturb(row["prompt"], 4))
    assert True in variants  # another seed, another text, somewhere


# ------------------------------------------------------------------------------------------------ the shipped backbone


@pytest.fixture(scope="module")
def shipped():
    return toy.load_backbone()


def test_shipped_scores_are_high_and_belong_to_the_weights(shipped):
    record = json.loads((toy.FOLDER / "scores.json").read_text(encoding="utf-8"))
    assert min(record["scores"].values()) >= 0.95
    again = pretrain.score_capabilities(*shipped, count=25)
    assert again.keys() == record["scores"].keys() and min(again.values()) >= 0.88  # 22 of 25
    assert sum(again.values()) / len(again) >= 0.97
    assert (toy.FOLDER / "model.safetensors").stat().st_size <= 4_000_000


@pytest.mark.parametrize("task", ALL)
def test_the_instruction_in_words_solves_every_task(task, shipped):
    rows = toy.rows(task, "test")[:60]
    plain = [(row["hard_prompt"], row["answer"]) for row in rows]
    assert pretrain.answers_right(*shipped, plain) >= 0.95
    perturbed = [(toy.perturb(row["hard_prompt"], 0), row["answer"]) for row in rows]
    assert pretrain.answers_right(*shipped, perturbed) >= 0.95


@torch.no_grad()
def test_without_the_instruction_the_backbone_is_near_chance(shipped):
    model, tokenizer = shipped
    above = []
    for task in ALL:
        rows = toy.rows(task, "test")[:100]
        if "choices" not in rows[0]:
            above.append(pretrain.answers_right(model, tokenizer, [(row["prompt"], row["answer"]) for row in rows]))
            assert above[-1] <= 0.2, task
            continue
        right = 0
        for row in rows:  # every choice is one word
            logits = model(torch.tensor([tokenizer(row["prompt"]).input_ids])).logits[0, -1]
            ids = tokenizer.convert_tokens_to_ids(row["choices"])
            right += row["choices"][logits[ids].argmax()] == row["answer"]
        above.append(right / len(rows) - 1 / len(rows[0]["choices"]))
        assert above[-1] <= 0.3, task
    assert sum(above) / len(above) <= 0.1
