"""DataModules of the published benchmarks' prompts, read from their own files."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch.utils.data import Dataset

from domains.text_to_image.benchmarks.files import lines_of, refused, table_of
from domains.text_to_image.benchmarks.geneval import COLORS, RELATIONS, TASKS
from domains.text_to_image.benchmarks.geneval2 import SKILLS, skill_problem
from domains.text_to_image.rewards.soft_tifa import QUESTIONS
from lit_rlft.core.checks import BadArgument, UsageError, at_least, from_json, reading
from lit_rlft.kit.data import Record, Rows, Split, SplitData

__all__ = [
    "CATEGORIES",
    "STYLES",
    "DrawBenchPrompts",
    "GenEval2Prompts",
    "GenEvalPrompts",
    "HPDv2Prompts",
    "PartiPrompts",
    "T2ICompBenchPrompts",
]

CATEGORIES = (
    *("color", "shape", "texture", "spatial", "3d_spatial", "numeracy", "non_spatial", "complex"),
)
"""Of T2I-CompBench++, as its files are called."""
STYLES = ("anime", "concept-art", "paintings", "photo")
"""Of HPDv2, as its files are called."""


class _Prompts(SplitData, ABC):
    """Prompts of a benchmark: all of them are the test split, and none are to train on.

    Args:
        source: The benchmark's file or folder.
        num_val_prompts: Validate on so many prompts, spread evenly over all.
        num_test_prompts: Test on so many prompts, spread evenly over all; None takes all.
        **loading: Arguments of the loaders: batch_size, eval_batch_size, seed, num_workers.

    Attributes:
        trains: Whether there are prompts to train on, too.
    """

    trains: ClassVar[bool] = False

    def __init__(
        self,
        source: str,
        num_val_prompts: int | None = 48,
        num_test_prompts: int | None = None,
        **loading: Any,
    ) -> None:
        super().__init__(**loading)
        self.source = Path(source)
        at_least(1, self, num_val_prompts=num_val_prompts, num_test_prompts=num_test_prompts)
        self.numbers = {"val": num_val_prompts, "test": num_test_prompts}
        self._read: dict[str, list[Record]] = {}

    @abstractmethod
    def read(self, split: Split) -> list[Record]:
        """Return the prompts of a split.

        Raises:
            UsageError: A file is missing or damaged.
        """

    def setup(self, stage: str) -> None:
        """Read the files.

        Raises:
            UsageError: A file is missing or damaged, or there are no prompts to train on.
        """
        splits: tuple[Split, ...] = ("train", "test") if stage == "fit" else ("test",)
        for split in splits:
            self.records(split)

    def records(self, split: Split) -> list[Record]:
        """Return the prompts of a split, read once."""
        if split == "train" and not self.trains:
            raise UsageError(
                f"{type(self).__name__} has prompts to test on and none to train on; give the "
                "prompts of the training as data, and the benchmark to `lit-rlft test`"
            )
        if split not in self._read:
            with reading(self, "source"):
                self._read[split] = self.read(split)
        return self._read[split]

    def rows(self, split: Split) -> Dataset[dict[str, Any]]:
        records = self.records(split)
        number = self.numbers.get(split) or len(records)
        # Files are sorted by group: the first prompts would be of one alone.
        chosen = _spread(records, number)
        return Rows(len(chosen), lambda i: chosen[i])


class GenEvalPrompts(_Prompts):
    """GenEval's 553 prompts, each with its task and the objects to find.

    Args:
        source: `evaluation_metadata.jsonl` of https://github.com/djghosh13/geneval, a record with
            `tag`, `include`, `exclude` and `prompt` a line.
        **loading: As in every benchmark: num_val_prompts, num_test_prompts, batch_size,
            eval_batch_size, seed, num_workers.

    Raises:
        UsageError: In `setup`, the file is missing or damaged; the sentence names its line.
    """

    def read(self, split: Split) -> list[Record]:
        return [self._record(line, text) for line, text in lines_of(self.source)]

    def _record(self, line: int, text: str) -> Record:
        record = _json_of(self.source, line, text)
        if problem := _damage(record):
            raise refused(self.source, line, problem)
        return {
            "prompt": record["prompt"].strip(),
            "tag": record["tag"],
            "include": record["include"],
            "exclude": record.get("exclude"),
        }


class GenEval2Prompts(_Prompts):
    """GenEval 2's 800 prompts with their numbers of things, questions, answers and skills.

    Args:
        source: `geneval2_data.jsonl` of https://github.com/facebookresearch/GenEval2, a record with
            `prompt`, `atom_count`, `vqa_list` and `skills` a line.
        **loading: As in every benchmark: num_val_prompts, num_test_prompts, batch_size,
            eval_batch_size, seed, num_workers.

    Raises:
        UsageError: In `setup`, the file is missing or damaged; the sentence names its line.
    """

    def read(self, split: Split) -> list[Record]:
        return [self._record(line, text) for line, text in lines_of(self.source)]

    def _record(self, line: int, text: str) -> Record:
        record = _json_of(self.source, line, text)
        problem = _lack_of_prompt(record) or skill_problem(record)
        if not problem and not isinstance(record.get("atom_count"), int):
            problem = "has no whole number under 'atom_count'"
        if problem:
            raise refused(self.source, line, problem)
        kept = {name: record[name] for name in ("atom_count", QUESTIONS, SKILLS)}
        return {"prompt": record["prompt"].strip()} | kept


class T2ICompBenchPrompts(_Prompts):
    """T2I-CompBench++'s prompts, each with its category; those for training are a split of theirs.

    Args:
        source: The folder `examples/dataset` of https://github.com/Karine-Huang/T2I-CompBench, or
            one that holds `<category>_val.txt` (for training `<category>_train.txt`), one prompt
            a line. Names may begin with "t2i_compbench_". Where `complex_val_spatial.txt` and
            `complex_val_action.txt` are there, they say which of the complex prompts have no
            action, and which no place.
        categories: Which to read: color, shape, texture, spatial, 3d_spatial, numeracy,
            non_spatial, complex.
        **loading: As in every benchmark: num_val_prompts, num_test_prompts, batch_size,
            eval_batch_size, seed, num_workers.

    Raises:
        UsageError: A category is unknown; in `setup`, a file is missing or empty.
    """

    trains = True

    def __init__(self, source: str, categories: Sequence[str] = CATEGORIES, **loading: Any) -> None:
        super().__init__(source, **loading)
        self.categories = tuple(categories)
        if unknown := [one for one in self.categories if one not in CATEGORIES]:
            problem = f"must be among {list(CATEGORIES)}, got {unknown[0]!r}"
            raise BadArgument(self, "categories", problem)
        if not self.categories:
            raise BadArgument(self, "categories", "must name at least one category")

    def read(self, split: Split) -> list[Record]:
        part = "train" if split == "train" else "val"
        relations = {
            _key(text): relation
            for relation in ("spatial", "action")
            for path in [self._file(f"complex_val_{relation}")]
            if "complex" in self.categories and path.is_file()
            for _, text in lines_of(path)
        }
        return [
            {"prompt": text.strip(), "category": category, "relation": relations.get(_key(text))}
            for category in self.categories
            for _, text in lines_of(self._file(f"{category}_{part}"))
        ]

    def _file(self, name: str) -> Path:
        prefixed = self.source / f"t2i_compbench_{name}.txt"
        return prefixed if prefixed.is_file() else self.source / f"{name}.txt"


class PartiPrompts(_Prompts):
    """PartiPrompts: 1632 prompts, each with its category and its challenge.

    Args:
        source: `PartiPrompts.tsv` of https://github.com/google-research/parti, with the columns
            Prompt, Category, Challenge and Note.
        **loading: As in every benchmark: num_val_prompts, num_test_prompts, batch_size,
            eval_batch_size, seed, num_workers.

    Raises:
        UsageError: In `setup`, the file is missing or damaged; the sentence names its line.
    """

    def read(self, split: Split) -> list[Record]:
        wanted = {"prompt": ("prompt",), "category": ("category",), "challenge": ("challenge",)}
        return table_of(self.source, wanted, tabs=True)


class DrawBenchPrompts(_Prompts):
    """DrawBench: 200 prompts in 11 categories.

    Args:
        source: The published table (https://imagen.research.google) as `.csv`, with the columns
            Prompts and Category.
        **loading: As in every benchmark: num_val_prompts, num_test_prompts, batch_size,
            eval_batch_size, seed, num_workers.

    Raises:
        UsageError: In `setup`, the file is missing or damaged; the sentence names its line.
    """

    def read(self, split: Split) -> list[Record]:
        wanted = {"prompt": ("prompts", "prompt"), "category": ("category",)}
        return table_of(self.source, wanted, tabs=False)


class HPDv2Prompts(_Prompts):
    """HPDv2's 3200 prompts of its benchmark, 800 of each of four styles.

    Args:
        source: The folder `benchmark` of https://huggingface.co/datasets/zhwang/HPDv2, with a list
            of prompts in each of anime.json, concept-art.json, paintings.json and photo.json.
        styles: Which to read.
        **loading: As in every benchmark: num_val_prompts, num_test_prompts, batch_size,
            eval_batch_size, seed, num_workers.

    Raises:
        UsageError: A style is unknown; in `setup`, a file is missing or damaged.
    """

    def __init__(self, source: str, styles: Sequence[str] = STYLES, **loading: Any) -> None:
        super().__init__(source, **loading)
        self.styles = tuple(styles)
        if unknown := [one for one in self.styles if one not in STYLES]:
            raise BadArgument(self, "styles", f"must be among {list(STYLES)}, got {unknown[0]!r}")
        if not self.styles:
            raise BadArgument(self, "styles", "must name at least one style")

    def read(self, split: Split) -> list[Record]:
        return [
            {"prompt": text, "style": style}
            for style in self.styles
            for text in self._texts(self.source / f"{style}.json")
        ]

    def _texts(self, path: Path) -> list[str]:
        text = "\n".join(line for _, line in lines_of(path, blank=True))
        try:
            found = from_json(text)
        except ValueError as error:
            raise refused(path, getattr(error, "lineno", 1), f"is no JSON ({error})") from error
        if not isinstance(found, list) or not found:
            raise refused(path, 1, "holds no list of prompts")
        for number, one in enumerate(found):
            if not isinstance(one, str) or not one.strip():
                raise UsageError(f"entry {number + 1} of {path} is no text; download it again")
        return [one.strip() for one in found]


def _spread(records: list[Record], number: int) -> list[Record]:
    """Return so many records, in order and evenly spread."""
    total = len(records)
    number = min(number, total)
    return [records[i * total // number] for i in range(number)]


def _key(text: str) -> str:
    """Return what T2I-CompBench's lists of complex prompts are compared by."""
    return text.strip().split(".")[0].lower()


def _json_of(path: Path, line: int, text: str) -> Any:
    """Return what a line of a file holds as JSON."""
    try:
        return from_json(text)
    except ValueError as error:
        raise refused(path, line, f"is no JSON ({error})") from error


def _lack_of_prompt(record: Any) -> str:
    """Return how a record lacks a prompt, nothing where it has one."""
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
        return "has no 'prompt'"
    return "" if record["prompt"].strip() else "has an empty 'prompt'"


def _damage(record: Any) -> str:
    """Return what is wrong with a record of GenEval, nothing where all is right."""
    if problem := _lack_of_prompt(record):
        return problem
    if record.get("tag") not in TASKS:
        return f"has the tag {record.get('tag')!r}, not one of {', '.join(TASKS)}"
    if not record.get("include"):
        return "has nothing under 'include'"
    for key in ("include", "exclude"):
        clauses = record.get(key) or []
        if not isinstance(clauses, list):
            return f"has no list under {key!r}"
        for place, clause in enumerate(clauses):
            if problem := _damage_of(clause, place):
                return f"has under {key!r} {problem}"
    return ""


def _damage_of(clause: Any, place: int) -> str:
    """Return what is wrong with the clause at a place of a list, nothing where all is right."""
    if not isinstance(clause, Mapping) or not isinstance(clause.get("class"), str):
        return "a clause without 'class'"
    count = clause.get("count")
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        return f"the count {count!r}, not a number from 1"
    if clause.get("color") not in (None, *COLORS):
        return f"the colour {clause['color']!r}, not one of {', '.join(COLORS)}"
    position = clause.get("position")
    if position is None:
        return ""
    known = isinstance(position, list) and len(position) == 2 and position[0] in RELATIONS
    if not known or not isinstance(position[1], int) or not 0 <= position[1] < place:
        return f"the position {position!r}, not [relation, an earlier clause]"
    return ""
