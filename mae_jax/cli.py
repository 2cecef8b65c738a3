"""One entry for all commands: `mae-jax COMMAND ...` or `python -m mae_jax COMMAND ...`.

A command is a module of this package with `main(argv)`. What a user can mend (`UserError`) ends it
with one line, `error: MESSAGE`, and exit status 2; Ctrl-C with one line and status 130. Any other
exception is a fault of the program and shows its traceback. docs/failures.md has all statuses.
"""

import argparse
import glob
import importlib.metadata
import importlib.util
import logging as python_logging
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from absl import logging
from tqdm import tqdm

import mae_jax
from mae_jax import UserError

# JAX is imported by the commands, when Ctrl-C is minded and the platforms are chosen.

COMMANDS = {
    "train": "train what a recipe describes, or continue",
    "evaluate": "accuracy of a classifier on a labelled data set",
    "export": "weights for other libraries",
    "features": "features of a folder of pictures",
    "visualize": "what a model reconstructs, as pictures",
    "results": "what supervised runs scored, and where the time of runs went",
    "report": "a page of a sweep or a run: tables beside the paper's, plots, pictures",
    "plan": "compile a recipe's step for a TPU pod that is not there",
    "bench": "how fast the input pipeline, the step or the start is",
}


def main(argv: Sequence[str] | None = None) -> int | None:
    """Runs the command that the first argument names; returns its exit status."""
    command, *rest = (sys.argv[1:] if argv is None else argv) or ["-h"]
    if command in ("-h", "--help"):
        print("usage: mae-jax COMMAND ...; `mae-jax COMMAND -h` lists a command's options\n")
        print("\n".join(f"  {name:10} {what}" for name, what in COMMANDS.items()))
    elif command == "--version":
        print(f"mae_jax {mae_jax.__version__}")
    else:
        return start(command, rest)


def start(command: str, argv: Sequence[str] | None = None) -> int | None:
    """Runs one command, with the arguments of the process where none are given."""
    _ask_for_huge_pages()
    try:
        if command not in (*COMMANDS, "main"):
            raise UserError(f"no command {command}: choose one of {', '.join(COMMANDS)}")
        if command != "plan":  # which needs the TPU's compiler, and sets its own platform
            _skip_absent_tpu()
        set_up_logging()
        module = importlib.import_module(f"mae_jax.{'main' if command == 'train' else command}")
        return module.main(argv)
    except KeyboardInterrupt:
        from mae_jax.distributed import fate

        fate.leave(fate.BY_CTRL_C, "stopped by Ctrl-C")  # a compilation cannot be waited for
    except Exception as error:
        if "mae_jax.distributed.fate" in sys.modules:
            from mae_jax.distributed import fate

            fate.fail(error)  # ends here if the run has several processes
        if (code := getattr(error, "exit_code", None)) is None:
            raise
        logging.debug("traceback", exc_info=True)
        lines = (line.strip() for line in str(error).splitlines())
        print("error: " * (code != 42) + " ".join(lines), file=sys.stderr)
        sys.exit(code)


def _ask_for_huge_pages() -> None:
    """Starts this program again in its own place, once, as glibc reads its settings only then.

    XLA on a CPU asks the system for the memory of a step anew each time. Given in pages of 4 kB it
    takes an eighth of a step of ViT-B (docs/performance.md). `GLIBC_TUNABLES=` leaves that so.
    """
    spec = sys.modules["__main__"].__spec__  # of `python -m`
    program = spec.name.partition(".")[0] if spec else os.path.basename(sys.argv[0])
    ours = sys.platform == "linux" and program in ("mae_jax", "mae-jax")
    if ours and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _skip_absent_tpu() -> None:
    """Keeps JAX from looking for a TPU where libtpu is installed, for `plan`, but no TPU is."""
    chosen = "JAX_PLATFORMS" in os.environ or "JAX_FORCE_TPU_INIT" in os.environ
    devices = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
    pod = any(name.startswith("TPU_") for name in os.environ)
    if chosen or devices or pod or importlib.util.find_spec("libtpu") is None:
        return
    plugins = [plugin.name for plugin in importlib.metadata.entry_points(group="jax_plugins")]
    gpu = [name for name in ("cuda", "rocm") if any(name in plugin for plugin in plugins)]
    os.environ["JAX_PLATFORMS"] = ",".join([*gpu, "cpu"])


# Options.


class Parser(argparse.ArgumentParser):
    """Options of one command, described by its module's docstring; errors are one line."""

    def __init__(self, command: str, description: str):
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=f"mae-jax {command}", description=description, formatter_class=raw)
        self.add_argument("--version", action="version", version=f"mae_jax {mae_jax.__version__}")

    def error(self, message: str) -> None:
        """Ends with the message."""
        raise UserError(f"{message}; `{self.prog} -h` lists the options")


