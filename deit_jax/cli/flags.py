"""Common parts of the commands: flags with a config file, help, and output files."""

import re
from collections.abc import Iterable
from pathlib import PurePath

from absl import flags
from ml_collections import ConfigDict, config_flags

from deit_jax.cli import suggest
from deit_jax.config import files
from deit_jax.config.serialize import default_fields, flatten
from deit_jax.errors import UserError
from deit_jax.shapes import Size, simplest
from deit_jax.storage import check_schemes, to_path, write_text
from deit_jax.workdir.which import LATEST, parse_checkpoint

_LIST = "configs/base.py lists them all"
_REMEDIES = {  # for what the flags' libraries say of a value
    r"could not convert string to float": "not a number; give one",
    r"invalid literal for int\(\)|integer string conversion": "not a whole number; give one",
    r"Non-boolean argument": "give true or false",
}


class _SizeParser(flags.ArgumentParser):
    """`224` as a number, `224,320` or `224x320` as (height, width)."""

    def parse(self, argument: str) -> Size:
        """Return the size that is meant; raise ValueError for what is none."""
        words = argument.strip("()").replace("x", ",").split(",")
        numbers = [int(word) if word.strip().isdecimal() else 0 for word in words]
        if len(numbers) > 2 or min(numbers) < 1:
            raise ValueError("a size is one number, or height and width, each above 0")
        return simplest((numbers[0], numbers[-1]))

    def flag_type(self) -> str:
        """Return what --help calls it."""
        return "size"


ALL = "all"  # checkpoints, one after the other


class _CheckpointParser(flags.ArgumentParser):
    """`latest`, `best` or the number of a step; with `every` also `all`."""

    def __init__(self, every: bool):
        self._every = every

    def parse(self, argument: str | int) -> str | int:
        """Return which checkpoint is meant; raise ValueError for what is none."""
        if self._every and argument == ALL:
            return ALL
        try:
            return parse_checkpoint(argument)
        except UserError as error:
            raise ValueError(str(error)) from error

    def flag_type(self) -> str:
        """Return what --help calls it."""
        return "checkpoint"


class UsageError(UserError):
    """A command line that cannot be understood (exit code 2)."""


