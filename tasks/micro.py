r"""The micro-world: a language of 180 words and sixteen tasks, so that everything runs offline in minutes.

A soft prompt can only elicit what the frozen model already knows. So the world is built in two halves:

    pretraining    the oslo cafe had very lovely soup ask topic as kitchen travel film tech games money => kitchen
    a task         the oslo cafe had very lovely soup                                                   => kitchen

The backbone is pretrained on text that carries the instruction: `ask`, a *capability* (topic, stars, nli ...) and the
*convention*, that is the words in which to answer, one per class. The tasks hide the instruction: a task's prompt has
to rediscover which capability is meant and which words to use. `hard_prompt` of a row puts the instruction back; its
score is the upper reference. No text gives its instruction away: of two options the one that fits is asked for, or the
other, and a question may stand there for its answer, for its counterpart or for nothing.

Two things keep the tasks from being solved by one prompt for all. Tasks read the same kind of text (reviews, pairs of
statements), so the text does not say which task it is. And their label words overlap with different meanings, as the
numeric labels of real data sets do: `one` is one star for toy-amazon, food for toy-thucnews, a paraphrase for toy-afqmc
and no paraphrase for toy-bq.

What training keeps apart: some topics never meet some places, some adjectives never meet some aspects, some relations
some places, some names some cities, neither in pretraining nor in the train rows of a task. Every test row holds at
least one such pair (`held_out`). One sentence template and the distractor clauses occur in pretraining but in no row
of a task: `perturb` rewrites a prompt with them. There is no entity binding in this world: a text has one fact at most.
"""

import random
from collections import namedtuple
from functools import cache
from pathlib import Path

EVEN = (0, 0, 1, 2, 2)  # polarities to draw from, so that five stars are equally frequent
FOLDER = Path(__file__).parent / "toy_backbone"  # made by `python train.py --stage pretrain`

# ---------------------------------------------------------------------------------------------------------------- words

ASPECTS = {  # topic -> aspects; the first three topics are domain 0, the others domain 1
    "food": "soup bread cake tea menu cook",
    "travel": "train flight tour map cabin guide",
    "film": "plot actor scene music ending script",
    "tech": "screen phone laptop camera keyboard battery",
    "sport": "coach race goal team referee final",
    "money": "loan salary tax price stock rent",
}
TOPICS = list(ASPECTS)
PLACES = ["cafe hotel market pier hall garden".split(), "office shop stadium bank tower club".split()]  # by domain
# Synonym pairs (neighbours) by polarity: negative, neutral, positive.
ADJECTIVES = [
    "awful terrible dull boring poor shabby".split(),
    "plain simple usual normal".split(),
    "lovely charming superb splendid pleasant nice".split(),
]
VERBS = ["owns holds".split(), "founded started".split(), "left quit".split(), "joined entered".split()]  # by relation
NAMES = "ann bob carl dora eve finn gina hugo".split()
CITIES = "oslo rome paris cairo lima delhi".split()
DISTRACTORS = ["it rained on monday", "the bus came late", "on friday the sky was blue", "we all slept well"]

# Capability -> its conventions: the answer words in the order of the classes.
CONVENTIONS = {
    "sentiment": ["negative positive", "sad happy", "one five"],
    "stars": ["one two three four five", "worst weak middling strong best"],
    "topic": [" ".join(TOPICS), "kitchen trips movies gadgets games finance", "one two three four five six"],
    "similar": ["differ same", "no yes", "two one"],  # not a paraphrase, a paraphrase
    "match": ["apart alike", "no yes", "one two"],  # the same question; numbers the other way round
    "nli": ["false unsure true", "no maybe yes", "one two three"],  # contradiction, neutral, entailment
    "about": ["differ same", "no yes"],  # are both statements about one thing; with `mood`, the two halves of nli:
    "mood": ["differ same", "no yes"],  # alone they are learnt early, and nli without them not at all
    "relation": ["owner founder former member", "boss maker gone staff", "one two three four"],
}
CONVENTIONS = {name: [words.split() for words in rows] for name, rows in CONVENTIONS.items()}
SPANS = ["aspect", "mrc", "rest"]  # copied from the text: what is reviewed, the answer to a question, its counterpart
OPTIONS = ["choice", "other"]  # of two options the one that fits the text, the one that does not
REVIEW, PAIR = ["sentiment", "stars", "topic", "aspect"], ["similar", "match", "nli", "about", "mood"]  # by text
QUESTIONS = {"name": "who was it", "where": "where was it", "aspect": "what was it", "how": "how was it"}
COUNTERPART = {"name": "where", "where": "name", "aspect": "how", "how": "aspect"}  # the other half of the same clause
PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"

