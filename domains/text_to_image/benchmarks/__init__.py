"""Published benchmarks of text-to-image models: their rules, on transformers' detectors."""

from domains.text_to_image.benchmarks.compbench import T2ICompBench
from domains.text_to_image.benchmarks.detectors import Detector, Found, Mask2Former, OWLv2
from domains.text_to_image.benchmarks.geneval import GenEval

__all__ = ["Detector", "Found", "GenEval", "Mask2Former", "OWLv2", "T2ICompBench"]
