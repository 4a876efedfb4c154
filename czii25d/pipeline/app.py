"""What every numbered script shares: Hydra, published flags, ``--help`` that explains keys, one-line errors."""

from __future__ import annotations

import ctypes
import logging
import os
import re
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobRuntime
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.table import Table

from czii25d.errors import INPUT_ERROR, InputError, did_you_mean
from czii25d.particles import conf_dir, load_particles

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

PUBLISHED_FLAGS = ("mode", "class_num")  # the flags of the published 01 and 02, spelt ``--flag value``
RUNS_AS_WORDS = ("view",)  # configurations whose runs may be given as words of their own
NUMBER_OR_NAME = ("data.fold_id", "trainer.precision", "trainer.devices")  # number by default, text allowed
OWN_PARTICLES = "own"  # what Hydra calls the table of particles=FILE
INTERRUPTED = 130
MENDABLE = (InputError, HydraException, OmegaConfBaseException, OSError)  # by the user, who is told in one line


def run(
    function: Callable[[DictConfig], Any],
    config_name: str,
    description: str | None = None,
    program_words: int = 1,
) -> None:
    """Run ``function`` with the configuration ``conf/<config_name>.yaml`` and the command line's overrides.

    What the user can mend (`InputError`, a misspelt key, no space left) is printed as one line on standard
    error, with exit status 2; ``CZII25D_TRACEBACK=1`` shows the traceback instead.

    Parameters
    ----------
    description
        What ``--help`` says first; ``None``: the docstring of the script.
    program_words
        How many words of the command line name the program: 1 of ``21_predict.py``, 2 of ``czii25d predict``.
    """
    program, argv = sys.argv[:program_words], translate_flags(sys.argv[program_words:])
    if config_name in RUNS_AS_WORDS:
        argv = translate_runs(argv)
    if {"--help", "-h"} & set(argv):
        print_help(description or sys.modules["__main__"].__doc__ or "", config_name)
        return
    set_up_logging()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let exceptions come here rather than be printed by Hydra
    overrides = [*argv, f"hydra.job.name={config_name}"]
    with one_line_errors(config_name):
        sys.argv = [program[0], *with_own_particles(overrides)]  # where Hydra reads them
        decorate = hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=config_name)
        table = next((word for word in overrides if word.startswith("particles=")), "")
        decorate(_Checked(function, config_name, program, table))()


@contextmanager
def one_line_errors(config_name: str) -> Iterator[None]:
    """Print what the user can mend as one line and exit; let everything else through."""
    try:
        yield
    except MENDABLE as error:
        if os.environ.get("CZII25D_TRACEBACK"):
            raise
        Console(stderr=True, soft_wrap=True, highlight=False).print(
            f"error: {explain(error, config_name)}", markup=False, style="red"
        )
        raise SystemExit(INPUT_ERROR) from None
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted; start the same command again to go on")
        raise SystemExit(INTERRUPTED) from None


class _Checked:
    """The pipeline function behind a check of the types of overridden values; picklable for Hydra's launchers."""

    def __init__(
        self, function: Callable[[DictConfig], Any], config_name: str, program: Sequence[str], table: str
    ) -> None:
        self.function, self.config_name, self.program = function, config_name, program
        self.table = table  # the override particles=..., as it was given
        self.__module__ = function.__module__  # Hydra asks where the task function lives

    def __call__(self, cfg: DictConfig) -> Any:
        # Lightning starts the other processes of a training with these words: those of this job, not of its sweep.
        own = f"particles={OWN_PARTICLES}"
        task = [self.table if word == own else word for word in HydraConfig.get().overrides.task]
        sys.argv = [*self.program, *task]
        set_up_logging()  # once more: a launcher may have started a fresh process
        if HydraConfig.get().mode == RunMode.MULTIRUN:  # the other jobs go on; at the end the sweep fails
            return self._work(cfg)
        with one_line_errors(self.config_name):  # here, before Hydra adds lines of its own
            return self._work(cfg)

    def _work(self, cfg: DictConfig) -> Any:
        check_value_types(cfg, load_config(self.config_name))
        return self.function(cfg)


def translate_flags(argv: Sequence[str]) -> list[str]:
    """Turn the published ``--mode train`` and ``--class_num 6`` (or ``--class_num=6``) into Hydra overrides."""
    translated: list[str] = []
    arguments = iter(argv)
    for argument in arguments:
        flag, equals, value = argument.removeprefix("--").partition("=")
        if argument.startswith("--") and flag in PUBLISHED_FLAGS:
            translated.append(f"{flag}={value if equals else next(arguments, '')}")
        else:
            translated.append(argument)
    return translated


def translate_runs(argv: Sequence[str]) -> list[str]:
    """Turn words that are neither overrides nor options, ``TS_1 TS_2``, into ``runs=['TS_1','TS_2']``."""
    names = [word for word in argv if "=" not in word and not word.startswith(("-", "~", "+"))]
    if not names:
        return list(argv)
    quoted = ",".join("'{}'".format(name.replace("'", "\\'")) for name in names)
    return [*(word for word in argv if word not in names), f"runs=[{quoted}]"]


