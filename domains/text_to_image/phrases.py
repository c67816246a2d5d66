"""What the prompts of T2I-CompBench name: things, numbers of things, and where they are.

The benchmark's program takes spaCy's parser. These rules are made for its prompts, which have few
forms ("a green bench and a blue bowl", "four tents, two boats and one pig"); of free sentences they
find most things, and a verb now and then.
"""

import re
from dataclasses import dataclass

__all__ = ["PLACES", "Counted", "Placed", "counted_things", "noun_phrases", "placed_things"]

PLACES = (
    *("on the side of", "on side of", "next to", "near"),
    *("on the left of", "on the right of", "on the bottom of", "on the top of", "on top of"),
)
"""Words for places, as the benchmark has them."""

_ARTICLES = {"a", "an", "the", "some", "its", "his", "her", "their", "this", "that"}
_NUMBERS = {
    name: number
    for number, name in enumerate(
        ("one", "two", "three", "four", "five", "six", "seven", "eight"), start=1
    )
} | {"a": 1, "an": 1}
_BREAKS = {
    *("and", "or", "but", "as", "while", "with", "without", "in", "inside", "on", "onto", "of"),
    *("at", "by", "from", "for", "over", "under", "above", "below", "behind", "beside", "between"),
    *("next", "near", "into", "through", "off", "to", "against", "around", "across", "up", "down"),
    *("is", "are", "was", "were", "be", "has", "have", "had", "sits", "stands", "lies", "hangs"),
    *("holds", "held", "contrasted", "rests", "lounges", "bounces", "creaks", "shifts", "drift"),
    *("glints", "towers", "clink", "surrounds", "covers", "complements", "stands", "hit", "lay"),
    *("that", "which", "who", "together", "front", "top", "side"),
}
_WORD = re.compile(r"[\w'-]+|[,.;:]")
_PLURALS = (("ies", "y"), ("ches", "ch"), ("shes", "sh"), ("sses", "ss"), ("xes", "x"), ("s", ""))
_IRREGULAR = {
    **{"men": "man", "women": "woman", "people": "person", "children": "child", "mice": "mouse"},
    **{"sheep": "sheep", "fish": "fish", "geese": "goose", "knives": "knife", "glasses": "glasses"},
    **{"scissors": "scissors", "wolves": "wolf", "leaves": "leaf", "shelves": "shelf"},
}


@dataclass(frozen=True)
class Counted:
    """A number of things of a kind, whose name is in the singular."""

    number: int
    name: str


@dataclass(frozen=True)
class Placed:
    """Two things, and where the first one is from the second."""

    first: str
    place: str
    second: str


def noun_phrases(prompt: str) -> list[str]:
    """Return the things that a prompt names, each with its article and adjectives."""
    phrases: list[list[str]] = [[]]
    for word in _WORD.findall(prompt):
        known = word.lower()
        if known in _BREAKS or word in ",.;:":
            # A comma between adjectives parts nothing: "a long, narrow kitchen".
            if word != "," or not _is_opening(phrases[-1]):
                phrases.append([])
        elif known in _ARTICLES | set(_NUMBERS) and phrases[-1]:
            phrases.append([word])
        else:
            phrases[-1].append(word)
    kept = [_without_verb(own) for own in phrases if {w.lower() for w in own} - _ARTICLES]
    return [" ".join(own) for own in kept]


def counted_things(prompt: str) -> list[Counted]:
    """Return the numbers of things that a prompt asks for: "two boats and one pig"."""
    words, found = [word.lower() for word in _WORD.findall(prompt)], []
    for i, word in enumerate(words):
        if word not in _NUMBERS:
            continue
        number, name = _NUMBERS[word], _named(words[i + 1 :], plural=_NUMBERS[word] > 1)
        if name:
            found.append(Counted(number, name))
    return found


def placed_things(prompt: str) -> Placed | None:
    """Return the two things of a prompt with a place: "a giraffe next to a lamp"; None without."""
    text = prompt.lower()
    place = next((place for place in PLACES if f" {place} " in text), None)
    if place is None:
        return None
    before, after = text.split(f" {place} ", 1)
    first, second = noun_phrases(before), noun_phrases(after)
    if not first or not second:
        return None
    return Placed(_bare(first[-1]), place, _bare(second[0]))


def _named(words: list[str], *, plural: bool) -> str:
    """Return the name in the singular that follows a number; two words where the first is none."""
    name: list[str] = []
    for word in words[:2]:
        if word in _BREAKS or word in ",.;:":
            break
        name.append(word)
        if plural and _singular(word) != word:
            break
        if plural and word in _IRREGULAR:
            break
    else:
        # "one man walked": of two words the second is a part of the name unless it is a verb.
        if not plural and len(name) == 2 and name[1].endswith(("ed", "ing", "s")):
            name.pop()
    return " ".join([*name[:-1], _singular(name[-1])]) if name and plural else " ".join(name)


def _singular(word: str) -> str:
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    for ending, single in _PLURALS:
        if word.endswith(ending) and not word.endswith("ss"):
            return word.removesuffix(ending) + single
    return word


def _bare(phrase: str) -> str:
    words = phrase.split()
    return " ".join(words[1:] if words[0].lower() in _ARTICLES and words[1:] else words)


def _without_verb(words: list[str]) -> list[str]:
    """Leave out a verb in the past that follows: "the diamond ring adorned"."""
    verb = len(words) > 2 and words[0].lower() in _ARTICLES and words[-1].endswith("ed")
    return words[:-1] if verb else words


def _is_opening(words: list[str]) -> bool:
    """Return whether an article and one adjective are all that there is of a phrase."""
    return len(words) == 2 and words[0].lower() in _ARTICLES
