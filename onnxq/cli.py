"""The command line. Imports stay inside the commands, so that ``--help`` answers at once."""

from __future__ import annotations

import _thread
import atexit
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer

from onnxq.commands import (
    analyze,
    build,
    compare,
    doctor,
    export,
    lint,
    quantize,
    recipes,
    sample,
    specialize,
    statistics,
    strip,
    synthesize,
    trajectories,
    view,
)
from onnxq.commands.common import BAD_INPUT, CHECK_FAILED, INTERRUPTED

REPEAT_SECONDS = 0.05
STILL_WAITING_SECONDS = 5.0

UsageError: Any = typer.BadParameter.__base__  # which the library does not name

app = typer.Typer(
    name="onnxq",
    help="Quantize ONNX models for TensorRT (INT8, FP8, INT4 weights) and onnxruntime, on the graph alone.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

for command in (
    quantize.quantize, compare.compare, analyze.analyze, lint.lint, build.build, strip.strip, specialize.specialize,
    recipes.recipes, export.export, synthesize.synthesize, statistics.statistics, trajectories.trajectories,
    sample.sample, view.view, doctor.doctor,
):  # fmt: skip
    app.command()(command)


def _version(show: bool) -> None:
    if show:
        import onnxq

        typer.echo(f"onnxq {onnxq.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point: two lines and an exit code instead of a traceback."""
    from onnxq.errors import LESS_MEMORY, CheckError, OnnxqError, ran_out_of_memory

    stdout, dropped = sys.stdout, sys.unraisablehook
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGALRM, _interrupt_a_wait)
    sys.unraisablehook = _interrupt_again(dropped)
    try:
        code = app(standalone_mode=False)
        if code:
            sys.exit(code)
    except UsageError as error:
        _fail_usage(error)
    except OnnxqError as error:
        _fail(error.message, error.hint, CHECK_FAILED if isinstance(error, CheckError) else BAD_INPUT)
    except _Interrupted:
        _end(
            "interrupted",
            "no output was written; the same command goes on after the last block that a recipe has learned",
            INTERRUPTED,
        )
    except (MemoryError, RuntimeError) as error:
        if not ran_out_of_memory(error):
            raise
        _fail("out of memory", LESS_MEMORY, BAD_INPUT)
    except BrokenPipeError:  # whoever read the output has seen enough
        sys.stdout = sys.stderr
        os.dup2(os.open(os.devnull, os.O_WRONLY), stdout.fileno())
        sys.exit(CHECK_FAILED)
    except OSError as error:
        _fail(
            f"{error.strerror or error}: {error.filename or ''}".rstrip(": "), "check the path and the disk", BAD_INPUT
        )
    finally:
        sys.stdout, sys.unraisablehook = stdout, dropped


def _fail_usage(error: Any) -> NoReturn:
    """The command line itself is wrong. Without any arguments, help has been printed and there is nothing to add."""
    message: str = error.format_message().rstrip(".")
    if not message:
        sys.exit(BAD_INPUT)
    command = error.ctx.command_path if error.ctx is not None else "onnxq"
    _fail(message[0].lower() + message[1:], f"see `{command} --help`", BAD_INPUT)


class _Interrupted(BaseException):
    """Ctrl-C or a polite kill. Not KeyboardInterrupt, which the command-line library swallows with a message."""


def _interrupt(number: int, frame: object) -> None:
    _set_alarm(STILL_WAITING_SECONDS)
    raise _Interrupted


def _set_alarm(seconds: float) -> None:
    """Every so many seconds; 0: never again. Windows has none."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds, seconds)


def _interrupt_a_wait(number: int, frame: FrameType | None) -> None:
    """An interrupt comes again where it ended in waiting for a thread.

    That may never end: an exception between the taking of a lock by a method of Python's own and the block that gives
    it back leaves it taken, and the thread waits for it.
    """
    if frame is not None and frame.f_code.co_filename == threading.__file__:
        raise _Interrupted


def _interrupt_again(otherwise: Callable[[Any], object]) -> Callable[[Any], None]:
    """An interrupt that came where Python drops exceptions, as in the callback of a weak reference, comes again."""

    def on_dropped(found: Any) -> None:
        if found.exc_type is _Interrupted:
            threading.Timer(REPEAT_SECONDS, _thread.interrupt_main).start()  # when the callback is over
        else:
            otherwise(found)

    return on_dropped


def _say(message: str, hint: str) -> None:
    sys.stderr.write(f"error: {' '.join(message.split())}\n")
    if hint:
        sys.stderr.write(f"  tip: {' '.join(hint.split())}\n")


def _fail(message: str, hint: str, code: int) -> NoReturn:
    _say(message, hint)
    sys.exit(code)


def _end(message: str, hint: str, code: int) -> NoReturn:
    """The same, without waiting for threads: one of them may never end."""
    _set_alarm(0)
    _say(message, hint)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