def with_own_particles(overrides: Sequence[str]) -> list[str]:
    """Make a table that is known to Hydra of the file in ``particles=FILE`` (``.yaml``, or a copick ``.json``)."""
    translated = []
    for override in overrides:
        key, _, value = override.partition("=")
        if key == "particles" and value.endswith((".yaml", ".yml", ".json")):
            table = load_particles(Path(value)).to_config()
            ConfigStore.instance().store(name=OWN_PARTICLES, node=table, group="particles")
            override = f"particles={OWN_PARTICLES}"
        translated.append(override)
    return translated


def set_up_logging() -> None:
    """Send the package's log, message only, to standard error."""
    logger = logging.getLogger("czii25d")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


def keep_freed_memory() -> None:
    """Ask glibc to keep freed memory rather than give it back to the system after every step.

    Activations of tens of megabytes otherwise cost a page fault for every 4 kB of every step: a third of the time of
    a training on a CPU. Without effect where there is no glibc.
    """
    m_trim_threshold, m_mmap_threshold, m_arena_max = -1, -3, -8  # malloc.h
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(m_arena_max, 1)  # the arenas of other threads do without the next line
        libc.mallopt(m_mmap_threshold, 2**30)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


def load_config(config_name: str, overrides: Sequence[str] = ()) -> DictConfig:
    """Return the configuration ``conf/<config_name>.yaml`` with overrides, for notebooks and other programs."""
    running = GlobalHydra.instance().hydra  # our own job, or one of a program whose configuration is not ours
    job_name = JobRuntime.instance().get("name")
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(conf_dir().resolve()), job_name, version_base="1.3"):
            return hydra.compose(config_name, with_own_particles(overrides))
    finally:
        GlobalHydra.instance().hydra = running


def leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield ``(dotted key, raw value)`` for every value of a configuration."""
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, node


def check_value_types(cfg: DictConfig, defaults: DictConfig) -> None:
    """Refuse text where the default is a number, and a value where there are keys within.

    ``opt.lr=fast`` is a slip, not a learning rate.
    """
    known = dict(leaves(OmegaConf.to_container(defaults, resolve=False)))
    for key, value in leaves(OmegaConf.to_container(cfg, resolve=False)):
        default = known.get(key)
        within = [name for name in known if name.startswith(f"{key}.")]
        if within and value is not None and not isinstance(value, dict):
            raise InputError(f"key {key}", f"keys within it, as {within[0]}=...", repr(value), "set those")
        is_number = isinstance(default, int | float) and not isinstance(default, bool)
        if is_number and isinstance(value, str) and "${" not in value and key not in NUMBER_OR_NAME:
            raise InputError(f"key {key}", f"a number such as {default}", repr(value), "correct the override")


def explain(error: Exception, config_name: str) -> str:
    """Return the one line that says what is wrong and how to mend it."""
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, OSError) and not isinstance(error, HydraException):
        name = f"{error.filename}: " if error.filename else ""
        cure = "free space or move paths.output" if error.errno == 28 else "see that it is there and writable"
        return f"{name}{error.strerror or error}; {cure}"
    text = " ".join(f"{error} {error.__cause__ or ''}".split("Config search path")[0].split())
    if match := re.search(r"Could not override '([^']+)'", text) or re.search(r"full_key: (\S+)", text):
        key = match[1]
        known = [name for name, _ in leaves(OmegaConf.to_container(load_config(config_name), resolve=False))]
        hint = did_you_mean(key, known)
        return f"key {key}: expected a key of conf/{config_name}.yaml, found none of that name{hint}; see --help"
    return f"{text}; see --help"


COMMENTED_KEY = re.compile(r"^(?P<indent> *)(?P<key>[\w-]+):(?P<rest>.*?)(?:\s#\s(?P<comment>.*))?$")


def read_comments(path: Path) -> dict[str, str]:
    """Return the comment at the end of each key's line of a YAML file, by dotted key."""
    comments: dict[str, str] = {}
    parents: list[tuple[int, str]] = []
    for line in path.read_text().splitlines():
        if match := COMMENTED_KEY.match(line):
            indent = len(match["indent"])
            parents = [parent for parent in parents if parent[0] < indent]
            parents.append((indent, match["key"]))
            if match["comment"]:
                comments[".".join(key for _, key in parents)] = match["comment"]
    return comments


def print_help(description: str, config_name: str) -> None:
    """Print what a script does and every key it takes: default and explanation."""
    defaults = load_config(config_name)
    comments = read_comments(conf_dir() / f"{config_name}.yaml")
    for group in map(str, defaults.keys()):
        for path in sorted((conf_dir() / group).glob("*.yaml"), key=lambda p: p.stem != "default"):
            for key, comment in read_comments(path).items():
                comments.setdefault(f"{group}.{key}", comment)
    console = Console(highlight=False)
    console.print(description.strip(), markup=False)
    console.print("\nOverride a key with key=value; sweep with -m key=a,b; choose another group with group=name:")
    for folder in sorted(path for path in conf_dir().iterdir() if path.is_dir()):
        names = sorted(path.stem for path in folder.glob("*.yaml"))
        if len(names) > 1 and (folder.name in defaults or folder.name == "experiment"):
            console.print(f"  {folder.name}={'|'.join(names)}", markup=False)
    table = Table("key", "default", "what it is", box=None, pad_edge=False, header_style="bold")
    table.columns[2].overflow = "fold"
    for key, value in leaves(OmegaConf.to_container(defaults, resolve=False)):
        if not key.startswith("particles."):
            table.add_row(key, "null" if value is None else str(value), comments.get(key, ""))
    console.print(table, markup=False)
