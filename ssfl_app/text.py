"""Text for people: what peers said is cut, nothing moves the cursor of a terminal, and commands can be pasted."""

import io
import os
import re
import shlex
import sys

LONGEST = 300
"""Characters that a line keeps of what a peer said."""

_ENDS = 100 * LONGEST  # characters at either end of a reason in which its cause is looked for


def printable(text: str, keep: str = "") -> str:
    r"""Return `text` with every character that is not printable, and not in `keep`, as an escape such as ``\x1b``.

    Names of files that are no UTF-8 and JSON can hold lone surrogates, which no file or terminal takes.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def tell(text: str, *, error: bool = False) -> None:
    """Print lines for people, on stdout or stderr, at once: Flower forwards what a ServerApp prints."""
    never_fail_to_print()
    print(printable(text, keep="\n\t"), file=sys.stderr if error else sys.stdout, flush=True)


def never_fail_to_print() -> None:
    """Have what the encoding of stdout and stderr does not have shown as an escape, for a locale of few letters."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors != "backslashreplace":
            stream.reconfigure(errors="backslashreplace")


def command(*words: object) -> str:
    """Return the words as a command line for a shell; those that need it are quoted."""
    return " ".join(_word(str(word)) for word in words)


def _word(word: str) -> str:
    if word.isprintable():
        return shlex.quote(word)
    # What no terminal shows as it is: $'...' of bash, zsh and POSIX 2024.
    return "$'" + "".join(rf"\x{b:02x}" if _special(b) else chr(b) for b in os.fsencode(word)) + "'"


def _special(byte: int) -> bool:
    return not 32 <= byte < 127 or chr(byte) in "'\\"


def in_a_line(text: str, most: int = LONGEST) -> str:
    """Return the beginning of what a peer said, at most `most` characters, all of them printable.

    A name, a reason or a value that came over the wire is its sender's choice: 50 MB long, with a line of a log or
    the codes of a terminal in it. So it is cut before it is copied.
    """
    return printable(text[:most])[:most]


def cause(text: str) -> str:
    """Return the line of a reason that says what happened, likewise: ``Type: first line`` of an exception.

    Of a traceback that is the first line behind its last frame: a message may have lines of its own, and the last
    one of torch's is its least useful one.
    """
    if len(text) > 2 * _ENDS:
        text = text[:_ENDS] + text[-_ENDS:]
    # Flower wraps what an app raised: <class 'x.E'>:<'why'>
    wrapped = re.match(r"<class '(?:\w+\.)*(\w+)[^']*'>:<'", text[:200])
    if wrapped:
        text = text[wrapped.end() :].removesuffix("'>")
    # On Ray Flower's own exception stands last, without the type of the app's, which caused it.
    before, _, last = text.rpartition("\n\nThe above exception was the direct cause")
    text = before if before and "ClientAppException" in last else text
    lines = [line for line in text.replace("\\n", "\n").splitlines() if line.strip()]
    frames = [i for i, line in enumerate(lines) if line.startswith(("Traceback", "  File "))]
    if frames:  # a frame's own lines are indented
        lines = [line for line in lines[frames[-1] + 1 :] if not line.startswith(" ")] or lines[-1:]
    if not lines:
        return wrapped[1] if wrapped else "no reason given"
    line = re.sub(r"^Exception \w+ occurred\. Message: ", "", lines[0].strip())
    return in_a_line(f"{wrapped[1]}: {line}" if wrapped and not frames else line)


def quoted(value: object, most: int = 60) -> str:
    """Return how a value is written in Python, at most `most` characters of it."""
    long = isinstance(value, str | bytes) and len(value) > most
    text = in_a_line(repr(value[:most] if isinstance(value, str | bytes) else value))  # cut before it is copied
    return text[: most - 3] + "..." if long or len(text) > most else text


def one_line(error: BaseException) -> str:
    """Return an error on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())
