"""Noun phrases of T2I-CompBench's prompts, by lists of the words that part them.

The original takes spaCy's noun chunks. These rules know no parts of speech: what parts phrases are
articles, numbers, prepositions, pronouns, auxiliaries and the verbs of the sets' sentences. Of
prompts like "a red car and a blue dog" the phrases are the same; sentences with other verbs may
keep a verb in a phrase. Pronouns ("it"), which spaCy counts as phrases, are none here.
"""

import re
from collections.abc import Iterator

__all__ = ["count_of", "head", "noun_phrases", "singular", "without_article"]

_WORD = re.compile(r"[^\W_]+(?:['\u2019:.-][^\W_]+)*|[,.;:!?]")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


NUMBERS = {
    word: number
    for number, words in enumerate(
        ("", "a an one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
    for word in words.split()
}
"""Articles and numbers that count things."""
_STARTS = (
    _words("the this that these those its their his her our your my some each every both another")
    | _words("several many no")
    | frozenset(NUMBERS)
)
_BETWEEN = _words(
    "about above across after against ahead along alongside amid among around as at atop "
    "before behind below beneath beside besides between beyond but by despite down during for "
    "from in inside into like near next of off on onto opposite or out outside over past "
    "since through throughout to toward towards under underneath until up upon via while with "
    "within without when where which who whose if because so than then and nor yet it they he "
    "she them him we you i is are was were be been being am has have had having does do did "
    "could will would may might must should not there here together apart away forth aside "
    "instead just only also too very quite still once again never always often nearby "
    "overhead"
)
_VERBS = _words(
    "sit sits sat sitting stand stands stood standing lie lies lay laid lying hang hangs hung "
    "hanging rest rests resting hold holds held holding fall falls fell fly flies flew flying "
    "sleep sleeps slept sleeping speed sped run runs ran rise rises rose swim swam grow grew "
    "shine shone shines cast casts lead led leads make makes made give gives gave keep kept "
    "keeps stick stuck wear wears wore wind wound sing sang blow blew spread spreads creep "
    "crept cling clung swing swung sink sank fill fills cover covers protect protects attract "
    "attracts display displays illuminate illuminates contain contains complement complements "
    "decorate decorates surround surrounds write writes carry carries support supports "
    "brighten brightens lean leans match matches frame frames line lines sparkle sparkles "
    "glow glows go goes went come comes came bring brings brought drive drives drove eat eats "
    "ate cut cuts set sets put puts draw drew drawn take takes took begin began break broke "
    "shake shook throw threw burst read reads meet met melt melts reflect reflects provide "
    "provides offer offers add adds tell tells told look looks see seen saw seem seems feel "
    "feels felt smell smelled taste tasted bend bends build built catch caught become became "
    "find found leave leaving hide hid features perch perched bake bakes mix mixes beat beats "
    "shape shapes strode hidden weave wove slide slid spin spun sweep swept bear bore ring "
    "rang drink drank ride rode"
)
"""Of the sets' sentences; regular ones are known by their endings."""
_NOUNS = _words(
    "sapling painting building ring earring string ceiling lighting wing king clothing thing "
    "spring morning evening crossing railing coating icing dumpling duckling pudding stuffing "
    "frosting wedding landing bedding siding carving carvings dressing seasoning flooring "
    "topping filling setting bed seed weed shed sled feed reed red teddy bear sink set stand "
    "frame frames line lines mix shape shapes match rest seat cover covers cut drink fly rose "
    "features speed"
)
"""Nouns that end as verbs do, or are written as they are."""
_COLORS = _words(
    "red orange yellow green blue purple pink brown black white gray grey tan beige gold silver"
)
_ADVERBS = re.compile(r"[a-z]{4,}ly$")
_ADJECTIVES = _words(
    "fly family jelly belly lily curly prickly lovely friendly ugly silly bubbly wooly woolly "
    "hilly heavenly elderly lively lonely assembly reply butterfly dragonfly prickly oily holy "
    "wobbly crumbly sparkly pebbly bristly wrinkly burly chilly smelly ghostly homely"
)
"""Words that end as adverbs do, and are none."""


def noun_phrases(prompt: str) -> list[str]:
    """Return the noun phrases of a prompt, in order: "a red car", "a blue dog"."""
    words = _WORD.findall(prompt)
    phrases: list[list[str]] = [[]]
    for place, word in enumerate(words):
        if _parts(words, place):
            phrases.append([])
            if word.lower() not in _STARTS:
                continue
        phrases[-1].append(word)
    texts = (_text(phrase) for phrase in phrases)
    return [text for text in texts if text]


def head(phrase: str) -> str:
    """Return the word of a phrase that names the thing: its last one, in small letters."""
    return phrase.split()[-1].lower()


def without_article(phrase: str) -> str:
    """Return a phrase in small letters, without the article or number that it begins with."""
    first, _, rest = phrase.lower().partition(" ")
    return rest if first in _STARTS and rest else phrase.lower()


def count_of(phrase: str) -> tuple[int, str] | None:
    """Return how many of what a phrase asks for, (2, "dog"); None where it counts nothing.

    What follows the plural is left out: "two dogs played fetch" asks for two dogs.
    """
    first, *words = phrase.lower().replace(",", "").split()
    if first not in NUMBERS or not words:
        return None
    number = NUMBERS[first]
    if number > 1:
        plurals = [place for place, word in enumerate(words) if singular(word) != word]
        last = plurals[0] + 1 if plurals else len(words)
        words = [*words[: last - 1], singular(words[last - 1])]
    return number, " ".join(words)


def singular(noun: str) -> str:
    """Return the singular of a noun; one that has no other plural stays as it is."""
    if noun in _PLURALS:
        return _PLURALS[noun]
    for ending, new in (("ies", "y"), ("sses", "ss"), ("ches", "ch"), ("shes", "sh")):
        if noun.endswith(ending) and len(noun) > 5:
            return noun.removesuffix(ending) + new
    for ending in ("xes", "toes", "roes"):
        if noun.endswith(ending):
            return noun.removesuffix("es")
    plural = noun.endswith("s") and not noun.endswith(("ss", "us", "is"))
    return noun.removesuffix("s") if plural else noun


_PLURALS = {
    "men": "man",
    "women": "woman",
    "children": "child",
    "people": "person",
    "mice": "mouse",
    "geese": "goose",
    "feet": "foot",
    "teeth": "tooth",
    "knives": "knife",
    "wives": "wife",
    "lives": "life",
    "cookies": "cookie",
    "movies": "movie",
    "buses": "bus",
    "scissors": "scissors",
    "glasses": "glasses",
    "shoes": "shoe",
    **{f"{stem}ves": f"{stem}f" for stem in ("loa", "wol", "lea", "shel", "scar", "cal", "hal")},
}
"""Plurals that no rule below gives."""


def _parts(words: list[str], place: int) -> bool:
    """Return whether a word ends the phrase before it."""
    word = words[place].lower()
    before = words[place - 1].lower() if place else ""
    after = words[place + 1].lower() if place + 1 < len(words) else "."
    if word == "," or (word == "and" and {before, after} <= _COLORS):
        # "the smooth, white marble columns", "a black and white cat"
        return word == "," and _ends(after)
    if word in _STARTS or word in _BETWEEN or not word[0].isalnum():
        return True
    if word in _VERBS:
        return word not in _NOUNS or after in _STARTS
    if _ADVERBS.match(word) and word not in _ADJECTIVES:
        return True
    regular = word.endswith(("ed", "ing")) and word not in _NOUNS
    return regular and before not in _STARTS and _ends(after)


def _ends(word: str) -> bool:
    """Return whether a word cannot be the next of a phrase."""
    adverb = bool(_ADVERBS.match(word)) and word not in _ADJECTIVES
    return word in _STARTS or word in _BETWEEN or not word[0].isalnum() or adverb


def _text(phrase: list[str]) -> str:
    """Return a phrase as text, "" for one without a noun."""
    while phrase and phrase[-1] == ",":
        phrase = phrase[:-1]
    nouns = [word for word in phrase if word.lower() not in _STARTS and word[0].isalnum()]
    return "".join(_joined(phrase)) if nouns else ""


def _joined(phrase: list[str]) -> Iterator[str]:
    for place, word in enumerate(phrase):
        yield word if not place or word == "," else f" {word}"
