"""What reaches a backbone is what it was trained on: begin token, spaces, turns of a chat, weights, positions.

The tokenizers are small ones of both kinds that the families have: byte-level BPE, as Qwen and Llama 3 use it, and
SentencePiece's (Metaspace), as Llama 2 and Mistral use it, which puts a space in front of whatever it tokenises.
"""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import save_small_backbone, small_run
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

import data
import evaluate
import train
from checkpoint import UserError
from data import Example, encode, tokens_of
from model import NO_TASK, AdaptedLM, TALoRA, load_backbone
from tasks import micro

TEXTS = ["Review: lovely soup. Sentiment: good", "Review: awful rooms. Sentiment: bad", "推测几颗星。星级：五星 一星"]
MARKS = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "<|im_start|>", "<|im_end|>", "<|head|>", "<|/head|>", "<|eot|>"]
FAMILIES = {"qwen2": ("bytes",), "qwen3": ("bytes",), "llama": ("bytes", "<s> $A"), "mistral": ("spaces", "<s> $A")}
CFG = SimpleNamespace(test_rows=0, max_length=99, max_new_tokens=6, eval_tokens=200, chat_template="off")
EXAMPLES = [Example("own", f"Review: {words}. Sentiment:", "good", ("good", "bad", "五星", "lovely soup"))
            for words in ("lovely soup", "awful rooms", "五星", "20 dollars and all the words", "a")]

