"""What the parser says, brought down to key, value and what is expected."""

import re
import sys
import sysconfig
import traceback
from collections.abc import Sequence
from importlib.metadata import distributions
from importlib.util import find_spec
from inspect import Parameter, signature
from pathlib import Path

from lit_rlft.cli.index import index
from lit_rlft.cli.words import nearest

__all__ = ["is_users", "parser_sentence", "short"]

_KEY = re.compile(r'Parser key "([^"]+)"')
_CLASS = re.compile(r"Problem with given class_path '([^']+)'")
_OPTION = re.compile(r"[Oo]ption '([^']+)'")
_VALUE = re.compile(r"(?:Given value|Got value): (.*)")
_SUBTYPES = re.compile(r"Subtypes: \[(.*)\]")
_EXPECTED = re.compile(r"Expected an? (<class '.*?'>|typing\.\S+|List|list)")
_REQUIRED = re.compile("following arguments are required: (.*)")
_NOISE = re.compile(
    r"Expected a path but|Does not validate against|Subtypes: |Errors:|Given value|Got value"
    r"|a class path|a dict|Parser key|Problem with given class_path|Subclass types expect"
    r"|Expected an? <class|Expected an? typing"
    r"|Type typing\.|Type collections\.|Not a valid subclass of"
)
_MEANT = {
    "lr": "model.optimizer.lr",
    "learning_rate": "model.optimizer.lr",
    "weight_decay": "model.optimizer.weight_decay",
    "num_steps": "model.sampler.num_steps",
    "num_inference_steps": "model.sampler.num_steps",
    "eta": "model.sampler.eta",
    "rank": "model.lora.rank",
    "alpha": "model.lora.alpha",
    "lora_alpha": "model.lora.alpha",
    "guidance_scale": "pipeline.guidance_scale",
    "batch_size": "data.batch_size",
}
"""Where settings of the model are that other trainers have on top."""
_CLASSES = ("model", "pipeline", "reward", "data")
"""Keys whose value is a class."""
_MOST = 60
"""Longest shown value."""


def short(text: str, most: int = _MOST) -> str:
    """Return a text on one line, cut to a length."""
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most - 3]}..."


def parser_sentence(causes: Sequence[BaseException]) -> str:
    """Return one sentence for an error of the parser.

    Args:
        causes: The error and what it was raised from, the last of which knows best.
    """
    texts = [str(cause) for cause in causes]
    whole, last = texts[0], _innermost(texts)
    keys = [name for text in texts for name in _KEY.findall(text.partition("\n")[0])]
    keys = [name for i, name in enumerate(keys) if i == 0 or keys[i - 1] != name]
    key = ".init_args.".join(keys).replace(".lora.init_args.", ".lora.")
    key = key.replace(".sampler.init_args.", ".sampler.").replace(".solver.init_args.", ".solver.")
    classes = _CLASS.findall(whole)
    if option := _OPTION.search(last):
        return _unknown(key, option.group(1), classes[-1] if classes else "")
    if not keys:
        return _without_key(last)
    values = _VALUE.findall(last) or re.findall("import path string: (.*)", last) or classes
    value = values[-1] if values else ""
    if value.endswith(".py") or (key in _CLASSES and re.fullmatch(r"[\w./-]*/\w+", value)):
        dotted = value.removesuffix(".py").strip("./").replace("/", ".")
        return f"{key}: {short(value)} is a file; give the class in it, as {dotted}.ClassName"
    if own := _own_code(causes):
        return f"{key}: {short(value)} cannot be imported: {own}"
    if why := _absent(value):
        return f"{key}: {short(value)} cannot be imported: {why}"
    reasons = [line.strip(" -") for line in last.splitlines()]
    reasons = [line for line in reasons if line and not _NOISE.match(line)]
    if reasons and "is abstract" in reasons[0] and _settings_alone(value):
        return _classless(key)
    if reasons and (found := _REQUIRED.search(reasons[0])):
        name = value.rpartition(".")[2] if re.fullmatch(r"[\w.]+", value) else "its class"
        each = [f"{key}.init_args.{argument}" for argument in found.group(1).split(", ")]
        return f"{' and '.join(each)} must be given: {name} has no default for it"
    if reasons and "Expected a dot import path" not in reasons[0]:
        return f"{key}: {_plain(reasons[0], classes)}{_hint(value)}"
    if re.search("import path string", last) and re.fullmatch(r"[A-Z]\w*", value):
        close = nearest(value, [entry.name for entry in index()])
        meant = f"did you mean {close}? " if close else ""
        return f"{key}: there is no class {value}; {meant}Give a name of ours or a full class path"
    types = _SUBTYPES.findall(last) or _EXPECTED.findall(last)
    expected = _types(types[0]) if types else "something else"
    return f"{key} is {short(value)!r}, but must be {short(expected, 120)}"


