"""Text for people: what peers said is cut, nothing moves the cursor of a terminal, and commands can be pasted."""

import io
import os
import re
import shlex
import sys

LONGEST = 300
"""Characters that a line keeps of what a peer said."""


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


def last_line(text: str) -> str:
    """Return the last line of a reason, likewise: that of a traceback says what happened."""
    # Flower wraps what an app raised: <class 'x.E'>:<'E: why'>
    text = re.sub(r"^<class '[\w.]+'>:<'", "", text[-20 * LONGEST :])
    lines = [line.strip(" '>") for line in text.replace("\\n", "\n").splitlines() if line.strip(" '>")]
    return in_a_line(lines[-1]) if lines else "no reason given"


def quoted(value: object, most: int = 60) -> str:
    """Return how a value is written in Python, at most `most` characters of it."""
    long = isinstance(value, str | bytes) and len(value) > most
    text = in_a_line(repr(value[:most] if isinstance(value, str | bytes) else value))  # cut before it is copied
    return text[: most - 3] + "..." if long or len(text) > most else text
