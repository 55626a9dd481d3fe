"""Words of a peer, made fit for a log, a record, a table or a terminal: cut before they are copied, and printable.

A name, a reason or a value that came over the wire is its sender's choice: 50 MB long, with a line of a log or the
codes of a terminal in it.
"""

LONGEST = 300
"""Characters that a line keeps of what a peer said."""


def in_a_line(text: str, most: int = LONGEST) -> str:
    """Return the beginning of a text, at most `most` characters, all of them printable."""
    return "".join(c if c.isprintable() else " " for c in text[:most])


def last_line(text: str) -> str:
    """Return the last line of a reason, likewise: that of a traceback says what happened."""
    text = text[-20 * LONGEST :]
    lines = [line.strip(" '>") for line in text.replace("\\n", "\n").splitlines() if line.strip(" '>")]
    return in_a_line(lines[-1]) if lines else "no reason given"


def quoted(value: object, most: int = 60) -> str:
    """Return how a value is written in Python, at most `most` characters of it."""
    long = isinstance(value, str | bytes) and len(value) > most
    text = in_a_line(repr(value[:most] if isinstance(value, str | bytes) else value))  # cut before it is copied
    return text[: most - 3] + "..." if long or len(text) > most else text
