"""Texts that are compared whatever their case."""

import unicodedata


def fold_case(text: str) -> str:
    r"""A text without its case, in which an accent is always written in the same way.

    File names from macOS hold a letter and its accent as two signs, where keyboards make one.

    Args:
        text: The text.

    Examples:
        >>> fold_case("CAFE\u0301") == fold_case("café"), fold_case("Straße") == fold_case("STRASSE")
        (True, True)
    """
    return unicodedata.normalize("NFC", text.casefold())
