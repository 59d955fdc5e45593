"""Which pages of a write-up count: all before the references, of which the challenge reads two."""

import re

PAGES = 2
HEADING = re.compile(r"^\W*[\divx]*\W*(references|bibliography)\s*:?\s*$", re.I | re.M)  # alone in its line


def counted(texts: list[str]) -> int:
    """How many pages, of these texts, there are up to the references; not the one that begins with them."""
    for i in reversed(range(len(texts))):
        if HEADING.search(texts[i]):
            return i if HEADING.match(texts[i].strip()) else i + 1
    return len(texts)
