"""Files of weights as people have them: read without running code, or refused in a sentence."""

from pathlib import Path

from safetensors import SafetensorError, safe_open

from lit_rlft.core.checks import UsageError

__all__ = ["PICKLES", "check_whole", "first_damaged", "refuse_pickle", "shapes_in"]

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
"""Endings of files that torch pickles, which can run code."""

_STARTS = {
    b"version https://git-lfs": "is a pointer of Git LFS, not the file itself; run `git lfs pull` "
    "in its folder, or download it again",
    b"<": "is a web page, not a file of weights; download it again, from the address of the file "
    "itself (with a token where it is gated)",
    b"PK\x03\x04": "is a pickle of torch's by its content, which can run code; convert it to "
    "safetensors where it came from",
    b"GGUF": "is a GGUF file, whose weights are quantised; give the model in bfloat16 or float16 "
    "as safetensors",
}


def check_whole(path: Path, key: str) -> None:
    """Raise UsageError unless a file is a whole one of safetensors.

    Args:
        path: The file.
        key: The setting that names it, for the message.
    """
    with path.open("rb") as file:
        start = file.read(64)
    for mark, problem in _STARTS.items():
        if start.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(mark):
            raise UsageError(f"{key}: {path} {problem}")
    try:
        with safe_open(path, "pt"):
            pass
    except SafetensorError as error:
        what = "is no safetensors file" if start[8:9] != b"{" else "is damaged or half downloaded"
        what = what if start else "is empty"
        raise UsageError(f"{key}: {path} {what} ({error}); download it again") from error


def shapes_in(path: Path, key: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a file's tensors by name, without reading them.

    Raises:
        UsageError: It is no whole file of safetensors.
    """
    check_whole(path, key)
    with safe_open(path, "pt") as file:
        return {
            name: tuple(file.get_slice(name).get_shape())
            for name in file.keys()  # noqa: SIM118
        }


def first_damaged(folder: Path, key: str) -> UsageError | None:
    """Return what is wrong with the first damaged safetensors file below a folder, if one is."""
    for path in sorted(folder.rglob("*.safetensors")):
        try:
            check_whole(path, key)
        except UsageError as error:
            return error
    return None


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
