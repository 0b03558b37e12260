"""`deit COMMAND`, or `python -m deit_jax COMMAND`: find the command and report its errors."""

import importlib
import logging
import os
import sys

from deit_jax.cli import COMMANDS, huge_pages, platforms

USAGE = """DeiT in JAX: train, evaluate and use data-efficient image transformers.

usage: deit COMMAND [--flag=value …]
       deit COMMAND --help

{commands}

An error is one line; --debug adds its traceback. Exit codes: 0 success, 1 failure, 2 usage,
75 a training that was told to stop, saved its state and goes on with the same command.
"""


def main(argv: list[str] | None = None) -> int:
    """Run one command and return the exit code; without `argv`, that of the command line."""
    program, argv = argv is None, sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        lines = (f"  {name:10}{entry.help}" for name, entry in COMMANDS.items())
        print(USAGE.format(commands="\n".join(lines)))
        return 0 if argv else 2
    if argv[0] == "--version":
        from deit_jax import __version__

        print(__version__)
        return 0
    name, rest = argv[0], argv[1:]
    if name not in COMMANDS:
        import difflib

        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"commands: {', '.join(COMMANDS)}"
        print(f"deit: unknown command {name!r}; {hint}", file=sys.stderr)
        return 2
    computes = COMMANDS[name].computes
    if program and (warning := platforms.choose()) and computes:
        print(warning, file=sys.stderr)
    # Another program that calls this function could not be started again from here.
    if program and computes and "--input-only" not in rest:
        huge_pages.restart()
    return _run(name, rest)


def _run(name: str, argv: list[str]) -> int:
    from deit_jax.cli.flags import UsageError
    from deit_jax.errors import EXIT_CODE, Interrupted, UserError

    _start_logging("--debug" in argv)
    try:
        importlib.import_module(f"deit_jax.cli.{name}").main(argv)
        sys.stdout.flush()
        return 0
    except BrokenPipeError:  # who read the output has gone, as `| head` does
        os._exit(1)  # or Python would try once more to write the rest, and complain
    except Interrupted as stopped:
        print(f"deit {name}: {stopped}", file=sys.stderr)
        return EXIT_CODE
    except KeyboardInterrupt:
        print(f"deit {name}: interrupted", file=sys.stderr)
        return 1
    except Exception as error:
        if "--debug" in argv:
            raise
        if isinstance(error, UserError):
            message = str(error)
        elif isinstance(error, OSError) and str(error.filename).startswith(("gs://", "s3://")):
            message = f"{error.filename}: {error.strerror}"  # which says what to do
        else:
            first = next(iter(str(error).splitlines()), "")
            if isinstance(error, TimeoutError):  # of gcsfs, which says no more
                first = first or "a server did not answer in time; run the same command again"
            message = f"{type(error).__name__}: {first} (--debug shows where)"
            if isinstance(error, AssertionError) and os.environ.get("JAX_PLATFORMS"):
                # JAX says no more where a platform that it is told to use has no plugin.
                chosen = os.environ["JAX_PLATFORMS"]
                message = f"{message}; with JAX_PLATFORMS={chosen}: `deit doctor` says what is here"
        # A value may hold line breaks of its own: that of a flag, the name of a file.
        print(f"deit {name}: {' '.join(message.splitlines())}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1


class _AboveBars(logging.StreamHandler):
    """Lines of the log, above a progress bar where there is one; tqdm's own handler loads it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line."""
        if "tqdm" not in sys.modules:
            super().emit(record)
            return
        from tqdm import tqdm

        try:
            tqdm.write(self.format(record), file=self.stream)
            self.flush()
        except Exception:  # as logging's own handlers do
            self.handleError(record)


def _start_logging(debug: bool) -> None:
    """Send our own lines to stderr; of the libraries', their errors alone but with --debug."""
    handler = _AboveBars()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("deit_jax")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    if not debug and not logging.root.handlers:  # which also keeps libraries from adding theirs
        errors = logging.StreamHandler()
        errors.setLevel(logging.ERROR)
        logging.root.addHandler(errors)


if __name__ == "__main__":
    sys.exit(main())
