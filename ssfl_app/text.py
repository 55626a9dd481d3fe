"""Text for a terminal: nothing in it moves the cursor, and commands in it can be pasted."""

import os
import shlex
import sys


def printable(text: str, keep: str = "") -> str:
    r"""Return `text` with every character that is not printable, and not in `keep`, as an escape such as ``\x1b``.

    Names of files that are no UTF-8 and JSON can hold lone surrogates, which no file or terminal takes.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def tell(text: str, *, error: bool = False) -> None:
    """Print lines for people, on stdout or stderr, at once: Flower forwards what a ServerApp prints."""
    print(printable(text, keep="\n\t"), file=sys.stderr if error else sys.stdout, flush=True)


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