KIND = {}  # word -> (kind, index); what a word is, is all the grammar that `parse` needs
for t, words in enumerate(ASPECTS.values()):
    KIND.update({word: ("aspect", t) for word in words.split()})
for kind, groups in (("place", PLACES), ("adjective", ADJECTIVES), ("verb", VERBS)):
    KIND.update({word: (kind, g) for g, group in enumerate(groups) for word in group})
KIND.update({word: ("name", 0) for word in NAMES} | {word: ("city", 0) for word in CITIES})
WORDS = list(KIND)

# ------------------------------------------------------------------------------------------------ sentences and meaning


def parse(clause):
    """Meaning of one clause: dict kind -> word; kinds are aspect, adjective, verb, place, name, city, and `very`."""
    meaning = {KIND[word][0]: word for word in clause.split() if word in KIND}
    if "very" in clause.split():
        meaning["very"] = "very"
    return meaning


def say(meaning, template):
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
            part.update({"for": "for " + meaning["name"], "to": "to " + meaning["name"]})
        text = ("the {aspect} {at} was {how} {for}", "{name} found the {aspect} {how} {at}",
                "{where} had {how} {aspect} {for}", "{at} it was the {aspect} that seemed {how} {to}")[template]
    return " ".join(text.format(**part).split())


def held_out(text):
    """True if a clause of the text joins two words that training keeps apart."""
    for clause in text.replace(" ; ", " , ").split(" , "):
        m = parse(clause)
        place = m.get("place") and sum(PLACES, []).index(m["place"])
        if place is not None:
            if "aspect" in m and (2 * KIND[m["aspect"]][1] + place) % 5 == 0:  # topic with place
                return True
            if "verb" in m and (KIND[m["verb"]][1] + place) % 4 == 0:  # relation with place
                return True
        if "aspect" in m and "adjective" in m:
            if (3 * sum(ADJECTIVES, []).index(m["adjective"]) + WORDS.index(m["aspect"])) % 5 == 0:
                return True
        if "name" in m and "city" in m and (NAMES.index(m["name"]) + CITIES.index(m["city"])) % 4 == 0:
            return True
    return False


def review(rng, domain, polarities=(0, 1, 2), short=False):
    """Meaning of a random review of a domain; a short one says neither where nor for whom."""
    topic = rng.choice(TOPICS[3 * domain : 3 * domain + 3])
    polarity = rng.choice(polarities)
    m = {"aspect": rng.choice(ASPECTS[topic].split()), "adjective": rng.choice(ADJECTIVES[polarity])}
    if rng.random() < 0.5 and polarity != 1:
        m["very"] = "very"
    if not short:
        m.update(city=rng.choice(CITIES), place=rng.choice(PLACES[domain]))
        if rng.random() < 0.3:
            m["name"] = rng.choice(NAMES)
    return m


def fact(rng, domain):
    return {"name": rng.choice(NAMES), "verb": rng.choice(rng.choice(VERBS)), "city": rng.choice(CITIES),
            "place": rng.choice(PLACES[domain])}


def synonym(word):
    group = next(group for group in ADJECTIVES if word in group)
    return group[group.index(word) ^ 1]


