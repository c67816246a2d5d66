"""Which rewards a domain has for algorithms that follow a reward's gradient."""

from jsonargparse import Namespace

from lit_rlft.cli.index import index
from lit_rlft.cli.listing import is_of
from lit_rlft.loop.differentiable import NoGradient

__all__ = ["with_names"]


def with_names(error: NoGradient, config: Namespace | None) -> str:
    """Return the error's sentence with what to type: rewards of the pipeline's domain, by name.

    Args:
        error: A reward without gradient.
        config: Of the command, if it was parsed.
    """
    path = None if config is None else config.get("pipeline.class_path")
    domains = {one.domain for one in index() if path is not None and is_of(path, one)}
    names = [
        one.name
        for one in index()
        if one.kind == "reward" and one.domain in domains and one.gradient == "yes"
    ]
    if not names:
        return str(error)
    listed = ", ".join(sorted(names))
    return f"{error.problem}; give --reward one of {listed}, or take --config p_graft"