CHATML = ("{% if messages[0].role != 'system' %}<|im_start|>system\nHelp.<|im_end|>\n{% endif %}{% for m in messages %}"
          "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
QWEN3 = CHATML.replace("\n{{", "\n{% if loop.last and m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{")
LLAMA3 = ("{{ bos_token }}<|head|>system<|/head|>\n\nToday.<|eot|>{% for m in messages %}<|head|>{{ m.role }}<|/head|>"
          "\n\n{{ m.content }}<|eot|>{% endfor %}"
          "{% if add_generation_prompt %}<|head|>assistant<|/head|>\n\n{% endif %}")
NEMO = ("{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]"
        "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}")
MISTRAL = NEMO.replace("[INST]{{", "[INST] {{").replace("{% else %}{{", "{% else %} {{")
LLAMA2 = ("{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]"
          "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}")


def make_tokenizer(kind, around="$A", template=None):
    """kind: "bytes" or "spaces"; around: what the tokenizer puts around a text; template: of a chat."""
    tokenizer, alphabet = Tokenizer(models.BPE(unk_token="<unk>")), pre_tokenizers.ByteLevel.alphabet()
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    if kind == "spaces":
        tokenizer.pre_tokenizer, alphabet = pre_tokenizers.Metaspace(prepend_scheme="first", split=False), []
        tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(TEXTS * 9, trainers.BpeTrainer(
        vocab_size=420, special_tokens=MARKS, initial_alphabet=alphabet, show_progress=False))
    tokenizer.post_processor = TemplateProcessing(single=around, special_tokens=[("<s>", 1), ("</s>", 2)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.chat_template = template
    return fast


@pytest.mark.parametrize("kind, around, begin, end", [
    ("bytes", "$A", 0, 0), ("bytes", "<s> $A", 1, 0), ("spaces", "<s> $A", 1, 0), ("bytes", "<s> $A </s>", 1, 1)])
def test_a_prompt_has_in_front_what_its_tokenizer_puts_there_and_nothing_behind(kind, around, begin, end):
    tokenizer = make_tokenizer(kind, around)
    row, whole = encode(EXAMPLES[0], tokenizer, 99), tokenizer(EXAMPLES[0].prompt).input_ids
    assert (whole[0] == 1, whole[-1] == 2) == (begin, end)
    assert row.prompt_ids.tolist() == whole[: len(whole) - end] and row.answer_ids[-1] == 2


@pytest.mark.parametrize("prompt, choices, behind", [("推测几颗星。星级：", ("五星", "一星"), True),
                                                     ("Sentiment: b", ("五星", "ad"), False)])  # "bad" is one token
def test_answers_have_the_tokens_behind_their_prompt_where_none_of_them_merges_with_it(prompt, choices, behind):
    tokenizer = make_tokenizer("spaces", "<s> $A")
    row, before = encode(Example("own", prompt, "五星", choices), tokenizer, 99), len(tokenizer(prompt).input_ids)
    joint = [(*tokenizer(prompt + choice).input_ids[before:], 2) for choice in choices]
    alone = [(*tokens_of(tokenizer, choice), 2) for choice in choices]
    assert joint[0] != alone[0] and row.answer_ids == row.choice_ids[0]
    assert [*row.choice_ids] == (joint if behind else alone)


def test_the_name_of_a_special_token_in_a_row_is_text():
    tokenizer, texts = make_tokenizer("bytes", "<s> $A"), ("what does </s> end <s>?", "the </s> ends a text")
    row = encode(Example("own", *texts), tokenizer, 99)
    parts = row.prompt_ids[1:], row.answer_ids[:-1]
    assert [tokenizer.decode(ids, skip_special_tokens=True) for ids in parts] == [*texts]


@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_transformers_alone(family, opened, tiny_backbone, open_adapter):
    tokenizer, one = make_tokenizer(*FAMILIES[family]), torch.tensor([0])
    plain, backbone = (tiny_backbone(family, vocab_size=len(tokenizer)) for _ in range(2))
    model = open_adapter(backbone) if opened else TALoRA(backbone, ["a"])  # a new adapter's gates are zero

    @torch.no_grad()
    def logits(ids):  # without cache and padding
        ids = torch.tensor([ids])
        return model(ids, torch.ones_like(ids), one).logits[0] if opened else plain(ids).logits[0]

    chosen, written = [], []
    for example in EXAMPLES:
        ids, new, scores, row = tokenizer(example.prompt).input_ids, [], [], encode(example, tokenizer, 99)
        while len(new) < CFG.max_new_tokens and 2 not in new:
            new.append(int(logits(ids + new)[-1].argmax()))
        written.append(tokenizer.decode(new, skip_special_tokens=True).strip())
        for choice in example.choices:
            answer = [*tokenizer(example.prompt + choice).input_ids[len(ids):], 2]
            log_p = logits(ids + answer).log_softmax(-1)[len(ids) - 1:-1]
            scores.append(log_p[range(len(answer)), answer].sum())
        chosen.append(example.choices[scores.index(max(scores))])
        ours = model.score(*data.collate_prompts([row]), one, [row.choice_ids])[0]
        torch.testing.assert_close(ours, torch.stack(scores), rtol=1e-4, atol=1e-3)
    assert evaluate.predict(model, tokenizer, EXAMPLES, 0, CFG) == chosen
    unguided = [Example("own", example.prompt, "good") for example in EXAMPLES]
    assert evaluate.predict(model, tokenizer, unguided, 0, CFG) == written and any(written)


@pytest.mark.parametrize("kind, around, template, prompt, answer", [
    ("bytes", "$A", CHATML, "<|im_start|> user\n hello <|im_end|> \n <|im_start|> assistant\n", "good <|im_end|>"),
    ("bytes", "<s> $A", LLAMA3, "<s> <|head|> user <|/head|> \n\n hello <|eot|> <|head|> assistant <|/head|> \n\n",
     "good <|eot|>"),
    ("bytes", "<s> $A", NEMO, "<s> [INST] hello [/INST]", "good </s>"),
    ("bytes", "$A", QWEN3, "<|im_start|> user\n hello <|im_end|> \n <|im_start|> "
          "assistant\n<think>\n\n</think>\n\n", "good <|im_end|>"),  # as the template answers without thinking
    ("bytes", "<s> $A", MISTRAL, "<s> [INST] ~hello [/INST]", "~good </s>"),
    ("spaces", "<s> $A", MISTRAL, "<s> [INST] hello [/INST]", "good </s>"),  # each with the space in front
    ("bytes", "<s> $A", LLAMA2, "<s> [INST] ~hello~ [/INST]", "~good~ </s>")])
def test_a_chat_template_gives_one_turn_of_the_user_and_one_of_the_assistant(kind, around, template, prompt, answer):
    tokenizer = make_tokenizer(kind, around, template)
    row = encode(Example("own", "hello", "good", ("good", "bad")), tokenizer, 99, chat=True)
    for ids, parts in ((row.prompt_ids, prompt), (row.answer_ids, answer)):
        parts = [part.replace("~", " ") for part in parts.split(" ")]
        spelled = [[MARKS.index(part)] if part in MARKS else tokens_of(tokenizer, part) for part in parts]
        assert [*ids] == sum(spelled, [])


def test_a_line_break_at_the_end_of_a_prompt_hides_no_space():
    tokenizer = make_tokenizer("spaces", "<s> $A")
    row = encode(Example("own", "Sentiment:\n", "good", ("good", "bad")), tokenizer, 99)
    assert row.answer_ids[:-1] == tuple(tokens_of(tokenizer, "Sentiment:\ngood")[len(row.prompt_ids) - 1:])


def test_a_chat_template_that_cannot_be_used_is_refused():
    for template, words in (("{{ raise_exception('roles') }}", "roles"), (None, "is not set")):
        with pytest.raises(UserError, match=f"{words}.*--chat-template off"):
            encode(EXAMPLES[0], make_tokenizer("bytes", template=template), 99, chat=True)


@pytest.mark.parametrize("asked, template, name, ends, chosen, words", [
    ("on", None, "base", [], "on", "as asked for"), ("off", CHATML, "x-Instruct", [], "off", "as asked for"),
    ("auto", None, "x-Instruct", [], "off", "has none"), ("auto", CHATML, "up/x-Instruct", [], "on", "name"),
    ("auto", CHATML, "Chat-7B/", [], "on", "name"), ("auto", CHATML, "base", [2, 6], "on", "the end of a turn"),
    ("auto", CHATML, "instructions/base", [2], "off", "does not call itself")])
def test_auto_takes_the_template_of_what_calls_itself_a_chat_model(asked, template, name, ends, chosen, words):
    found = data.choose_chat_template(asked, name, ends, make_tokenizer("bytes", template=template))
    assert found[0] == chosen and words in found[1]


def test_a_run_stores_whether_it_uses_the_chat_template_and_its_evaluation_uses_it_too(
        small_world, tmp_path, monkeypatch, capsys):
    tokenizer, run, chats, whole = micro.tokenizer(), tmp_path / "run", [], encode
    tokenizer.add_tokens([AddedToken(mark, special=True) for mark in ("<|im_start|>", "<|im_end|>")])
    tokenizer.chat_template = CHATML
    monkeypatch.setattr(micro, "tokenizer", lambda: tokenizer)
    world = save_small_backbone(tmp_path)
    train.main(small_run(world, run, "--stage", "multitask", "--chat-template", "on"))
    assert "chat template on (as asked for)" in capsys.readouterr().out.partition("== base")[0]
    read = [json.loads((run / name).read_text()) for name in ("multitask/stage.json", "multitask/best/adapter.json")]
    assert [stored.get("about", stored)["chat_template"] for stored in read] == ["on", "on"]
    monkeypatch.setattr(data, "encode", lambda *given: chats.append(given[4]) or whole(*given))
    evaluate.main(["--run", str(run), "--task", "toy-amazon", "--ask", "ann found the soup nice"])
    assert chats == [True]
    with pytest.raises(UserError, match="chat_template"):
        train.main(small_run(world, run, "--chat-template", "off"))


def edit(path, **entries):
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


@pytest.fixture
def folder(tmp_path, tiny_backbone):
    tokenizer = make_tokenizer("bytes", "<s> $A")
    tiny_backbone("llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("config", [
    {"attn_implementation": "flash_attention_2"}, {"rope_parameters": {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}},
    {"_attn_implementation": "flash_attention_2"}])
def test_a_folder_loads_that_declares_another_tokenizer_flash_attention_or_yarn(config, folder):
    text = "Review: 好喝 soup 2023. Sentiment:"
    edit(folder / "tokenizer_config.json", tokenizer_class="LlamaTokenizerFast")
    edit(folder / "config.json", **config)
    backbone, tokenizer = load_backbone(folder)
    assert tokenizer(text).input_ids == Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
    assert tokenizer.decode(tokens_of(tokenizer, text)) == text
    assert evaluate.predict(AdaptedLM(backbone), tokenizer, EXAMPLES[:1], NO_TASK, CFG)


def test_weights_that_are_stored_as_integers_are_refused(folder):
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = (100 * weights["lm_head.weight"]).to(torch.int8)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="stored as F32, I8; give plain ones"):
        load_backbone(folder)


def test_rows_longer_than_the_positions_of_the_backbone_give_one_warning_before_training(tmp_path, small_world, capsys):
    shutil.copytree(small_world, tmp_path / "short")
    edit(tmp_path / "short" / "config.json", max_position_embeddings=8)
    train.main(small_run(tmp_path / "short", tmp_path / "run", "--stage", "base"))
    before, _, after = capsys.readouterr().out.partition("== base")
    assert before.count("only 8 positions; lower --max-length") == 1 and "positions; lower" not in after
