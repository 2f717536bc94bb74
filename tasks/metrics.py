r"""How answers are scored. With p the tokens of a prediction and r those of a reference:

    exact match   1 if p = r for one of the references
    character F1  as in the script of CMRC 2018: with m the length of the longest common *contiguous* token sequence,
                  P = m / |p|,  R = m / |r|,  F1 = 2 P R / (P + R) = 2 m / (|p| + |r|),  the best over all references
    relation F1   2 right / (predicted + true) of one name; micro: of the sums over all names, macro: the mean over
                  names; both with and without the name for "no relation" (with it, micro F1 is accuracy)
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from difflib import SequenceMatcher

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


def relation_f1(predictions: Sequence[str], golds: Sequence[tuple[str, ...]],
                ignore: Sequence[str] = ("无关",)) -> dict[str, float]:
    """micro_f1, macro_f1 of all names that occur, and micro_f1_known, macro_f1_known without those in `ignore`. Of
    several right names of a row, the predicted one counts as its gold, otherwise the first."""
    right, predicted, true = Counter(), Counter(), Counter()
    for prediction, gold in zip(predictions, golds, strict=True):
        predicted[prediction] += 1
        true[prediction if prediction in gold else gold[0]] += 1
        right[prediction] += prediction in gold
    scores, occurring = {}, predicted.keys() | true.keys()
    for suffix, names in (("", occurring), ("_known", occurring - set(ignore))):
        total = sum(predicted[name] + true[name] for name in names)
        each = [2 * right[name] / (predicted[name] + true[name]) for name in sorted(names)]
        scores[f"micro_f1{suffix}"] = 2 * sum(right[name] for name in names) / total if total else 0.0
        scores[f"macro_f1{suffix}"] = sum(each) / len(each) if each else 0.0
    return scores


def majority(answers: Sequence[str]) -> str:
    """The most frequent answer, the first in sorted order on a tie: the baseline that reads nothing."""
    counts = Counter(answers)
    return min(counts, key=lambda answer: (-counts[answer], answer))
