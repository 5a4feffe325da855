"""A conversation in a terminal or a pipe: lines in from stdin, answers out to stdout, all else to stderr."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType

from zamba2_jax.chat import ChatSession

_HELP = """A line is a message. Commands:
  /reset       forget the conversation
  /save FILE   write it, with all that the model remembers of it
  /load FILE   go on with one that was saved
  /help        this
  /exit        end; so does Ctrl-D
Ctrl-C ends an answer."""


def run(session: ChatSession, *, seed: int | None = None, verbose: bool = False) -> None:
    """Reads messages and commands until /exit or the end of stdin.

    Args:
        session: the conversation.
        seed: of every answer's sampling, as of `generate`.
        verbose: say on stderr what each turn cost.
    """
    interactive = sys.stdin.isatty()
    if interactive:
        import readline  # noqa: F401  (input() edits lines and remembers them)

        _note("Type a message. /help lists commands, Ctrl-D ends.")
    while True:
        try:
            line = input("> ") if interactive else _next_line()
        except EOFError:
            break
        except KeyboardInterrupt:  # at the prompt there is no answer to end
            _note("\nCtrl-D or /exit ends.")
            continue
        line = line.strip()
        if line == "/exit":
            break
        if not line:
            continue
        try:
            if line.startswith("/"):
                _command(session, line)
            else:
                _answer(session, line, seed, verbose)
        except (ValueError, OSError) as error:
            _note(f"error: {' '.join(str(error).split())}")
        except KeyboardInterrupt:  # the second one, while a program was being compiled: the message was not said
            _note("\nstopped; this message was not answered.")


def _next_line() -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line


def _command(session: ChatSession, line: str) -> None:
    name, _, argument = line.partition(" ")
    argument = argument.strip()
    if name in ("/save", "/load"):
        if not argument:
            raise ValueError(f"{name} needs a file, as in {name} talk.safetensors.")
        (session.save if name == "/save" else session.load)(argument)
        _note("saved." if name == "/save" else f"loaded: {len(session.messages)} messages.")
    elif name == "/reset":
        session.reset()
        _note("forgotten.")
    elif name == "/help":
        _note(_HELP)
    else:
        raise ValueError(f"{name} is no command; /help lists them. A message cannot begin with a slash.")


def _answer(session: ChatSession, text: str, seed: int | None, verbose: bool) -> None:
    with _Interrupts() as interrupts:
        session.send(text, on_text=_write, should_stop=interrupts.came, seed=seed)
    _write("\n")
    turn = session.last_turn
    if turn.interrupted:
        _note("stopped.")
    if verbose:
        _note(
            f"first token after {turn.seconds_to_first_token:.2f} s; read {turn.prefilled_tokens} of "
            f"{turn.text_tokens} tokens, wrote {turn.new_tokens}"
        )


class _Interrupts:
    """While it is entered, a first Ctrl-C is noted, to end the answer where it is; a second one raises as always."""

    def __init__(self):
        self._count = 0
        self._before = None

    def __enter__(self) -> _Interrupts:
        if threading.current_thread() is threading.main_thread():  # others may not
            self._before = signal.signal(signal.SIGINT, self._note_one)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def came(self) -> bool:
        return self._count > 0

    def _note_one(self, number: int, frame: FrameType | None) -> None:
        self._count += 1
        if self._count > 1:
            raise KeyboardInterrupt


def _write(text: str) -> None:
    print(text, end="", flush=True)


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