def _absent(path: str) -> str:
    """Return why the class or function of a path cannot be found, and the remedy, if so."""
    module, _, name = path.rpartition(".")
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", module) or not name.isidentifier():
        return ""
    package = module.partition(".")[0]
    if find_spec(package) is None:
        return (
            f"there is no module {package}; put {package}.py into this folder or on PYTHONPATH, or "
            "pip install the package that has it"
        )
    loaded = sys.modules.get(module)
    if loaded is None or hasattr(loaded, name):
        return ""
    close = nearest(name, vars(loaded))
    return f"{module} has no {name}" + (f"; did you mean {close}?" if close else "")


def _innermost(texts: Sequence[str]) -> str:
    """Return the text of the innermost error that names a key, an option or a class."""
    known = [text for text in texts if re.search(r"Parser key|ption '|given class_path", text)]
    named = [text for text in known if not text.startswith("Does not validate")]
    return (named or known or texts)[-1]


def _unknown(key: str, option: str, path: str) -> str:
    """Return the sentence on a key that nothing takes."""
    if not path:
        return f"there is no key {option}; lit-rlft COMMAND --help shows them all"
    name, own = path.rpartition(".")[2], _arguments(path)
    if name == "LightningDataModule":
        return _classless(key)
    group, nested = key.partition(".")[0] or "model", "." in key
    # The parser names the class around an optimiser's, and only the base of a callback's.
    known = bool(own) and not (nested and key.rpartition(".")[2] in own)
    sentence = f"{key}.init_args.{option}: {name if known else 'its class'} has no such argument"
    if group == "model" and option in _MEANT and option not in own:
        return f"{sentence}; did you mean {_MEANT[option]}?"
    if known and (close := nearest(option, own)):
        return f"{sentence}; did you mean {close}?"
    if nested:
        return f"{sentence}; it has {', '.join(own)}" if known else sentence
    return f"{sentence}; see --{group}.help {name}"


def _settings_alone(value: str) -> bool:
    """Return whether a value is settings of a class, or a list of them, that name no class."""
    return value.startswith(("{", "[{")) and "class_path" not in value


def _classless(key: str) -> str:
    """Return the sentence on settings of a class that was not named."""
    config = {"model": "an algorithm's config, as in --config graft,"}
    config |= dict.fromkeys(
        ("data", "pipeline", "reward"), "a domain's config, as in --config layout,"
    )
    before = f"put {config[key]} before them, or " if key in config else ""
    return f"{key} has settings but no class; {before}give its class_path"


def _arguments(path: str) -> list[str]:
    """Return the names of a class's arguments, those of its bases included."""
    module, _, name = path.rpartition(".")
    found = getattr(sys.modules.get(module), name, None)
    bases = found.__mro__ if isinstance(found, type) else ()
    made = [vars(base)["__init__"] for base in bases[:-1] if "__init__" in vars(base)]
    taken = [each for init in made for each in list(signature(init).parameters.values())[1:]]
    stars = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    return [each.name for each in taken if each.kind not in stars]


