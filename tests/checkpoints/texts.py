"""Strings that are hard on a tokenizer: many scripts, emoji, runs of white space, numbers, code, control characters."""

import random
from collections.abc import Sequence

RANGES = (
    (0x20, 0x7F), (0xA0, 0x250), (0x250, 0x2B0), (0x300, 0x370), (0x370, 0x400), (0x400, 0x530), (0x530, 0x590),
    (0x591, 0x5F5), (0x600, 0x700), (0x700, 0x750), (0x900, 0x980), (0x980, 0xA00), (0xA80, 0xB00), (0xB80, 0xC00),
    (0xC80, 0xD00), (0xE00, 0xE80), (0xF00, 0xFD0), (0x1000, 0x10A0), (0x10A0, 0x1100), (0x1100, 0x1200),
    (0x1200, 0x1380), (0x13A0, 0x13F6), (0x1780, 0x1800), (0x1E00, 0x2000), (0x2000, 0x2070), (0x2070, 0x20D0),
    (0x2100, 0x2190), (0x2190, 0x2300), (0x2460, 0x2600), (0x2600, 0x27C0), (0x2800, 0x2900), (0x3000, 0x3040),
    (0x3040, 0x3100), (0x3130, 0x3190), (0x3400, 0x3500), (0x4E00, 0xA000), (0xA840, 0xA880), (0xAC00, 0xD7A4),
    (0xE000, 0xE010), (0xFB00, 0xFB50), (0xFE00, 0xFE10), (0xFF00, 0xFFF0), (0x10330, 0x10350), (0x12000, 0x12100),
    (0x1D400, 0x1D800), (0x1F000, 0x1F100), (0x1F300, 0x1F650), (0x1F680, 0x1F700), (0x1F900, 0x1FA00),
    (0x20000, 0x20100), (0xE0000, 0xE0080), (0x10FFF0, 0x110000),
)  # fmt: skip
PROSE = """
the of and to in is I you it's don't we'll they've I'M WE'RE he'd 'tis hello world Paris naïve café Zürich straße mañana
привет мир Москва κόσμε שלום العالم नमस्ते สวัสดี こんにちは 世界 你好 안녕하세요 tokenizer Transformer GPT-4 C++ <b> </b>
<table> <h1> http://example.com/a?b=c&d=1 foo@bar.org <0x0A> <0xFF> <unused3 \u2581 \u2581\u2581 _ __init__
CamelCaseWord snake_case_word
"""
WORDS = PROSE.split()
CODE = (
    'def f(x: int = 0) -> str:\n    return f"{x!r}"\n',
    "for (int i = 0; i < n; ++i) {\n\tsum += a[i];\n}",
    "\\begin{align} x^2 &= \\frac{1}{2} \\\\ \\end{align}",
    "SELECT * FROM t WHERE a >= 10 AND b != 'x';",
    '{"a": [1, 2.5, null], "b": {"c": true}}',
    "# Title\n\n* item\n* **bold** `code`\n\n```py\nx = 1\n```",
    "#!/bin/sh\nset -e; echo \"$HOME\" | sed 's/a/b/g' && exit 0",
    '<div class="a">\n      <p>text</p>\n</div>',
)
EMOJI = ["🦙", "👩\u200d👩\u200d👧\u200d👦", "🏳️\u200d🌈", "👍🏽", "🇫🇷", "❤️", "1️⃣", "☕", "🤷🏿\u200d♂️"]
BLANKS = (
    " ", "\t", "\n", "\r\n", "\r", "\u00a0", "\u2003", "\u3000", "\u200b", "\ufeff", "\u2028", "\x0b", "\x0c", "\x85",
)  # fmt: skip
NUMERALS = ["½", "Ⅷ", "²", "③", "〇", "٣٤", "१२३", "๑๒", "𝟘𝟙", "㊿"]  # noqa: RUF001
MARKS = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"


def texts(count: int, special: Sequence[str], seed: int = 0) -> list[str]:
    """The same strings for the same arguments; `special` are tokens to find inside the text."""
    rng = random.Random(seed)
    return ["".join(_piece(rng, special) for _ in range(rng.randint(1, 12))) for _ in range(count)]


def _piece(rng: random.Random, special: Sequence[str]) -> str:
    several = lambda choose, most: "".join(choose() for _ in range(rng.randint(1, most)))
    low, high = rng.choice(RANGES)
    kinds = (
        lambda: rng.choice(("", " ")) + rng.choice(WORDS),
        lambda: rng.choice(("", " ")) + rng.choice(WORDS),
        lambda: " " + rng.choice(WORDS) + rng.choice(".,;:!?…\"')"),
        lambda: several(lambda: chr(rng.randrange(low, high)), 8),
        lambda: rng.choice(BLANKS) * rng.randint(1, 40),
        lambda: several(lambda: rng.choice(BLANKS), 5),
        lambda: str(rng.randrange(10 ** rng.randint(1, 12))),
        lambda: rng.choice((f"{rng.uniform(-1e4, 1e4):,.3f}", hex(rng.randrange(2**32)), rng.choice(NUMERALS))),
        lambda: rng.choice(CODE),
        lambda: rng.choice(EMOJI) * rng.randint(1, 3),
        lambda: several(lambda: chr(rng.choice((rng.randrange(0x20), rng.randrange(0x7F, 0xA0)))), 4),
        lambda: rng.choice(special),
        lambda: several(lambda: rng.choice(MARKS), 8),
    )
    return rng.choice(kinds)()
