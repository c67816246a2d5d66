"""Rewards of images, [B, 3, H, W] in [0, 1], higher is better."""

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from domains.image.networks.features import FeatureNetwork, load_features
from domains.image.samples import check_pictures, luminance
from lit_rlft.core.checks import UsageError, one_of, reading, within
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.reward import Reward
from lit_rlft.kit.frozen import Frozen

__all__ = ["Brightness", "ClassProbability"]

Output = Literal["log_probability", "probability"]


class Brightness(Reward):
    """Mean luminance of an image, in [0, 1]; with a target, minus the distance to it, in [-1, 0].

    Args:
        target: None rewards brightness itself; a number a in [0, 1] gives -|brightness - a|.
    """

    differentiable = distinguishes = True

    def __init__(self, target: float | None = None) -> None:
        super().__init__()
        within(0, 1, self, target=target)
        self.target = target

    def forward(self, samples: Any, condition: Condition) -> Tensor:
        """Return the brightness, or minus its distance from the target, [B]."""
        brightness = luminance(check_pictures(samples, condition).float()).mean(dim=(1, 2, 3))
        return brightness if self.target is None else -(brightness - self.target).abs()


class ClassProbability(Frozen, Reward):
    """How sure a classifier is that an image shows a class: a log-probability or a probability.

    The classifier is trained from another seed than the feature network of FID: a model that is
    trained for the classifier must be judged by another network. It is frozen, always in evaluation
    mode, and computes in single precision also under autocast.

    Args:
        label: The class by name: a digit, a shape or a colour, such as "3" or "red".
        pretrained: "digits_classifier", "shapes_classifier" or a folder that
            `FeatureNetwork.save` wrote.
        output: "log_probability" is in (-inf, 0], "probability" in [0, 1].

    Raises:
        UsageError: `pretrained` is no such folder or knows no such class, or `output` is unknown.
    """

    differentiable = True

    def __init__(
        self,
        label: str = "3",
        pretrained: str = "digits_classifier",
        output: Output = "log_probability",
    ) -> None:
        super().__init__()
        one_of(self, "output", get_args(Output), output)
        with reading(self, "pretrained"):
            network = load_features(pretrained, "pretrained")
        if not isinstance(network, FeatureNetwork):
            raise UsageError(
                f"reward.init_args.pretrained: {pretrained!r} is no classifier; give "
                "'digits_classifier', 'shapes_classifier' or a folder that train.features wrote"
            )
        classes = list(network.architecture.classes)
        if str(label) not in classes:
            raise UsageError(
                f"reward.init_args.label is {label!r}; {pretrained!r} knows {', '.join(classes)}"
            )
        self.label, self.output = classes.index(str(label)), output
        self.distinguishes = output == "log_probability"  # a probability can be 1 for all of them
        self.classifier = network

    def forward(self, samples: Any, condition: Condition) -> Tensor:
        """Return the log-probability (or what `output` says) of the class, [B]."""
        known = self._log_probabilities(check_pictures(samples, condition))[:, self.label]
        return known.exp() if self.output == "probability" else known

    def evaluate(self, samples: Any, condition: Condition) -> dict[str, Tensor]:
        """Return the reward, and the share of images that the classifier takes for the class."""
        pictures = check_pictures(samples, condition)
        known = self._log_probabilities(pictures)
        own = known[:, self.label]
        if self.classifier.architecture.exclusive:
            shown = known.argmax(dim=1) == self.label
        else:
            shown = own.exp() > 0.5
        reward = own.exp() if self.output == "probability" else own
        return {self.name: reward, f"{self.name}/share": shown.to(reward)}

    def _log_probabilities(self, pictures: Tensor) -> Tensor:
        weight = self.classifier.out.weight
        with torch.autocast(weight.device.type, enabled=False):
            features = self.classifier(pictures.to(weight.device, weight.dtype))
            return self.classifier.log_probabilities(features).float().to(pictures.device)
