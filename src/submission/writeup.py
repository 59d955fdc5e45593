"""What a write-up's PDF must hold: at most two A4 pages before the references, the four required parts, citations."""

import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from pybtex.database import parse_file
from pybtex.exceptions import PybtexError
from pypdf import PdfReader

from writeup.pages import HEADING, PAGES, counted

A4 = (595.3, 841.9)  # points
PLACEHOLDERS = ("Team name", "First Author, Second Author")  # of writeup/text.typ
# The challenge's four parts, and how a text shows that it has them.
PARTS = {
    "technical details": r"technical|\bmethods?\b",
    "training details: loss curves": r"\bloss",
    # A number, or a word for one, then the unit, of a chip or not: 9 GPU·h, a 25-minute session, two days.
    "training details: total training time": r"(\d|\b(an?|one|two|three|four|five|six|seven|eight|nine|ten"
    r"|eleven|twelve|fifteen|sixteen|eighteen|twenty|thirty|forty))[^\w.,;:()]*((gpu|device)s?[^\w.,;:()]*)?"
    r"(h|hrs?|hours?|mins?|minutes?|days?|seconds)\b",
    "qualitative evidence: samples from early training": r"\bearly\b",
    "citations": HEADING.pattern,
}


def judge(pdf: Path, bibliography: Path, provenance: dict, model: str = "") -> Iterator[tuple[str, str, str]]:
    """(what, fault or "", what is right) for the model, the pages, the names, the parts and the citations.

    Args:
        provenance: the checkpoint's: its `stages` and `citations` name keys of the bibliography.
        model: the keyword of the checkpoint's model, if it is known; a PDF that was not built here has none.
    """
    try:
        reader = PdfReader(pdf)
        pages, told = reader.pages, str((reader.metadata or {}).get("/Keywords", ""))
        texts = [page.extract_text() for page in pages]
        sizes = [tuple(map(float, (page.mediabox.width, page.mediabox.height))) for page in pages]
        pictures = sum(len(page.images) for page in pages)
    except Exception as error:  # damaged PDFs raise whatever they lead the reader to
        yield "write-up", f"{pdf.name} is no readable PDF ({error}): build it again", ""
        return

    if model and told.startswith("model "):
        fault = "of another model than the checkpoint, or of other filters: write a new report, build again"
        yield "write-up model", fault if told != model else "", "of the checkpoint and of the sampler's settings"

    wrong = [i + 1 for i, size in enumerate(sizes) if max(abs(a - b) for a, b in zip(size, A4, strict=True)) > 2]
    fault = f"page {wrong[0]} is not A4" if wrong else ""
    if (before := counted(texts)) > PAGES:
        fault = f"{before} pages before the references end: what lies beyond page {PAGES} will be ignored"
    yield "write-up pages", fault, f"{len(texts)} A4 pages, at most {PAGES} before the references"

    whole = "\n".join(texts)
    line = " ".join(whole.split())
    left = [text for text in PLACEHOLDERS if re.search(rf"\b{text}\b", line)]
    fault = f"still {' and '.join(left)}: edit writeup/text.typ, build it again" if left else ""
    yield "write-up names", fault, "the team's and the authors', in the place of the template's"

    absent = [part for part, shown in PARTS.items() if not re.search(shown, whole, re.I | re.M)]
    absent += ["pictures"] if not pictures else []
    fault = f"not found: {', '.join(absent)} (10 % off for each part)" if absent else ""
    yield "write-up parts", fault, "technical details, loss curves and training time, early samples, references"

    stages = provenance.get("stages", [])
    keys = dict.fromkeys([key for stage in stages for key in stage["citations"]] + provenance.get("citations", []))
    if not stages or not all(stage["citations"] for stage in stages):
        yield "citations", "the checkpoint does not tell how all of it was trained: train it with train.py alone", ""
        return
    try:
        known = parse_file(str(bibliography)).entries if bibliography.is_file() else {}
    except (PybtexError, UnicodeDecodeError) as error:
        yield "citations", f"references.bib cannot be read: {error}", ""
        return
    if unknown := [key for key in keys if key not in known]:
        yield "citations", f"references.bib has no entry {', '.join(unknown)}: add it", ""
        return
    written = letters(whole)
    uncited = []
    for key in keys:
        fields = known[key].fields
        names = [letters(fields[name]) for name in ("title", "eprint", "url") if fields.get(name)]
        if not any(name in written for name in names):
            uncited.append(f"{key} ({re.sub('[{}]', '', fields.get('title', 'no title'))})")
    fault = f"not in the write-up's references: {'; '.join(uncited)}" if uncited else ""
    yield "citations", fault, f"all {len(keys)} works that the model's training names are cited"


def letters(text: str) -> str:
    """Letters and digits alone, in lower case, ligatures spelt out: lines may break a title anywhere."""
    return re.sub(r"[^a-z0-9]", "", unicodedata.normalize("NFKD", text).lower())
