r"""Rewriting Chinese input text so that the label stays: the "unseen" version of a test set.

Each operation changes word or clause order, or the form of a sentence, in one field of the input:

    swap            the two sentences of a symmetric pair change places
    sentence_order  A。B。 -> B。A。 (whole sentences, or clauses at ；)
    clause_order    A，B。 -> B，A。
    title_order     A B -> B A (the halves of a news title)
    time_order      他昨天 X -> 昨天他 X, or the other way round
    adverbial_last  在 A，B。 -> B，在 A。
    question_form   X 是谁？ -> 谁是 X？ and X 有哪些？ -> 有哪些，X？
    frame           P。 -> 情况是这样的：P。 (where nothing else applies)

Only what is safe is done: no part may begin with a word that leans on what came before (但, 所以, 这, 他 ...), brackets
and quotation marks stay closed, protected strings (answers, the two names of a relation) occur as often as before, and
the names of a relation stay together. 把 and 被, negation and quantifiers are left alone: moving them changes meanings.
"""

import random
import re

SENTENCE = re.compile(r"([。！？!?；;…]+)")
CLAUSE = re.compile(r"(，+|,+(?!\d))")  # not the comma of 25,000
# Words that lean on what came before; as the first word of a part they forbid moving it.
LEANING = re.compile(
    "[但却而则且并也还又再就才都其此该这那它他她之以使令让即故亦些乃与和或及跟同仍更只便竟於後雖從這還個的了吧吗嗎呢啊：:、」”』》）]|"
    "不过|可|然后|于是|因此|因而|因为|由于|所以|虽|尽管|儘管|如果|要是|除非|无论|無論|不管|不但|不仅|否则|接着|随后|最后|"
    "最终|首先|其次|总之|总体|总算|结果|居然|终于|甚至|尤其|特别是|比如|例如|另外|反而|毕竟|包括|从而|既|若|假如|前者|后者|"
    "後者|至于|当然|所谓|原来|一来|二来|一方面|另一|应该|是"
)
OPEN, CLOSE = "“‘《「『（(【[", "”’》」』）)】]"
SUBJECT = "我们|你们|他们|她们|它们|人们|大家|我|你|他|她"
TIME = "昨天|今天|明天|昨晚|今晚|今早|去年|今年|明年|前年|上周|下周|上个月|下个月|现在|目前|最近|当时|以前|从前|平时"
PART = "[^，,。！？!?；;：:]"
ADVERBIAL = re.compile(
    f"^((?:在|当|随着|通过|根据|按照|为了|关于|对于|對於|根據|當|隨著|為了|自从|自從|到|从|從){PART}{{2,30}}|"
    f"{PART}{{0,12}}(?:年|月|日|时|時|期间|期間|后|後|前)(?:初|末|底|间|間)?)[，,]({PART}{{4,}})([。！？!?；;]?)"
)
WH = "什么|什麼|谁|誰|哪|多少|多大|多长|多長|多高|几|幾|何|怎"
NOT_AFTER = "(?<![但于還还就也都不只可总而或没沒设設具拥擁享含占佔著刻带帶建])"  # 是, 有 as a part of another word
INVERTED = re.compile(f"^(.{{2,}}?){NOT_AFTER}是(什么|什麼|谁|誰|哪里|哪裡|哪儿|哪个|哪個|哪位|何人)$")
DISLOCATED = re.compile(
    f"^(.{{2,}}?){NOT_AFTER}((?:大约|大約|约|約|主要|一共|共|总共)?(?:是|有|位于|位於|叫|毕业于).{{0,4}}?(?:{WH}).*)$"
)


def rewrite(values: dict[str, str], task, protected: tuple[str, ...], rng: random.Random) -> tuple[dict[str, str], str]:
    """New field values and the operation that made them; the old values and "" if no operation of the task is safe.

    values: field name -> text; task: its `rewrite` names the operations, tried in random order, `frame` last."""
    field = "question" if "question" in values else task.passage
    names = [name for name in task.rewrite if name != "frame"]
    rng.shuffle(names)
    for name in names + (["frame"] if "frame" in task.rewrite else []):
        if name == "swap":
            first, second = task.group
            new = values | {first: values[second], second: values[first]}
        else:
            together = task.kind == "closed" and len(protected) > 1
            new = values | {field: OPERATIONS[name](values[field], protected if together else (), rng)}
        if new != values and all(new[field].count(text) == values[field].count(text) for text in protected):
            return new, name
    return values, ""