class Command:
    """The flags of one command: define them on `flags`, then parse the words after its name."""

    def __init__(self, name: str, doc: str):
        self.flags = flags.FlagValues()
        self._name, self._doc = name, doc
        self.boolean("debug", False, "show the traceback of an error")

    def string(self, name: str, default: str | None, text: str) -> None:
        """Define a flag that is a string."""
        flags.DEFINE_string(name, default, text, flag_values=self.flags)

    def boolean(self, name: str, default: bool, text: str) -> None:
        """Define a flag that is on or off."""
        flags.DEFINE_boolean(name, default, text, flag_values=self.flags)

    def integer(
        self, name: str, default: int | None, text: str, lower_bound: int | None = None
    ) -> None:
        """Define a flag that is a whole number."""
        flags.DEFINE_integer(name, default, text, lower_bound, flag_values=self.flags)

    def size(self, name: str, text: str) -> None:
        """Define a flag that is a size of images: one side, or height and width."""
        flags.DEFINE(_SizeParser(), name, None, text, self.flags)

    def number(
        self,
        name: str,
        default: int | float,
        text: str,
        low: int | float | None = None,
        high: int | float | None = None,
    ) -> None:
        """Define a flag that is a number."""
        flags.DEFINE_float(name, default, text, low, high, flag_values=self.flags)

    def words(self, name: str, default: list[str] | None, text: str) -> None:
        """Define a flag that is several words with commas between them."""
        flags.DEFINE_list(name, default, text, flag_values=self.flags)

    def choice(self, name: str, default: str | None, choices: Iterable[str], text: str) -> None:
        """Define a flag that is one of some words."""
        flags.DEFINE_enum(name, default, list(choices), text, flag_values=self.flags)

    def add_config(self, argv: list[str]) -> None:
        """Define --config=FILE[:ARGS] and --config.KEY=VALUE for every key of that file."""
        files.look_beside()
        config_flags.DEFINE_config_file(
            "config",
            None,
            "config file, with its arguments after a colon: configs/deit.py:variant=small",
            lock_config=True,
            flag_values=self.flags,
            sys_argv=[self._name, *_with_config_files(argv)],
        )

    def parse(self, argv: list[str], required: tuple[str, ...] = ()) -> list[str]:
        """Read the flags; return the words that are none. Print the help and exit if asked to."""
        if any(word in ("-h", "--help", "-help") for word in argv):
            print(f"{self._doc}\n\nFlags:\n{self.flags.get_help()}")
            raise SystemExit(0)
        path = _config_path(argv) if "config" in self.flags else ""
        # ml_collections puts off reporting a file that is not there to the first use.
        if path and not files.is_there(path):
            raise UsageError(f"--config={files.none_such(path)}")
        try:
            words = map(_underscored, _with_config_files(argv))
            rest = self.flags([self._name, *words])[1:]
        except Exception as error:  # the config file is a program, and may raise anything
            fields = _fields_of(path)
            raise UsageError(
                _unknown(error, argv, fields, self.flags) or _explain(error)
            ) from error
        for name in required:
            if getattr(self.flags, name) in (None, ""):
                raise UsageError(self._missing(name))
        self._check_places(rest)
        return rest

    def _check_places(self, rest: list[str]) -> None:
        """Raise UsageError if a flag, a field or a word names a place that is out of reach."""
        texts = [(f"--{name}", self.flags[name].value) for name in self.flags if name != "config"]
        texts += [("argument", word) for word in rest]
        if "config" in self.flags and self.config is not None:
            texts += [(f"--config.{key}", value) for key, value in flatten(self.config).items()]
        try:
            check_schemes(texts)
        except UserError as error:
            raise UsageError(str(error)) from None

    @property
    def config(self) -> ConfigDict | None:
        """The config that --config names, with its changes; None if it was not given."""
        return self.flags.config

    def given(self) -> frozenset[str]:
        """Return which fields of the config the command line sets: "data.eval_crop_ratio", …"""
        if self.config is None:
            return frozenset()
        return frozenset(config_flags.get_override_values(self.flags["config"]))

    def required_config(self) -> ConfigDict:
        """Return the config that --config names; raise UsageError if it was not given."""
        if (config := self.config) is None:
            raise UsageError(self._missing("config"))
        return config

    def _missing(self, name: str) -> str:
        return f"--{name}=… is missing; see `deit {self._name} --help`"


def add_process_flags(command) -> None:
    """Define the flags that make a process one of several."""
    found = "where TPU, Slurm or Open MPI do not tell"
    command.boolean("multihost", False, "this is one of several processes of the run")
    command.string("coordinator", None, f"HOST:PORT of process 0, {found}")
    command.integer("num_processes", None, f"how many there are, {found}")
    command.integer("process_id", None, f"which one this is, {found}")
    command.number("startup_timeout", 300.0, "seconds to wait for the others at the start", 1.0)


def add_workdir_flags(command: Command, images: int) -> None:
    """Define the flags of the commands that look at runs; `images` is how many unless told."""
    command.words("workdir", None, "a run, or several with commas between them")
    command.integer(
        "images", images, "evaluate on at most so many images, evenly spaced", lower_bound=1
    )


def add_checkpoint_flags(command: Command, every: bool = False) -> None:
    """Define --checkpoint and --ema, which say what of a run is taken; `every` allows all."""
    words = "latest, best or a step" + (", or all" if every else "")
    text = f"of a run: {words}; best by the held-out images, of those that are kept"
    flags.DEFINE(_CheckpointParser(every), "checkpoint", LATEST, text, command.flags)
    command.boolean("ema", False, "take the moving average of the weights, of a run or in a file")


def write_output(path: str | PurePath, text: str) -> None:
    """Write what --out names; characters that UTF-8 cannot hold, as in odd file names, are `?`."""
    try:
        write_text(to_path(path), text)
    except OSError as error:
        raise UserError(f"--out={path}: cannot be written ({error.strerror})") from error


