"""Class lists of layout data sets, and the colours that their elements are drawn in."""

import colorsys
from collections.abc import Iterable, Sequence

from lit_rlft.core.checks import UsageError
from lit_rlft.core.pipeline import Pipeline

__all__ = ["CLASS_LISTS", "check_names", "class_list", "color_of", "number_of"]

CLASS_LISTS: dict[str, tuple[str, ...]] = {
    "publaynet": ("text", "title", "list", "table", "figure"),
    "rico": (
        *("Text", "Image", "Icon", "List Item", "Text Button", "Toolbar", "Web View", "Input"),
        *("Card", "Advertisement", "Background Image", "Drawer", "Radio Button", "Checkbox"),
        *("Multi-Tab", "Pager Indicator", "Modal", "On/Off Switch", "Slider", "Map View"),
        *("Button Bar", "Video", "Bottom Navigation", "Number Stepper", "Date Picker"),
    ),
}
"""Names in the order of their labels, from 0."""

_COLORS = {
    "text": (78, 121, 167),
    "title": (225, 87, 89),
    "list": (89, 161, 79),
    "table": (242, 142, 43),
    "figure": (149, 97, 176),
}
_GOLDEN = 0.618034  # turns of the colour wheel between labels: neighbours differ


def class_list(classes: str | Sequence[str]) -> tuple[str, ...]:
    """Return the names of a known data set, or those given.

    Raises:
        UsageError: The data set is unknown, or the names are none or not all different.
    """
    if isinstance(classes, str):
        if classes not in CLASS_LISTS:
            raise UsageError(
                f"classes: {classes!r} is unknown; use one of {sorted(CLASS_LISTS)} or a list of "
                "names"
            )
        return CLASS_LISTS[classes]
    names = tuple(classes)
    if not names or len(set(names)) != len(names):
        raise UsageError(f"classes must be names, all different, got {list(names)}")
    return names


def number_of(name: str, classes: Sequence[str], key: str) -> int:
    """Return the label of a class.

    Args:
        name: The class.
        classes: The names of the layouts' labels.
        key: Whose value the name is, for the message.

    Raises:
        UsageError: The layouts have no such class.
    """
    if name not in classes:
        raise UsageError(f"{key} names the class {name!r}, but the layouts have {list(classes)}")
    return classes.index(name)


def check_names(names: Iterable[str], pipeline: Pipeline, key: str) -> None:
    """Raise UsageError where a pipeline's layouts lack a class; `key` as in `number_of`."""
    names = tuple(names)
    for name in names:
        number_of(name, getattr(pipeline, "classes", names), key)


def color_of(label: int, classes: Sequence[str]) -> tuple[int, int, int]:
    """Return the colour of a label, red, green and blue in [0, 255]."""
    known = _COLORS.get(classes[label].lower())
    if known is not None:
        return known
    red, green, blue = colorsys.hsv_to_rgb((0.6 + label * _GOLDEN) % 1, 0.65, 0.8)
    return round(255 * red), round(255 * green), round(255 * blue)
