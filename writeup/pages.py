"""What a write-up's builder and its judge must agree on: which pages count (all before the references, of which the
challenge reads two), and how a PDF tells which model it describes."""

import hashlib
import json
import re

PAGES = 2
HEADING = re.compile(r"^\W*[\divx]*\W*(references|bibliography)\s*:?\s*$", re.I | re.M)  # alone in its line


def counted(texts: list[str]) -> int:
    """How many pages, of these texts, there are up to the references; not the one that begins with them."""
    for i in reversed(range(len(texts))):
        if HEADING.search(texts[i]):
            return i if HEADING.match(texts[i].strip()) else i + 1
    return len(texts)


def keyword(weights: str, sampler: dict) -> str:
    """The PDF's keyword for the model of these weights (a hash of them) and of this sampler (JSON types)."""
    return "model " + hashlib.sha256(json.dumps([weights, sampler], sort_keys=True).encode()).hexdigest()[:16]