def no_words(words: list[str]) -> None:
    """Raise UsageError if the command line holds words that the command does not take."""
    if words:
        raise UsageError(f"unexpected argument {words[0]!r}; flags are written --name=value")


def _with_config_files(argv: list[str]) -> list[str]:
    """Return the words with the path of the config file that --config names."""
    words = list(argv)
    for i, word in enumerate(words):
        flag, equals, value = word.partition("=")
        if flag not in ("--config", "-config"):
            continue
        if equals:
            words[i] = f"{flag}={files.located(value)}"
        elif i + 1 < len(words):
            words[i + 1] = files.located(words[i + 1])
    return words


def _underscored(word: str) -> str:
    """Return `--input-only=x` as `--input_only=x`: both are understood."""
    flag, equals, value = word.partition("=")
    if not flag.startswith("--") or flag.startswith("--config."):
        return word
    return f"--{flag[2:].replace('-', '_')}{equals}{value}"


def _config_path(argv: list[str]) -> str:
    """Return FILE[:ARGS] that --config names, "" without."""
    words = [word.partition("=") for word in _with_config_files(argv)]
    for i, (flag, equals, value) in enumerate(words):
        if flag in ("--config", "-config"):
            return value if equals else "".join(words[i + 1]) if i + 1 < len(words) else ""
    return ""


def _fields_of(path: str) -> frozenset[str]:
    """Return the fields of a config file, flat; none where there is none, or it cannot be read."""
    try:
        return frozenset(flatten(files.config_of(path))) if path else frozenset()
    except UserError:
        return frozenset()


def _unknown(
    error: Exception, argv: list[str], fields: frozenset[str], known: Iterable[str]
) -> str | None:
    """Return what to say of the field or flag of a command line that there is not; None without."""
    groups = {field[:i] for field in fields for i, sign in enumerate(field) if sign == "."}
    for word in argv if fields else ():
        flag = word.partition("=")[0]
        match = re.fullmatch(r"--?(?:no)?config\.(.*?)((?:\[.*)?)", flag)
        if match is None or (match[1] in fields and not match[2]):
            continue
        if match[1] in fields:
            return f"{flag}: set all of --config.{match[1]} at once, as in '(8, 16)'"
        if match[1] not in groups:
            near = suggest.fields(match[1], fields)
            return f"{flag}: no such field; {_meant(near)}{_LIST}"
        if f"flag {flag}=" not in str(error):  # one that is set by a dict
            continue
        near = [name] if (name := f"{match[1]}.name") in fields else []
        return f"{word}: a group of fields; {_meant(near)}set one of them, {_LIST}"
    if not isinstance(error, flags.UnrecognizedFlagError):
        return None
    wrong, near = error.flagname, suggest.flags(error.flagname, [f for f in known if f != "config"])
    if wrong.startswith("config."):
        return f"--{wrong}: a field of a config; name the config too, with --config=FILE"
    if not fields and "config" in known:
        fields = frozenset(default_fields())
    if field := suggest.called(wrong, fields):
        near = [f"config.{field}"]
    elif not near:
        near = [f"config.{field}" for field in suggest.fields(wrong, fields)]
    meant = _meant([f"--{name}" for name in near]) or "--help lists them all"
    return f"--{wrong}: no such flag; {meant.removesuffix(' ')}"


def _meant(names: list[str]) -> str:
    return f"did you mean {suggest.either(names)}? " if names else ""


def _explain(error: Exception) -> str:
    """Return what a flag's error says that helps, on one line."""
    text = str(error).replace("\\n", "\n").replace("\\'", "'")
    if early := re.match(r"Found (--\S+?)(?:=.*)? in argv before", text, re.DOTALL):
        return f"{early[1]}: write --config=FILE before its fields"
    for pattern, remedy in _REMEDIES.items():
        if match := re.match(rf"flag (--\S+?=.*?): .*{pattern}", text, re.DOTALL):
            return f"{match[1]}: {remedy}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if "Traceback (most recent call last):" in lines:  # raised by the config file itself
        return f"{lines[0].split(': Error')[0]}: {lines[-1].partition(': ')[2] or lines[-1]}"
    return " ".join(lines) or type(error).__name__
