"""The pages that a user reads: their code, the files that they name, and what they say of committed results."""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]

_LINK = re.compile(r"\]\((?!https?:)([^)#\s]+)(?:#[^)]*)?\)")
_PATH = re.compile(r"`((?:bench|docs|examples|fastwkv|kernels|reference|tests)/[\w./-]*\w/?)`")


def text(page: str) -> str:
    """Return a page."""
    return (ROOT / page).read_text()


def words(page: str) -> str:
    """Return a page on one line, so that sentences can be looked for however they are wrapped."""
    return " ".join(text(page).split())


def prose(page: str) -> str:
    """Return a page without code, tables and figures."""
    kept = re.sub(r"```.*?```|<!--.*?-->|!\[[^\]]*\]\([^)]*\)", "", text(page), flags=re.DOTALL)
    return "\n".join(line for line in kept.splitlines() if not line.startswith(("    ", "|", "#")))


def blocks(page: str) -> list[str]:
    """Return the Python of a page, each block at its own lines, so that a traceback names them."""
    found = re.finditer(r"^```python\n(.*?)^```$", text(page), re.DOTALL | re.MULTILINE)
    return ["\n" * text(page).count("\n", 0, block.start(1)) + block[1] for block in found]


def run(page: str) -> dict[str, Any]:
    """Run the blocks of a page in their order, in one namespace to which nothing is added; return it."""
    names: dict[str, Any] = {"__name__": page}
    for block in blocks(page):
        exec(compile(block, page, "exec"), names)
    return names


def missing(page: str) -> list[str]:
    """Return the files that a page links or names and that do not exist."""
    folder = (ROOT / page).parent
    linked = [name for name in _LINK.findall(text(page)) if not (folder / name).exists()]
    return linked + [name for name in _PATH.findall(text(page)) if not (ROOT / name).exists()]
