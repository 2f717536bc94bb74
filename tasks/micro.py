r"""The micro-world: a language of 180 words and sixteen tasks, so that everything runs offline in minutes.

A soft prompt can only elicit what the frozen model already knows, so the world has two halves:

    pretraining    the oslo cafe had very lovely soup ask topic as kitchen travel film tech games money => kitchen
    a task         the oslo cafe had very lovely soup                                                   => kitchen

The backbone is pretrained on text that carries the instruction: `ask`, a *capability* (topic, stars, nli ...) and a
*convention*, the words in which to answer, one per class. The tasks hide it: a task's prompt has to rediscover which
capability is meant and which words to use. `hard_prompt` of a row puts the instruction back (the upper reference). No
text gives its instruction away: of two options either one may be asked for, and a question may stand there for its
answer, for its counterpart or for nothing.

Some topics never meet some places, some adjectives some aspects, some relations some places, some names some cities,
neither in pretraining nor in the train rows of a task; every test row holds at least one such pair (`held_out`). One
sentence template and the distractor clauses occur in pretraining but in no row of a task: `perturb` uses them.
"""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

FOLDER = Path(__file__).parent / "micro_backbone"  # made by `python -m tasks.pretrain`
TRAIN_ROWS, TEST_ROWS = 2000, 200  # of every task

Meaning = dict[str, str]  # what a clause says: kind of word -> word

# Words ---------------------------------------------------------------------------------------------------------------
ASPECTS = {  # topic -> aspects; the first three topics are domain 0, the others domain 1
    "food": "soup bread cake tea menu cook".split(),
    "travel": "train flight tour map cabin guide".split(),
    "film": "plot actor scene music ending script".split(),
    "tech": "screen phone laptop camera keyboard battery".split(),
    "sport": "coach race goal team referee final".split(),
    "money": "loan salary tax price stock rent".split(),
}
TOPICS = list(ASPECTS)
PLACES = ["cafe hotel market pier hall garden".split(), "office shop stadium bank tower club".split()]  # by domain
ADJECTIVES = [  # by polarity: negative, neutral, positive; neighbours are synonyms
    "awful terrible dull boring poor shabby".split(),
    "plain simple usual normal".split(),
    "lovely charming superb splendid pleasant nice".split(),
]
VERBS = ["owns holds".split(), "founded started".split(), "left quit".split(), "joined entered".split()]  # by relation
NAMES = "ann bob carl dora eve finn gina hugo".split()
CITIES = "oslo rome paris cairo lima delhi".split()
DISTRACTORS = ["it rained on monday", "the bus came late", "on friday the sky was blue", "we all slept well"]
EVEN = (0, 0, 1, 2, 2)  # polarities to draw from, so that five stars are equally frequent

# Capability -> its conventions: the answer words in the order of the classes.
CONVENTIONS = {
    "sentiment": ["negative positive", "sad happy", "one five"],
    "stars": ["one two three four five", "worst weak middling strong best"],
    "topic": [" ".join(TOPICS), "kitchen trips movies gadgets games finance", "one two three four five six"],
    "similar": ["differ same", "no yes", "two one"],  # not a paraphrase, a paraphrase
    "match": ["apart alike", "no yes", "one two"],  # the same question; numbers the other way round
    "nli": ["false unsure true", "no maybe yes", "one two three"],  # contradiction, neutral, entailment
    "about": ["differ same", "no yes"],  # are both statements about one thing; with `mood`, the two halves of nli:
    "mood": ["differ same", "no yes"],  # alone they are learned early, and nli without them not at all
    "relation": ["owner founder former member", "boss maker gone staff", "one two three four"],
}
CONVENTIONS = {name: [words.split() for words in rows] for name, rows in CONVENTIONS.items()}
SPANS = ["aspect", "mrc", "rest"]  # copied from the text: what is reviewed, the answer to a question, its counterpart
OPTIONS = ["choice", "other"]  # of two options the one that fits the text, the one that does not
REVIEW, PAIR = ["sentiment", "stars", "topic", "aspect"], ["similar", "match", "nli", "about", "mood"]  # by text
QUESTIONS = {"name": "who was it", "where": "where was it", "aspect": "what was it", "how": "how was it"}
COUNTERPART = {"name": "where", "where": "name", "aspect": "how", "how": "aspect"}  # the other half of the same clause
PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"