def hypothesis(rng, premise, label):
    """Meaning of a second statement: 0 contradiction (opposite polarity), 1 neutral (other topic), 2 entailment."""
    topic, polarity = KIND[premise["aspect"]][1], KIND[premise["adjective"]][1]
    m = {"aspect": premise["aspect"], "adjective": synonym(premise["adjective"])}
    if label == 0 or (label == 1 and rng.random() < 0.5):
        m["adjective"] = rng.choice(ADJECTIVES[2 - polarity])
    if label == 1:
        others = [t for t in TOPICS[topic // 3 * 3 : topic // 3 * 3 + 3] if t != TOPICS[topic]]
        m["aspect"] = rng.choice(ASPECTS[rng.choice(others)].split())
    return m


def options(rng, m):
    """Two options of which one fits the text by meaning, never by a word of the text: -> (fitting, other)."""
    if rng.random() < 0.5:
        fit = synonym(m["adjective"])
        return fit, rng.choice(ADJECTIVES[rng.choice([p for p in range(3) if p != KIND[fit][1]])])
    names, topic = rng.choice(CONVENTIONS["topic"][:2]), KIND[m["aspect"]][1]
    return names[topic], names[rng.choice([t for t in range(6) if t != topic])]


def label_of(capability, m, second=None):
    """Class index of a capability for a meaning; the capabilities of PAIR compare it with a second one."""
    if capability in PAIR:
        about = second["aspect"] == m["aspect"]
        mood = KIND[second["adjective"]][1] == KIND[m["adjective"]][1]
        return int({"about": about, "mood": mood, "nli": (2 * mood if about else 1)}.get(capability, about and mood))
    if capability == "topic":
        return KIND[m["aspect"]][1]
    if capability == "relation":
        return KIND[m["verb"]][1]
    polarity = KIND[m["adjective"]][1]
    return polarity // 2 if capability == "sentiment" else 2 + (polarity - 1) * (2 if "very" in m else 1)


def spans(who, what, question):
    """What a fact and a review have to say to one of QUESTIONS: {"mrc": its answer, "rest": its counterpart}."""
    said = {"name": who["name"], "where": f"{who['city']} {who['place']}", "aspect": what["aspect"],
            "how": f"{what.get('very', '')} {what['adjective']}".strip()}
    return {"mrc": said[question], "rest": said[COUNTERPART[question]]}


# ---------------------------------------------------------------------------------------------------------------- tasks

ToyTask = namedtuple("ToyTask", "capability domains words", defaults=(None,))  # words: the labels, in class order
TASKS = {
    "toy-afqmc": ToyTask("similar", (0, 1), "two one"),
    "toy-amazon": ToyTask("stars", (0, 1), "one two three four five"),
    "toy-thucnews": ToyTask("topic", (0, 1), "one two three four five money"),
    "toy-bq": ToyTask("match", (0, 1), "one two"),
    "toy-cmnli": ToyTask("nli", (0,), "one maybe three"),
    "toy-cmrc2018": ToyTask("mrc", (0,)),
    "toy-sanwen": ToyTask("relation", (0,), "owner maker former staff"),
    "toy-cote_mfw": ToyTask("aspect", (0,)),
    "toy-chnsenticorp": ToyTask("sentiment", (0, 1), "sad five"),
    "toy-tnews": ToyTask("topic", (0, 1), "one two movies four games money"),  # 4 of 6 words agree with toy-thucnews
    "toy-ocnli": ToyTask("nli", (1,), "one unsure three"),  # 2 of 3 agree with toy-cmnli
    "toy-lcqmc": ToyTask("similar", (0, 1), "two same"),  # 1 of 2 agrees with toy-afqmc
    "toy-drcd": ToyTask("mrc", (1,)),
    "toy-c3": ToyTask("other", (0, 1)),  # the option that does not fit: unasked, the backbone takes the one that does
    "toy-cote_bd": ToyTask("aspect", (1,)),
    "toy-finre": ToyTask("relation", (1,), "owner maker former member"),  # 3 of 4 agree with toy-sanwen
}
SOURCES, TARGETS = tuple(TASKS)[:8], tuple(TASKS)[8:]
TRAIN_ROWS, TEST_ROWS = 2000, 200


def instruction(capability, words=None):
    """The instruction in words, e.g. `ask topic as one two three four five money`."""
    return f"ask {capability}" + (f" as {words}" if words else "")


def candidate(rng, capability, domain):
    """One random text for a capability: -> (body, class index or answer words, options or None)."""
    template = rng.randrange(3)
    if capability in PAIR:
        premise = review(rng, domain, (0, 2))
        second = hypothesis(rng, premise, rng.randrange(3))
        body = f"{say(premise, template)} ; {say(second, rng.randrange(3))}"
        return body, label_of(capability, premise, second), None
    if capability in ("mrc", "rest", *OPTIONS):
        who, what = fact(rng, domain), review(rng, domain, short=True)
        body = f"{say(who, template)} , {say(what, rng.choice([0, 2]))}"
        if capability not in OPTIONS:
            question = rng.choice(list(QUESTIONS))
            return f"{body} ; {QUESTIONS[question]}", spans(who, what, question)[capability], None
        fit, other = options(rng, what)
        pair = rng.sample([fit, other], 2)
        return f"{body} ; {pair[0]} or {pair[1]}", fit if capability == "choice" else other, pair
    if capability == "relation":
        m = fact(rng, domain)
        return say(m, template), label_of(capability, m), None
    m = review(rng, domain, (0, 2) if capability == "sentiment" else EVEN)
    return say(m, template), m["aspect"] if capability == "aspect" else label_of(capability, m), None


@cache
def _rows(task, split):
    spec, rng = TASKS[task], random.Random(f"{task} {split}")
    words = spec.words and spec.words.split()
    rows, seen = [], set()
    taken = {row["group"] for row in _rows(task, "train")} if split == "test" else set()
    while len(rows) < (TRAIN_ROWS if split == "train" else TEST_ROWS):
        body, answer, choices = candidate(rng, spec.capability, rng.choice(spec.domains))
        wanted = answer == len(rows) % len(words) if words else True  # balanced labels
        group = " ".join(word for word in body.split(" ; ")[0].split() if word in KIND)  # what the first side says
        if not wanted or body in seen or group in taken or held_out(body) != (split == "test"):
            continue
        seen.add(body)
        row = {"prompt": f"{body} =>", "hard_prompt": f"{body} {instruction(spec.capability, spec.words)} =>",
               "answer": words[answer] if words else answer, "group": group}
        if words or choices:
            row["choices"] = words or choices
        else:
            row.update(references=[answer], protected=[answer])
        rows.append(row)
    return rows


def rows(task, split):
    """Rows of a task: dicts with prompt, hard_prompt, answer, group, and choices (closed sets) or references (spans).

    task: a name of SOURCES or TARGETS; split: "train" (2,000 rows) or "test" (200). Deterministic, labels balanced.
    Raises KeyError for another task, ValueError for another split.
    """
    if split not in ("train", "test"):
        raise ValueError(f"the micro-world has the splits train and test, not {split!r}")
    return [dict(row) for row in _rows(task, split)]


def perturb(prompt, seed):
    """The prompt with its statements in the template, and with the distractor clauses, that task training never shows.

    A pure function of the text (with or without instruction) and the seed; the answer stays the same.
    """
    body, ask, tail = prompt.removesuffix(" =>").partition(" ask ")
    rng = random.Random(f"{seed} {body}")
    sides = []
    for side in body.split(" ; "):
        said = [parse(clause) for clause in side.split(" , ")]
        if not all("verb" in m or {"aspect", "adjective"} <= m.keys() for m in said):
            sides.append(side)  # a question or two options
            continue
        sides.append(with_distractor(rng, " , ".join(say(m, 3) for m in said), probability=0.5))
    return " ; ".join(sides) + ask + tail + " =>"


def with_distractor(rng, text, probability):
    if rng.random() >= probability:
        return text
    return " , ".join(rng.sample([text, rng.choice(DISTRACTORS)], 2))


# --------------------------------------------------------------------------------------------------- pretraining, words


def convention(rng, capability):
    """Words to answer in: one of the capability's conventions or, half of the time, each class in its own."""
    known = CONVENTIONS[capability]
    return rng.choice(known) if rng.random() < 0.5 else [rng.choice(words) for words in zip(*known, strict=True)]


def document(rng):
    """One pretraining text: list of (text up to `=>`, answer), a statement or two and 1 to 4 questions about them."""
    form, domain = rng.choices(["review", "pair", "reading", "fact"], [1, 5, 5, 1])[0], rng.randrange(2)
    while True:
        m, who = review(rng, domain, (0, 2) if form == "pair" else EVEN, short=form == "reading"), fact(rng, domain)
        second = form == "pair" and hypothesis(rng, m, rng.choice([0, 1, 1, 2]))
        said = {"review": [[m]], "fact": [[who]], "reading": [[who, m]], "pair": [[m], [second]]}[form]
        template = [3 if rng.random() < 0.2 else rng.randrange(3) for _ in range(2)]
        sides = [" , ".join(map(say, side, template[i:])) for i, side in enumerate(said)]
        if not held_out(" ; ".join(sides)):
            break
    text = " ; ".join(with_distractor(rng, side, 0.25) for side in sides)
    questions = []
    for _ in range(rng.randint(1, 4)):
        extra, answers = "", {"aspect": m["aspect"]}
        if form == "reading":  # there is a question or two options; the instruction says whether they are meant
            asked, fitting = rng.choice(list(QUESTIONS)), options(rng, m)
            answers.update(spans(who, m, asked), choice=fitting[0], other=fitting[1])
            is_question = rng.random() < 0.5
            extra = " ; " + (QUESTIONS[asked] if is_question else " or ".join(rng.sample(fitting, 2)))
            meant = ["mrc", "rest"] if is_question else OPTIONS
            capabilities = meant if rng.random() < 0.6 else [*REVIEW, "relation"]
        else:
            capabilities = {"review": REVIEW, "pair": PAIR, "fact": ["relation"]}[form]
        capability = rng.choice([c for c in capabilities if c != "sentiment" or KIND[m["adjective"]][1] != 1])
        words = None
        if capability in CONVENTIONS:
            words = convention(rng, capability)
            answers[capability] = words[label_of(capability, who if capability == "relation" else m, second)]
        asking = instruction(capability, words and " ".join(words))
        questions.append((f"{text}{extra} {asking} =>".strip(), answers[capability]))
        text = ""  # the next question follows the answer
    return questions


def documents(seed, count):
    """Pretraining text: `count` documents, each a list of (text, answer)."""
    rng = random.Random(f"pretraining {seed}")
    return [document(rng) for _ in range(count)]


def vocabulary():
    """All words of the language in a fixed order, special tokens first."""
    grammar = "=> ; , ask as or the at was very found had for to it that seemed is what now we who where how".split()
    capabilities = [*CONVENTIONS, *SPANS, *OPTIONS]
    labels = [word for rows in CONVENTIONS.values() for row in rows for word in row]
    distractors = " ".join(DISTRACTORS).split()
    return list(dict.fromkeys([PAD, EOS, UNK, *grammar, *distractors, *capabilities, *labels, *WORDS]))


def tokenizer():
    """The word tokenizer as a transformers PreTrainedTokenizerFast; pad, eos and unk differ."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary())}, unk_token=UNK))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token=PAD, eos_token=EOS, unk_token=UNK)


def load_backbone(folder=FOLDER):
    """The shipped backbone and its tokenizer -> (Qwen2ForCausalLM in eval mode, PreTrainedTokenizerFast).

    Raises FileNotFoundError if the folder holds no backbone.
    """
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    if not (Path(folder) / "config.json").exists():
        raise FileNotFoundError(f"no backbone in {folder}; make it with: python train.py --stage pretrain")
    backbone = AutoModelForCausalLM.from_pretrained(folder, dtype="float32", local_files_only=True,
                                                    use_safetensors=True, trust_remote_code=False)
    # AutoTokenizer would take the tokenizer of any Qwen2 model for Qwen's own byte-level one.
    return backbone.eval(), PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
