"""Models that transformers chooses the class of, without code that came with them."""

from typing import Any

__all__ = ["read_auto"]


def read_auto(kind: Any, source: str, **options: Any) -> Any:
    """Return what a class of transformers reads; code of the model's own is never run.

    Left to itself, transformers asks on the terminal whether it may run that code.

    Args:
        kind: The class, such as AutoTokenizer.
        source: A folder or a hub id.
        **options: Of its `from_pretrained`.

    Raises:
        RuntimeError: It cannot be read without its own code.
    """
    try:
        return kind.from_pretrained(source, trust_remote_code=False, **options)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise RuntimeError(
            "it needs code of its own, which is never run; give a model of a kind that "
            "transformers knows"
        ) from error
