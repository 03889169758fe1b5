"""Text of strangers made safe to show: a shared dataset may hold anything, and no terminal or page may obey it."""

import unicodedata

KEPT = {"\n", "\t", "\u200c", "\u200d"}
"""Line breaks and tabs, and the two joiners that scripts and emoji are spelled with."""
HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
"""Unicode categories that are obeyed rather than seen: controls, direction marks, surrogates, odd line breaks."""


def visible(text: str) -> str:
    """`text` with every control character as a picture (␛) or a number (\\u202e); line breaks and tabs stay."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_shown(character) for character in text)


def one_line(text: str) -> str:
    """`visible`, on a single line."""
    return visible(text).replace("\n", "↵").replace("\t", " ")


def _shown(character: str) -> str:
    if character in KEPT or unicodedata.category(character) not in HIDDEN:
        return character
    number = ord(character)
    if number < 0x20:
        return chr(0x2400 + number)  # the pictures of the C0 controls lie in their order
    if number == 0x7F:
        return "␡"
    return f"\\u{number:04x}"
