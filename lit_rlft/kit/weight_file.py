"""Files of weights as people have them: read without running code, or refused in a sentence."""

from pathlib import Path

from safetensors import SafetensorError, safe_open

from lit_rlft.core.checks import UsageError, from_json

__all__ = [
    "PICKLES",
    "check_file",
    "refuse_pickle",
    "refuse_quantised",
    "shapes_in",
    "start_problem",
]

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
"""Endings of files that torch pickles, which can run code."""

_FEW_BITS = ("F8", "F6", "F4")
_INTEGERS = ("I8", "U8", "I16", "U16", "I32", "U32")
_COUNTS = "position_ids"
"""Numbers of tokens in a text encoder, which are no weights."""
_ZIP = b"PK\x03\x04"
_STARTS = {
    b"version https://git-lfs": "is a pointer of Git LFS, not the file itself; run `git lfs pull` "
    "in its folder, or download it again",
    b"<": "is a web page, not a file of weights; download it again, from the address of the file "
    "itself (with a token where it is gated)",
    _ZIP: "is a pickle of torch's by its content, which can run code; convert it to "
    "safetensors where it came from",
    b"GGUF": "is a GGUF file, whose weights are quantised; give the model in bfloat16 or float16 "
    "as safetensors",
}


def check_file(path: Path, key: str) -> None:
    """Raise UsageError unless a file is a whole one of safetensors.

    Args:
        path: The file.
        key: The setting that names it, for the message.
    """
    if problem := start_problem(path):
        raise UsageError(f"{key}: {path} {problem}")
    size = path.stat().st_size
    if (expected := _expected_size(path, size)) is not None and expected != size:
        raise UsageError(
            f"{key}: {path} has {size} of {expected or 'more'} bytes, so its download was cut off; "
            "download it again"
        )
    try:
        with safe_open(path, "pt"):
            pass
    except SafetensorError as error:
        raise UsageError(f"{key}: {path} is no safetensors file ({error})") from error


def start_problem(path: Path) -> str | None:
    """Return what the first bytes of a file of weights show to be wrong with it, and the remedy."""
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        return "is empty; download it again"
    start = start.lstrip(b"\xef\xbb\xbf \r\n\t")
    found = next((mark for mark in _STARTS if start.startswith(mark)), None)
    if found is None or (found == _ZIP and path.suffix in PICKLES):
        return None
    return _STARTS[found]


def _expected_size(path: Path, size: int) -> int | None:
    """Return a safetensors file's size by its header, 0 where that is cut off, None without one."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        start = file.read(1)
        if start != b"{":
            return None
        if length > size - 8:
            return 0
        try:
            header = from_json(start + file.read(length - 1))
            ends = [entry["data_offsets"][1] for n, entry in header.items() if n != "__metadata__"]
        except (ValueError, TypeError, KeyError, IndexError, AttributeError):
            return None
    return 8 + length + max(ends, default=0)


def shapes_in(path: Path, key: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a file's tensors by name, without reading them.

    Raises:
        UsageError: It is no whole file of safetensors.
    """
    check_file(path, key)
    with safe_open(path, "pt") as file:
        return {
            name: tuple(file.get_slice(name).get_shape())
            for name in file.keys()  # noqa: SIM118
        }


def refuse_quantised(path: Path, key: str) -> None:
    """Raise UsageError for weights of 8 bits and fewer, or matrices of integers.

    Args:
        path: A whole file of safetensors.
        key: The setting that names it, for the message.
    """
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118
            part = file.get_slice(name)
            kind, matrix = part.get_dtype(), len(part.get_shape()) > 1
            integers = kind in _INTEGERS and matrix and not name.endswith(_COUNTS)
            if kind.startswith(_FEW_BITS) or integers:
                raise UsageError(
                    f"{key}: {path} holds quantised weights, such as {name} in {kind}, which "
                    "cannot be trained on; give the model in bfloat16 or float16"
                )


def refuse_pickle(path: Path, key: str) -> None:
    """Raise UsageError, with the line that converts it, for a file that is pickled."""
    if path.suffix in PICKLES:
        new = path.with_suffix(".safetensors").name
        raise UsageError(
            f"{key}: {path} is a pickle, which can run code; convert it: "
            'python -c "import torch,safetensors.torch as s;'
            f"w=torch.load('{path}',map_location='cpu',weights_only=True);w=w.get('state_dict',w);"
            "s.save_file({k:v.contiguous().clone() for k,v in w.items() "
            f"if hasattr(v,'contiguous')}},'{new}')\""
        )
