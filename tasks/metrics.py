r"""How answers are scored. With p the tokens of a prediction and r those of a reference:

    exact match   1 if p = r for one of the references
    character F1  as in the script of CMRC 2018: with m the length of the longest common *contiguous* token sequence,
                  P = m / |p|,  R = m / |r|,  F1 = 2 P R / (P + R) = 2 m / (|p| + |r|),  the best over all references
    micro F1      as in the script of SanWen and FinRE (thunlp/Chinese_NRE): "no relation" is left out of both
                  P = right / predicted relations,  R = right / questions with a relation,  F1 = 2 P R / (P + R)
    macro F1      the mean over all answers, "no relation" as well, of the F1 of each
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from difflib import SequenceMatcher

NAMES = {"micro_f1": "micro F1 (no relation left out)"}  # of metrics in tables, where the key does not say it all
DROPPED = set("-:_*^/\\~`+=,;!?()\"'<>[]{}|…。“”‘’《》〈〉·•、「」『』【】〔〕—–〜﹏")  # as they look after NFKC
TOKEN = re.compile(r"[a-z0-9]+(?:\.[a-z0-9]+)*|\S")  # "3.5" is one token (the script splits Latin words with nltk)


def normalize(text: str) -> list[str]:
    """Tokens to compare, without case and punctuation: "《Harry Potter》第3.5章。" -> harry potter 第 3.5 章."""
    text = unicodedata.normalize("NFKC", text).lower()
    kept = "".join(character for character in text if character not in DROPPED)
    tokens = [token for token in TOKEN.findall(kept) if token != "."]
    return tokens or text.split()  # an answer that is nothing but punctuation is compared as it stands


def exact_match(prediction: str, references: Sequence[str]) -> float:
    return float(any(normalize(prediction) == normalize(reference) for reference in references))


def char_f1(prediction: str, references: Sequence[str]) -> float:
    best, p = 0.0, normalize(prediction)
    for r in map(normalize, references):
        m = SequenceMatcher(None, p, r, autojunk=False).find_longest_match().size
        best = max(best, 2 * m / (len(p) + len(r)) if m else 0.0)
    return best


def accuracy(predictions: Sequence[str], golds: Sequence[tuple[str, ...]]) -> float:
    """The share of right predictions; golds: all right answers of each row."""
    return sum(p in gold for p, gold in zip(predictions, golds, strict=True)) / len(golds)


def micro_f1(predictions: Sequence[str], golds: Sequence[tuple[str, ...]],
             left_out: Sequence[str] = ("无关",)) -> float:
    """The F1 of all answers but those left out. A row is to be found if one of its right answers is a relation."""
    right = sum(p in gold and p not in left_out for p, gold in zip(predictions, golds, strict=True))
    predicted = sum(p not in left_out for p in predictions)
    true = sum(not set(gold) <= set(left_out) for gold in golds)
    return 2 * right / (predicted + true) if right else 0.0


def macro_f1(predictions: Sequence[str], golds: Sequence[tuple[str, ...]]) -> float:
    """The mean F1 of the answers that occur. Of several right ones of a row, the predicted one counts as its gold,
    otherwise the first."""
    golds = [p if p in gold else gold[0] for p, gold in zip(predictions, golds, strict=True)]
    right, both = Counter(p for p, gold in zip(predictions, golds) if p == gold), Counter([*predictions, *golds])
    return sum(2 * right[name] / both[name] for name in sorted(both)) / len(both)


def majority(answers: Sequence[str]) -> str:
    """The most frequent answer, the first in sorted order on a tie: the baseline that reads nothing."""
    counts = Counter(answers)
    return min(counts, key=lambda answer: (-counts[answer], answer))