def parse_recipe(parser: Parser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of a command that runs a recipe; `config` with its overrides."""
    from mae_jax.config import FIELDS, load_config, override

    what = "a file, or a recipe of this project, as quickstart or pretrain:vit_l; "
    what += "--config.FIELD=VALUE changes any field of mae_jax/config.py"
    parser.add_argument("--config", required=True, metavar="RECIPE[:VARIANT]", help=what)
    parser.add_argument("-v", "--verbose", action="store_true", help="log more")
    options, overrides = [], []
    tokens = iter(sys.argv[1:] if argv is None else argv)
    for token in tokens:
        flag, equals, text = token.partition("=")
        name = flag.removeprefix("--config.").removeprefix("--noconfig.")
        if name == flag:
            options.append(token)
            continue
        if not equals and name in FIELDS and isinstance(FIELDS[name].default, bool):
            text = "false" if flag.startswith("--no") else "true"
        elif not equals:
            text = next(tokens, "")
        overrides.append((name, text))
    arguments = parser.parse_args(options)
    if arguments.verbose:
        logging.set_verbosity(logging.DEBUG)
    arguments.config = load_config(arguments.config)
    for name, text in overrides:
        override(arguments.config, name, text)
    return arguments


def numbers(text: str) -> tuple[float, ...]:
    """`0.5,0.75` as numbers."""
    return tuple(float(x) for x in text.split(","))


def image_size(text: str) -> tuple[int, int]:
    """`224` or `192,256` as height and width."""
    sides = [int(x) for x in text.split(",")]
    if len(sides) > 2:
        raise ValueError
    return sides[0], sides[-1]


def class_names(text: str) -> tuple[str, ...]:
    """`none`, or the lines of a file."""
    try:
        return () if text == "none" else tuple(pathlib.Path(text).read_text().splitlines())
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error.strerror}") from error


def add_overrides(parser: Parser) -> None:
    """Options for fields of `models.spec.ModelSpec`."""
    from mae_jax.models.targets import TARGETS

    group = parser.add_argument_group("what weights do not tell of themselves")
    group.add_argument("--heads", type=int, help="attention heads of the encoder")
    group.add_argument("--decoder_heads", type=int, help="attention heads of the decoder")
    group.add_argument("--image_size", type=image_size, help="side, or height,width, trained at")
    group.add_argument("--target", choices=tuple(TARGETS), help="what the decoder predicts")
    group.add_argument("--mean", type=numbers, help="of the input's channels, pixels in [0, 1]")
    group.add_argument("--std", type=numbers, help="of the input's channels, pixels in [0, 1]")
    names = "file of names, one a line, in place of those the weights carry; none: forget those"
    group.add_argument("--class_names", type=class_names, help=names)


def overrides(arguments: argparse.Namespace) -> dict[str, Any]:
    """Those of `add_overrides` that were given."""
    names = ("heads", "decoder_heads", "image_size", "target", "mean", "std", "class_names")
    given = {name: getattr(arguments, name) for name in names}
    return {name: value for name, value in given.items() if value is not None}


# What is printed.


class _Handler(python_logging.Handler):
    """Writes lines that a progress bar makes room for."""

    def emit(self, record: python_logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def set_up_logging() -> None:
    """Our own lines with the time, in the first process; other libraries' from warnings up."""
    package = str(pathlib.Path(mae_jax.__file__).parent)

    def is_shown(record: python_logging.LogRecord) -> bool:
        import jax

        from mae_jax.distributed import fate

        # Orbax's thread writes a traceback where a peer died, which is told in one line instead.
        if record.exc_info and fate.caused_by_peer(record.exc_info[1]):
            return False
        ours = record.pathname.startswith(package)
        return record.levelno >= python_logging.WARNING or (ours and jax.process_index() == 0)

    logging.set_verbosity(logging.INFO)
    if any(isinstance(handler, _Handler) for handler in python_logging.root.handlers):
        return
    handler = _Handler()
    handler.setFormatter(python_logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    handler.addFilter(is_shown)
    python_logging.root.addHandler(handler)


def open_weights(path: str, overrides: Mapping[str, Any] | None) -> Any:
    """`open_checkpoint`, and what its reader should know of the weights on stderr."""
    from mae_jax.interop.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(path, **(overrides or {}))
    for note in checkpoint.notes:
        print(f"note: {note}", file=sys.stderr)
    return checkpoint
