"""The command line: `lit-rlft fit | validate | test | predict`."""

from lit_rlft.cli.app import main

__all__ = ["main"]
