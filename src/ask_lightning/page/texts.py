"""Texts of data as a browser can take them."""

import re
from html import escape

_SURROGATES = re.compile("[\ud800-\udfff]")


def as_unicode(text: str) -> str:
    r"""A text with a replacement character for each byte of a file name that is no Unicode.

    Args:
        text: The text. One with such bytes cannot be sent.

    Examples:
        >>> as_unicode("caf\udce9.wav")
        'caf�.wav'
    """
    return _SURROGATES.sub("\N{REPLACEMENT CHARACTER}", text)


def as_html(text: str) -> str:
    r"""A text as HTML that shows it, whatever it holds.

    Args:
        text: The text.

    Examples:
        >>> as_html("<b> & caf\udce9")
        '&lt;b&gt; &amp; caf�'
    """
    return escape(as_unicode(text))
