"""The language of the source: subjects are nouns of the field, such as request or client, not people.

h11, httpcore, starlette and trio have 0 to 1.5 words for people in 1,000 lines.
"""

from __future__ import annotations

import re
from pathlib import Path

SOURCE = Path(__file__).parent.parent / "src"
PEOPLE = re.compile(
    r"\b(who|whom|whose|who(m)?ever|(some|no|every|any)(body|one)|told|tells?)\b",
    re.IGNORECASE,
)
MAX_PER_1000_LINES = 1.0
"""Never raise this limit."""


def test_the_source_has_few_words_for_people() -> None:
    words, num_lines = {}, 0
    for file in sorted(SOURCE.rglob("*.py")):
        text = file.read_text(encoding="utf-8")
        num_lines += text.count("\n")
        words[file] = len(PEOPLE.findall(text))
    per_1000 = 1000 * sum(words.values()) / num_lines
    worst = max(words, key=words.__getitem__)
    assert per_1000 <= MAX_PER_1000_LINES, (
        f"{per_1000:.1f} words for people in 1,000 lines, at most {MAX_PER_1000_LINES}; "
        f"{worst.relative_to(SOURCE)} has {words[worst]}"
    )