def _balanced(text: str) -> bool:
    return all(text.count(a) == text.count(b) for a, b in zip(OPEN, CLOSE)) and text.count('"') % 2 == 0


def _rotate(text: str, marks: re.Pattern, together: tuple[str, ...], rng: random.Random) -> str:
    """A1 m A2 m .. An m -> Ak m .. An m A1 m .. Ak-1 m; the marks stay where they are."""
    parts = marks.split(text)
    texts, between = parts[::2] if parts[-1] else parts[:-1:2], parts[1::2]
    sound = all(len(part.strip()) > 1 and _balanced(part) for part in texts)
    if len(texts) < 2 or not sound or LEANING.match(texts[0].strip()):
        return text
    holders = {n for n, part in enumerate(texts) for name in together if name in part}
    cuts = [n for n in range(1, len(texts))
            if not LEANING.match(texts[n].strip()) and (min(holders, default=n) >= n or max(holders) < n)
            and all(any(name in part for part in texts) for name in together)]
    if not cuts:
        return text
    cut = rng.choice(cuts)
    return "".join(a + b for a, b in zip(texts[cut:] + texts[:cut], between + [""]))


def sentence_order(text: str, together: tuple[str, ...], rng: random.Random) -> str:
    if re.search("[?？]", text):  # a question and its answer
        return text
    return _rotate(text, SENTENCE, together, rng)


def clause_order(text: str, together: tuple[str, ...], rng: random.Random) -> str:
    """Within the one sentence of a text: commas of different sentences must not mix."""
    body, end = re.fullmatch(r"(.*?)([。！？!?；;…\s]*)", text, re.S).groups()
    if SENTENCE.search(body):
        return text
    return _rotate(body, CLAUSE, together, rng) + end


def title_order(text: str, together: tuple[str, ...], rng: random.Random) -> str:
    halves = re.split(r"[ \u3000]+", text)
    if len(halves) != 2 or not all(len(half) > 3 and _balanced(half) and not LEANING.match(half) for half in halves):
        return text
    return f"{halves[1]} {halves[0]}"


def time_order(text: str, together: tuple[str, ...], rng: random.Random) -> str:
    new = re.sub(f"^({SUBJECT})({TIME})(?![的是，,])", r"\2\1", text)
    return new if new != text else re.sub(f"^({TIME})[，,]?({SUBJECT})(?![的是，,])", r"\2\1", text)


def adverbial_last(text: str, together: tuple[str, ...], rng: random.Random) -> str:
    found = ADVERBIAL.match(text)
    if not found or not _balanced(found[1]) or not _balanced(found[2]) or LEANING.match(found[2]) or re.match(
            "[，,]", text[found.end() :]):
        return text
    return f"{found[2]}，{found[1]}{found[3]}{text[found.end():]}"


def question_form(text: str, together: tuple[str, ...], rng: random.Random) -> str:
    body, end = re.fullmatch(r"(.*?)([？?。\s]*)", text, re.S).groups()
    if re.search("[，,；;：:。？?！!]", body) or not _balanced(body):
        return text
    if found := INVERTED.match(body):
        return f"{found[2]}是{found[1]}{end}"
    if (found := DISLOCATED.match(body)) and not re.search(WH, found[1]):
        return f"{found[2]}，{found[1]}{end}"
    return text


def frame(text: str, together: tuple[str, ...], rng: random.Random) -> str:
    if re.search("[?？!！]", text) or not re.search("[\u4e00-\u9fff]", text):
        return text
    return f"情况是这样的：{text}"


OPERATIONS = {function.__name__: function for function in (
    sentence_order, clause_order, title_order, time_order, adverbial_last, question_form, frame)}