def _without_key(text: str) -> str:
    """Return the sentence of an error that names no key of the parser's."""
    if found := _REQUIRED.search(text):
        keys = re.sub(r"\b(?:fit|validate|test|predict)\.", "", found.group(1))
        return f"{short(keys, 120)} must be given, by an option or in a config"
    if found := re.search("[Uu]nrecognized arguments: (.*)", text):
        return f"there is no option {short(found.group(1), 120)}; lit-rlft COMMAND --help shows all"
    if found := re.search('Spaces not allowed in keys: "(.*)"', text):
        key = short(found.group(1), 120)
        return f"there is no key {key!r}: keys have no spaces; look into the files of --config"
    return short(text, 250)


def _plain(reason: str, classes: Sequence[str]) -> str:
    """Return a reason without the parser's own words."""
    if "is abstract" in reason:
        return "the class is abstract; give one that defines all of its methods"
    if found := re.search(r"does not correspond to a subclass of (\w+)", reason):
        return f"the class is no {found.group(1)}"
    if found := re.search(r"Parameter '(\w+)' from .* does not specify a type", reason):
        return f"its argument {found.group(1)} has no type; write {found.group(1)}: float, or so"
    if found := re.search(r"[Uu]nrecognized arguments: --([\w.]+)", reason):
        return f"it has no argument {found.group(1)}; see --model.help"
    if classes and reason.startswith(("No module named", "module ")):
        return f"{classes[-1]} cannot be imported: {short(reason, 120)}"
    return short(reason, 160)


def _hint(value: str) -> str:
    return f" (got {short(value)})" if value else ""


def _types(text: str) -> str:
    """Return types in words: "int or null"."""
    text = re.sub(r"<class '([\w.]+)'>", r"\1", text)
    text = re.sub(r"typing\.Literal\[([^\]]*)\]", r"one of \1", text)
    text = re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", text)
    return text.replace("NoneType", "null").replace(", null", " or null")


def _own_code(causes: Sequence[BaseException]) -> str:
    """Return what failed where, if an error was raised by a module that was being imported."""
    error = causes[-1]
    frames = traceback.extract_tb(error.__traceback__)
    # An error of the parser's own comes through no module that is being imported.
    importing = any(frame.name == "<module>" for frame in frames)
    if importing and (line := users_line(error)):
        return line
    if isinstance(error, SyntaxError) and error.filename and is_users(error.filename):
        return short(f"SyntaxError: {error.msg} ({Path(error.filename).name}, line {error.lineno})")
    return ""


def users_line(error: BaseException) -> str:
    """Return an error and the innermost line of the user's own code that it came through."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if is_users(frame.filename):
            place = f"{Path(frame.filename).name}, line {frame.lineno}"
            return short(f"{type(error).__name__}: {error} ({place})", 160)
    return ""


def is_users(filename: str) -> bool:
    """Return whether code is the user's own: neither an installed package's, Python's, nor ours.

    What the folder of packages is called differs between installations. Therefore, a package is
    known by its metadata, which is installed beside it. An editable package has it elsewhere: its
    code is the user's own.
    """
    if filename.startswith("<"):
        return False
    file, ours = Path(filename).absolute(), Path(__file__).parents[2]
    others = [ours / "lit_rlft", ours / "domains", Path(sysconfig.get_path("stdlib"))]
    homes = [Path(entry).absolute() for entry in sys.path]
    others += [home for home in homes if file.is_relative_to(home) and _has_packages(home)]
    return not any(file.is_relative_to(other) for other in others)


def _has_packages(home: Path) -> bool:
    """Return whether packages were installed into a folder or zip file."""
    # A project's own folder may have an egg-info, in which no file is called METADATA.
    return any(found.read_text("METADATA") for found in distributions(path=[str(home)]))
