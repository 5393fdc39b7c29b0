"""Sentences of documents and docstrings, counted in words: what readers must hold in their heads at once."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

LONGEST, MEAN = 30, 18  # words per sentence
_SEVERAL = 5
_LIST = re.compile(r"\s*(?:[-*+]|(\d+)\.)\s+")
_END = re.compile(r"(?<=[.!?])[\"'”’)\]*_]*\s+(?=[\"'“‘(\[*_]*(?:[A-Z0-9À-Ý]|`))")
_FENCE = re.compile(r"^ *(```|~~~).*?^ *\1[^\n]*$", re.MULTILINE | re.DOTALL)


def blocks(markdown: str) -> Iterator[str]:
    """Yield paragraphs and list items, a line each; no code blocks, tables, headings, pictures or comments."""
    text = re.sub(r"<!--.*?-->", "", _FENCE.sub("\n", markdown), flags=re.DOTALL)
    block: list[str] = []
    numbered = False  # a line that begins with 51. goes on with a sentence, unless it is in a list
    for line in [*text.splitlines(), ""]:
        bare = line.strip()
        alone = not bare or bare.startswith(("|", "#", "![")) or re.fullmatch(r"[-=*]{3,}", bare)
        item = _LIST.match(line)
        if item and item[1] and block and not numbered and item[1] != "1":
            item = None
        if (alone or item) and block:
            yield " ".join(block)
            block = []
        if item or alone:
            numbered = bool(item and item[1]) or (numbered and not bare)
        if not alone:
            block.append(line[item.end() if item else 0 :].strip())


def sentences(block: str) -> list[str]:
    """Split a paragraph at full stops, question and exclamation marks; semicolons and colons end nothing."""
    plain = re.sub(r"``.+?``|`[^`]+`", "`code`", block)  # a span of code is one word
    plain = re.sub(r"!?\[([^]]*)\]\([^)]*\)", r"\1", plain)
    return [s for s in _END.split(plain) if words(s)]


def words(sentence: str) -> int:
    """Count what has a letter or digit, between blanks."""
    return sum(any(c.isalnum() for c in word) for word in sentence.split())


def of_document(path: Path) -> list[str]:
    """Return all sentences of a Markdown file."""
    return [s for block in blocks(path.read_text()) for s in sentences(block)]


def of_docstrings(path: Path) -> list[str]:
    """Return the sentences of a module's public docstrings, without examples and what is indented."""
    found: list[str] = []

    def visit(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        if text := ast.get_docstring(node):
            found.extend(s for block in blocks(_prose(text)) for s in sentences(block))
        if isinstance(node, ast.Module | ast.ClassDef):
            for child in node.body:
                public = isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
                if public and not child.name.startswith("_"):
                    visit(child)

    visit(ast.parse(path.read_text()))
    return found


def _prose(docstring: str) -> str:
    """Drop doctests with their output, and indented blocks, which are code or tables."""
    paragraphs = re.split(r"\n\s*\n", docstring)
    kept = [p for p in paragraphs if not p.lstrip().startswith(">>>")]
    return "\n\n".join("\n".join(line for line in p.splitlines() if not line.startswith("    ")) for p in kept)


def too_much(found: list[str], longest: int = LONGEST) -> list[str]:
    """Say what is wrong with a text: its mean, and each sentence that is too long."""
    wrong = [f"{words(s)} words: {s}" for s in found if words(s) > longest]
    mean = sum(map(words, found)) / max(1, len(found))
    several = len(found) >= _SEVERAL  # one or two sentences have no mean to speak of
    return ([f"mean {mean:.1f} words per sentence"] if several and mean >= MEAN else []) + wrong