KIND: dict[str, tuple[str, int]] = {}  # word -> (kind, index of its group): all the grammar that `parse` needs
for kind, groups in (("aspect", ASPECTS.values()), ("place", PLACES), ("adjective", ADJECTIVES), ("verb", VERBS),
                     ("name", [NAMES]), ("city", [CITIES])):
    KIND.update({word: (kind, index) for index, group in enumerate(groups) for word in group})
WORDS, ALL_PLACES, ALL_ADJECTIVES = list(KIND), sum(PLACES, []), sum(ADJECTIVES, [])

# Sentences and their meaning -----------------------------------------------------------------------------------------
def parse(clause: str) -> Meaning:
    """Meaning of one clause; kinds are aspect, adjective, verb, place, name, city, and `very`."""
    return {KIND.get(word, (word,))[0]: word for word in clause.split() if word in KIND or word == "very"}


def say(meaning: Meaning, template: int) -> str:
    """A meaning in words. Templates 0, 1, 2 are for everyone; template 3 never occurs in the rows of a task."""
    part = {"at": "", "for": "", "to": "", "name": "we", "where": "it", **meaning}
    if "place" in meaning:
        part["where"] = f"the {meaning['city']} {meaning['place']}"
        part["at"] = "at " + part["where"]
    if "verb" in meaning:
        text = ("{name} {verb} {where}", "{where} is what {name} {verb}", "now {name} {verb} {where}",
                "it was {name} that {verb} {where}")[template]
    else:
        part["how"] = f"very {meaning['adjective']}" if "very" in meaning else meaning["adjective"]
        if "name" in meaning:
            part |= {"for": "for " + meaning["name"], "to": "to " + meaning["name"]}
        text = ("the {aspect} {at} was {how} {for}", "{name} found the {aspect} {how} {at}",
                "{where} had {how} {aspect} {for}", "{at} it was the {aspect} that seemed {how} {to}")[template]
    return " ".join(text.format(**part).split())


def held_out(text: str) -> bool:
    """True if a clause of the text joins two words that training keeps apart."""
    for clause in text.replace(" ; ", " , ").split(" , "):
        said = parse(clause)
        if "place" in said:
            place = ALL_PLACES.index(said["place"])
            if "aspect" in said and (2 * KIND[said["aspect"]][1] + place) % 5 == 0:  # topic with place
                return True
            if "verb" in said and (KIND[said["verb"]][1] + place) % 4 == 0:  # relation with place
                return True
        if {"aspect", "adjective"} <= said.keys() and (
                3 * ALL_ADJECTIVES.index(said["adjective"]) + WORDS.index(said["aspect"])) % 5 == 0:
            return True
        if {"name", "city"} <= said.keys() and (NAMES.index(said["name"]) + CITIES.index(said["city"])) % 4 == 0:
            return True
    return False


def draw_review(rng: random.Random, domain: int, polarities: tuple[int, ...] = (0, 1, 2), short=False) -> Meaning:
    """Meaning of a random review of a domain; a short one says neither where nor for whom."""
    topic, polarity = rng.choice(TOPICS[3 * domain : 3 * domain + 3]), rng.choice(polarities)
    review = {"aspect": rng.choice(ASPECTS[topic]), "adjective": rng.choice(ADJECTIVES[polarity])}
    if rng.random() < 0.5 and polarity != 1:
        review["very"] = "very"
    if not short:
        review |= {"city": rng.choice(CITIES), "place": rng.choice(PLACES[domain])}
        if rng.random() < 0.3:
            review["name"] = rng.choice(NAMES)
    return review


def draw_fact(rng: random.Random, domain: int) -> Meaning:
    """Meaning of a random fact: who owns, founded, left or joined which place."""
    return {"name": rng.choice(NAMES), "verb": rng.choice(rng.choice(VERBS)), "city": rng.choice(CITIES),
            "place": rng.choice(PLACES[domain])}


