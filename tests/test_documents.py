"""The documents: no dead link, no dead citation, a glossary in order."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/*.md", "studies/*.md", "traces/*.md", "tests/*/*.md")
    for path in ROOT.glob(pattern)
)
SOURCES = [
    path
    for folder in ("prism_plan", "runtime_adapter", "studies", "tests")
    for path in (ROOT / folder).rglob("*.py")
]


def prose(document: str) -> str:
    """The text of a document without its blocks of code."""
    text = (ROOT / document).read_text(encoding="utf-8")
    return re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(path: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    """Every relative link names a file, and a heading of it where it has an anchor."""
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(document)):
        if link.startswith("http"):
            continue
        name, _, anchor = link.partition("#")
        target = (ROOT / document).parent / name if name else ROOT / document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("document", DOCUMENTS)
def test_named_files_exist(document: str) -> None:
    """Files and folders that a document names by their path are there."""
    for path in re.findall(
        r"`((?:prism_plan|runtime_adapter|studies|tests|traces|docs)/[\w./-]+)`", prose(document)
    ):
        assert (ROOT / path).exists(), path


def test_the_architecture_names_files_that_exist() -> None:
    """Its paths are relative to the repository or to one of the two packages."""
    homes = (ROOT, ROOT / "prism_plan", ROOT / "runtime_adapter")
    paths = re.findall(r"`((?:[a-z_]+/)*[a-z_]+\.py)`", prose("docs/architecture.md"))
    assert len(paths) > 20
    for path in paths:
        assert any((home / path).exists() for home in homes), path


def test_citations_of_the_design_name_a_section() -> None:
    """Sections of docs/design.md that code cites exist."""
    design = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    sections = set(re.findall(r"^## (\d+)\. ", design, re.MULTILINE))
    assert sections == {str(n) for n in range(1, 12)}
    for path in SOURCES:
        text = " ".join(path.read_text(encoding="utf-8").split())
        for cited in re.findall(r"docs/design\.md,? sections? (\d+)", text):
            assert cited in sections, f"{path.relative_to(ROOT)} cites section {cited}"


def test_the_glossary_is_in_alphabetical_order() -> None:
    """Rows of the glossary are in alphabetical order, each word once."""
    words = re.findall(r"^\| ([^|]+?) \|", prose("docs/glossary.md"), re.MULTILINE)[1:]
    rows = [word.lower() for word in words if not word.startswith("-")]
    assert len(rows) > 20
    assert rows == sorted(set(rows))
