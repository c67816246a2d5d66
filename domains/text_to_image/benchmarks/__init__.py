"""Published benchmarks of text-to-image models: their prompts and their scores."""

from domains.text_to_image.benchmarks.compbench import T2ICompBench
from domains.text_to_image.benchmarks.geneval import GenEvalHF
from domains.text_to_image.benchmarks.geneval2 import GenEval2
from domains.text_to_image.benchmarks.preference import RewardByGroup
from domains.text_to_image.benchmarks.prompts import (
    DrawBenchPrompts,
    GenEval2Prompts,
    GenEvalPrompts,
    HPDv2Prompts,
    PartiPrompts,
    T2ICompBenchPrompts,
)

__all__ = [
    "DrawBenchPrompts",
    "GenEval2",
    "GenEval2Prompts",
    "GenEvalHF",
    "GenEvalPrompts",
    "HPDv2Prompts",
    "PartiPrompts",
    "RewardByGroup",
    "T2ICompBench",
    "T2ICompBenchPrompts",
]