def synonym(adjective: str) -> str:
    return ALL_ADJECTIVES[ALL_ADJECTIVES.index(adjective) ^ 1]  # its neighbour


def draw_hypothesis(rng: random.Random, premise: Meaning, label: int) -> Meaning:
    """Meaning of a second statement: 0 contradiction (opposite polarity), 1 neutral (other topic), 2 entailment."""
    topic, polarity = KIND[premise["aspect"]][1], KIND[premise["adjective"]][1]
    second = {"aspect": premise["aspect"], "adjective": synonym(premise["adjective"])}
    if label == 0 or (label == 1 and rng.random() < 0.5):
        second["adjective"] = rng.choice(ADJECTIVES[2 - polarity])
    if label == 1:
        others = [other for other in TOPICS[topic // 3 * 3 : topic // 3 * 3 + 3] if other != TOPICS[topic]]
        second["aspect"] = rng.choice(ASPECTS[rng.choice(others)])
    return second


def draw_options(rng: random.Random, review: Meaning) -> tuple[str, str]:
    """Two options, of which one fits the text by meaning, never by a word of the text: (fitting, other)."""
    if rng.random() < 0.5:
        fitting = synonym(review["adjective"])
        return fitting, rng.choice(ADJECTIVES[rng.choice([p for p in range(3) if p != KIND[fitting][1]])])
    names, topic = rng.choice(CONVENTIONS["topic"][:2]), KIND[review["aspect"]][1]
    return names[topic], names[rng.choice([other for other in range(6) if other != topic])]


def class_of(capability: str, meaning: Meaning, second: Meaning | None = None) -> int:
    """Class of a statement, or in PAIR of two: an index into the words of any convention of the capability."""
    if capability in PAIR:
        same_thing = second["aspect"] == meaning["aspect"]
        same_mood = KIND[second["adjective"]][1] == KIND[meaning["adjective"]][1]
        if capability == "nli":
            return 1 if not same_thing else 2 if same_mood else 0
        return int({"about": same_thing, "mood": same_mood}.get(capability, same_thing and same_mood))
    if capability in ("topic", "relation"):
        return KIND[meaning["aspect" if capability == "topic" else "verb"]][1]
    polarity = KIND[meaning["adjective"]][1]
    if capability == "sentiment":
        return polarity // 2
    return 2 + (polarity - 1) * (2 if "very" in meaning else 1)  # stars


def answer_question(fact: Meaning, review: Meaning, question: str) -> dict[str, str]:
    """What a fact and a review say to one of QUESTIONS: {"mrc": its answer, "rest": its counterpart}."""
    said = {"name": fact["name"], "where": f"{fact['city']} {fact['place']}", "aspect": review["aspect"],
            "how": f"{review.get('very', '')} {review['adjective']}".strip()}
    return {"mrc": said[question], "rest": said[COUNTERPART[question]]}


# Tasks ---------------------------------------------------------------------------------------------------------------
class MicroTask(NamedTuple):
    capability: str
    domains: tuple[int, ...]
    words: str = ""  # the label words in class order, "" for spans and options


TASKS = {
    "toy-afqmc": MicroTask("similar", (0, 1), "two one"),
    "toy-amazon": MicroTask("stars", (0, 1), "one two three four five"),
    "toy-thucnews": MicroTask("topic", (0, 1), "one two three four five money"),
    "toy-bq": MicroTask("match", (0, 1), "one two"),
    "toy-cmnli": MicroTask("nli", (0,), "one maybe three"),
    "toy-cmrc2018": MicroTask("mrc", (0,)),
    "toy-sanwen": MicroTask("relation", (0,), "owner maker former staff"),
    "toy-cote_mfw": MicroTask("aspect", (0,)),
    "toy-chnsenticorp": MicroTask("sentiment", (0, 1), "sad five"),
    "toy-tnews": MicroTask("topic", (0, 1), "one two movies four games money"),  # 4 of 6 words agree with toy-thucnews
    "toy-ocnli": MicroTask("nli", (1,), "one unsure three"),  # 2 of 3 agree with toy-cmnli
    "toy-lcqmc": MicroTask("similar", (0, 1), "two same"),  # 1 of 2 agrees with toy-afqmc
    "toy-drcd": MicroTask("mrc", (1,)),
    "toy-c3": MicroTask("other", (0, 1)),  # the option that does not fit: unasked, the backbone takes the one that does
    "toy-cote_bd": MicroTask("aspect", (1,)),
    "toy-finre": MicroTask("relation", (1,), "owner maker former member"),  # 3 of 4 agree with toy-sanwen
}
SOURCES, TARGETS = tuple(TASKS)[:8], tuple(TASKS)[8:]


def instruction(capability: str, words: str = "") -> str:
    """The instruction in words, e.g. `ask topic as one two three four five money`."""
    return f"ask {capability} as {words}" if words else f"ask {capability}"


def draw_candidate(rng: random.Random, capability: str, domain: int) -> tuple[str, int | str, list[str] | None]:
    """One random text for a capability: -> (body, class index or answer words, options or None)."""
    template = rng.randrange(3)
    if capability in PAIR:
        premise = draw_review(rng, domain, (0, 2))
        second = draw_hypothesis(rng, premise, rng.randrange(3))
        body = f"{say(premise, template)} ; {say(second, rng.randrange(3))}"
        return body, class_of(capability, premise, second), None
    if capability in ("mrc", "rest", *OPTIONS):
        fact, review = draw_fact(rng, domain), draw_review(rng, domain, short=True)
        body = f"{say(fact, template)} , {say(review, rng.choice([0, 2]))}"
        if capability not in OPTIONS:
            question = rng.choice(list(QUESTIONS))
            return f"{body} ; {QUESTIONS[question]}", answer_question(fact, review, question)[capability], None
        fitting, other = draw_options(rng, review)
        options = rng.sample([fitting, other], 2)
        return f"{body} ; {options[0]} or {options[1]}", fitting if capability == "choice" else other, options
    if capability == "relation":
        fact = draw_fact(rng, domain)
        return say(fact, template), class_of(capability, fact), None
    review = draw_review(rng, domain, (0, 2) if capability == "sentiment" else EVEN)
    return say(review, template), review["aspect"] if capability == "aspect" else class_of(capability, review), None


@cache
def rows(name: str, split: str) -> list[dict]:
    """Rows of a task (a name of TASKS) and a split (train or test): dicts with prompt, hard_prompt, answer, group, and
    choices (closed sets) or references (spans). Deterministic, labels balanced."""
    task, rng = TASKS[name], random.Random(f"{name} {split}")
    words, found = task.words.split(), {}  # text -> row
    taken = {row["group"] for row in rows(name, "train")} if split == "test" else set()
    while len(found) < (TRAIN_ROWS if split == "train" else TEST_ROWS):
        body, answer, options = draw_candidate(rng, task.capability, rng.choice(task.domains))
        wanted = answer == len(found) % len(words) if words else True  # balanced labels
        group = " ".join(word for word in body.split(" ; ")[0].split() if word in KIND)  # what the first side says
        if not wanted or body in found or group in taken or held_out(body) != (split == "test"):
            continue
        found[body] = {"prompt": f"{body} =>", "hard_prompt": f"{body} {instruction(task.capability, task.words)} =>",
                       "answer": words[answer] if words else answer, "group": group}
        found[body] |= ({"choices": words or options} if words or options else
                        {"references": [answer], "protected": [answer]})
    return list(found.values())


def perturb(prompt: str, seed: int) -> str:
    """The prompt, with or without instruction, with its statements in the template, and with the distractor clauses,
    that task training never shows. The answer stays the same."""
    body, ask, tail = prompt.removesuffix(" =>").partition(" ask ")
    rng = random.Random(f"{seed} {body}")
    sides = []
    for side in body.split(" ; "):
        clauses = [parse(clause) for clause in side.split(" , ")]
        if all("verb" in said or {"aspect", "adjective"} <= said.keys() for said in clauses):
            side = with_distractor(rng, " , ".join(say(said, 3) for said in clauses), probability=0.5)
        sides.append(side)  # a question or two options stay as they are
    return " ; ".join(sides) + ask + tail + " =>"


def with_distractor(rng: random.Random, text: str, probability: float) -> str:
    if rng.random() >= probability:
        return text
    return " , ".join(rng.sample([text, rng.choice(DISTRACTORS)], 2))


# Pretraining text and the tokenizer ----------------------------------------------------------------------------------
def draw_document(rng: random.Random) -> list[tuple[str, str]]:
    """One pretraining text, a statement or two and 1 to 4 questions about them: list of (text up to `=>`, answer)."""
    form, domain = rng.choices(["review", "pair", "reading", "fact"], [1, 5, 5, 1])[0], rng.randrange(2)
    while True:
        review = draw_review(rng, domain, (0, 2) if form == "pair" else EVEN, short=form == "reading")
        fact = draw_fact(rng, domain)
        second = draw_hypothesis(rng, review, rng.choice([0, 1, 1, 2])) if form == "pair" else None
        said = {"review": [[review]], "fact": [[fact]], "reading": [[fact, review]], "pair": [[review], [second]]}[form]
        template = [3 if rng.random() < 0.2 else rng.randrange(3) for _ in range(2)]
        sides = [" , ".join(map(say, side, template[i:])) for i, side in enumerate(said)]
        if not held_out(" ; ".join(sides)):
            break
    text = " ; ".join(with_distractor(rng, side, 0.25) for side in sides)
    questions = []
    for _ in range(rng.randint(1, 4)):
        extra, answers = "", {"aspect": review["aspect"]}
        if form == "reading":  # there is a question or two options; the instruction says whether they are meant
            question, options = rng.choice(list(QUESTIONS)), draw_options(rng, review)
            answers |= {**answer_question(fact, review, question), "choice": options[0], "other": options[1]}
            is_question = rng.random() < 0.5
            extra = " ; " + (QUESTIONS[question] if is_question else " or ".join(rng.sample(options, 2)))
            meant = ["mrc", "rest"] if is_question else OPTIONS
            capabilities = meant if rng.random() < 0.6 else [*REVIEW, "relation"]
        else:
            capabilities = {"review": REVIEW, "pair": PAIR, "fact": ["relation"]}[form]
        neutral = KIND[review["adjective"]][1] == 1
        capability = rng.choice([name for name in capabilities if name != "sentiment" or not neutral])
        words, known = [], CONVENTIONS.get(capability)
        if known:  # one of the conventions or, half of the time, each class in its own
            words = rng.choice(known) if rng.random() < 0.5 else [rng.choice(column) for column in zip(*known)]
            answers[capability] = words[class_of(capability, fact if capability == "relation" else review, second)]
        asking = instruction(capability, " ".join(words))
        questions.append((f"{text}{extra} {asking} =>".strip(), answers[capability]))
        text = ""  # the next question follows the answer
    return questions


def documents(seed: int, count: int) -> list[list[tuple[str, str]]]:
    """Pretraining text: `count` documents, each a list of (text, answer)."""
    rng = random.Random(f"pretraining {seed}")
    return [draw_document(rng) for _ in range(count)]


def vocabulary() -> list[str]:
    """All words of the language in a fixed order, special tokens first."""
    grammar = "=> ; , ask as or the at was very found had for to it that seemed is what now we who where how".split()
    capabilities = [*CONVENTIONS, *SPANS, *OPTIONS]
    labels = [word for rows in CONVENTIONS.values() for row in rows for word in row]
    distractors = " ".join(DISTRACTORS).split()
    return list(dict.fromkeys([PAD, EOS, UNK, *grammar, *distractors, *capabilities, *labels, *WORDS]))


def tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer, one token a word; pad, eos and unk differ."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary())}, unk_token=UNK))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token=PAD, eos_token=EOS, unk_token=UNK)
