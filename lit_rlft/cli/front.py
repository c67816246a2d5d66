"""The front door: help, version and lists at once; heavy imports only where a run needs them."""

import io
import os
import sys
from collections.abc import Sequence

from lit_rlft import __version__
from lit_rlft.cli import listing, reports
from lit_rlft.cli.collector import without_collection
from lit_rlft.cli.data_files import check_sources
from lit_rlft.cli.names import with_class_paths
from lit_rlft.cli.old_arguments import without_old_arguments
from lit_rlft.cli.paths import with_config_files
from lit_rlft.cli.quiet import quieten
from lit_rlft.cli.voting.command import run as vote
from lit_rlft.cli.words import configs_first, nearest, with_nulls
from lit_rlft.core.checks import UsageError

__all__ = ["HELP", "main"]

_RUNS = ("fit", "validate", "test", "predict")
_READERS = {"list": listing.run, "report": reports.report, "compare": reports.compare, "vote": vote}
"""Commands that read what there is, and need no model."""
_NEED_MODELS = (*_RUNS, "plan", "profile")
_COMMANDS = (*_NEED_MODELS, *_READERS)
HELP = """\
lit-rlft fine-tunes pretrained diffusion and flow models with rewards.

  lit-rlft fit      --config DOMAIN --config ALGORITHM [--config TRAINER] [--any.key VALUE]
  lit-rlft validate|test|predict  the same; takes the run's last checkpoint, or --ckpt_path FILE
  lit-rlft plan     the same as fit, and [--memory 24GB] [--flops 165e12] [--share 0.3]
  lit-rlft profile  the same as fit, and [--conditions 32] [--candidates 8] [--completions 4]
  lit-rlft report   RUN [RUN ...] [--output FILE]
  lit-rlft compare  RUN RUN [RUN ...] [--metric NAME] [--csv FILE] [--markdown FILE]
  lit-rlft vote     RUN [--samples | --blind] [--host 0.0.0.0] [--port 8765]
  lit-rlft list     [algorithms|domains|rewards|metrics|selections|configs] [--domain NAME]

Commands
  fit       tune a model; writes checkpoints, the tuned model and a TensorBoard log to runs/NAME
  validate  measure the tuned model beside the pretrained one on the validation data
  test      the same on the test data; writes metrics.json, a picture and report.html
  predict   draw samples from the tuned model and write them, with their rewards
  plan      what a fit would take: memory by part, calls, hours; loads no weights
  profile   when the reward is decided between noise and data; suggests P-GRAFT's cut
  report    one HTML file that shows runs: gains, curves, samples before and after
  compare   tested runs side by side, with paired tests; says why where they cannot be compared
  vote      show samples on a local page; a person says which is the better one
  list      what there is to choose from, in one line each

Examples
  lit-rlft fit --config shapes --config p_graft --name demo
  lit-rlft test --config shapes --config p_graft --name demo

  lit-rlft fit --config shapes --config drtune --reward CLIPScore --trainer.max_epochs 2

A config is a YAML file or the name of one that comes with the package (`lit-rlft list configs`;
a file here of that name wins). Later ones win over earlier ones, options over both,
wherever they stand.
A class is given by its name, or by its path, such as my_module.MyReward.

See the options of a class with   lit-rlft fit --model.help PGRAFT
                                  lit-rlft fit --reward.help CLIPScore
the whole config of a run with    lit-rlft fit ... --print_config
and all options of a command with lit-rlft fit --help
"""


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        args: Its words; those of the process unless given.

    Raises:
        SystemExit: Something is wrong that the user can change; the message is one sentence.
    """
    words = list(sys.argv[1:] if args is None else args)
    _take_all_characters()
    try:
        _answer(words)
    except BrokenPipeError:  # the reader has read enough, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except UsageError as error:
        raise SystemExit(f"lit-rlft: error: {error}") from error


def _take_all_characters() -> None:
    """Have what the reader's encoding lacks written as escapes: a fit must not end for a "±"."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def _answer(words: list[str]) -> None:
    if not words or words[0] in ("-h", "--help", "help"):
        print(HELP, end="")
    elif words[0] in ("--version", "-V"):
        print(f"lit-rlft {__version__}")
    else:
        _command(words)
    sys.stdout.flush()


def _command(words: list[str]) -> None:
    if words[0] in _READERS:
        _READERS[words[0]](words[1:])
        return
    if words[0].startswith("-"):
        known = ", ".join(_COMMANDS)
        raise UsageError(f"the command comes first, before {words[0]}; it is one of {known}")
    if words[0] not in _NEED_MODELS:
        close = nearest(words[0], _COMMANDS)
        hint = f"did you mean {close}? " if close else ""
        raise UsageError(
            f"there is no command {words[0]!r}; {hint}the commands are {', '.join(_COMMANDS)}"
        )
    quieten()
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # classes of the user's own, as `python` finds them
    words = with_class_paths(with_config_files(configs_first(words)))
    words = with_nulls(without_old_arguments(words))
    check_sources(words)
    with without_collection():
        if words[0] == "plan":
            from lit_rlft.cli.plan import plan_words

            plan_words(words[1:])
            return
        if words[0] == "profile":
            from lit_rlft.cli.profile import profile_words

            profile_words(words[1:])
            return
        from lit_rlft.cli.app import run  # seconds, which no other command should take

        run(words)
