"""The command line: `lit-rlft fit | validate | test | predict | list`."""

from lit_rlft.cli.front import main

__all__ = ["main"]
