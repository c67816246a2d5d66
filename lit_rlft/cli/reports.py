"""`lit-rlft report` and `lit-rlft compare`: look at runs, side by side."""

from argparse import ArgumentError, ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from lit_rlft.core.checks import UsageError
from lit_rlft.runs.files import write_whole, writing

__all__ = ["compare", "report"]


def report(words: Sequence[str]) -> None:
    """Write the report that `lit-rlft report` was asked for.

    Raises:
        UsageError: A folder is none of a run, or the runs cannot stand in one report.
    """
    parser = ArgumentParser(
        "lit-rlft report",
        description="Write one HTML file that shows runs: settings that differ, gains, curves, the "
        "same samples before and after, costs, warnings. It opens by double click and asks the "
        "network for nothing.",
        exit_on_error=False,
    )
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="a run's folder")
    parser.add_argument(
        "--output",
        type=Path,
        help="the file; report.html in the folder of a single run, else in the working directory",
    )
    asked = _parsed(parser, words)
    from lit_rlft.report import REPORT, write_report  # not for who asks for help

    alone = asked.runs[0] if len(asked.runs) == 1 else Path()
    print(f"report: {write_report(asked.runs, asked.output or alone / REPORT)}")


def compare(words: Sequence[str]) -> None:
    """Print, and write, the comparison that `lit-rlft compare` was asked for.

    Raises:
        UsageError: The runs are not comparable; the message says why.
    """
    parser = ArgumentParser(
        "lit-rlft compare",
        description="Compare tested runs: gain and its error, share kept of best of n, costs, and "
        "paired tests on the same conditions and noise. Runs that share no such samples are "
        "refused.",
        exit_on_error=False,
    )
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="a run's folder")
    parser.add_argument("--metric", help="what to compare by; the trained reward unless given")
    parser.add_argument(
        "--csv", type=Path, help="a file for all measurements; FILE_pairs.csv has the tests"
    )
    parser.add_argument("--markdown", type=Path, help="a file for the tables in Markdown")
    asked = _parsed(parser, words)
    from lit_rlft.report import compare as comparison
    from lit_rlft.report.run import distinct_names, read_run

    runs = [read_run(folder, tested=True) for folder in asked.runs]
    distinct_names(runs)
    found = comparison.compare(runs, asked.metric)
    print(comparison.to_text(found), end="")
    if asked.markdown:
        _write(asked.markdown, comparison.to_text(found, markdown=True))
    if asked.csv:
        whole, pairs = comparison.to_csv(found)
        _write(asked.csv, whole)
        _write(asked.csv.with_name(f"{asked.csv.stem}_pairs{asked.csv.suffix}"), pairs)


def _parsed(parser: ArgumentParser, words: Sequence[str]) -> "_Asked":
    try:
        asked, odd = parser.parse_known_args(words, _Asked())
    except ArgumentError as error:
        raise UsageError(f"{parser.prog}: {error}; `{parser.prog} --help` shows how") from error
    if odd:
        raise UsageError(
            f"{parser.prog}: {' '.join(odd)} is unknown; `{parser.prog} --help` shows what there is"
        )
    if not asked.runs:
        raise UsageError(f"{parser.prog}: give the folder of a run, such as runs/demo")
    return asked


class _Asked:
    """The words of a command, read."""

    runs: Sequence[Path]
    output: Path | None = None
    metric: str | None = None
    csv: Path | None = None
    markdown: Path | None = None


def _write(path: Path, text: str) -> None:
    if path.is_dir():
        raise UsageError(f"{path} is a folder; give the name of a file")
    with writing(path):
        write_whole(path, text)
    print(f"written: {path}")
