"""Documents, config comments, docstrings, comments and messages use plain language: CONTRIBUTING.md, "Writing"."""

import ast
import io
import re
import tokenize

from tests.processes import ROOT

# What to write instead is beside each phrase.
BANNED = {
    r"\b(stands|stood)\b(?! for)": "is, contains",
    r"\b(goes|go|went|going) on\b": "resumes, continues",
    r"\bat hand\b": "available",
    r"\ba training\b(?!-| (batch|digit|example|image|latent|lo|photo|recipe|run|script|s[ept]|trans))": "run",
    r"\btold\b": "prints, is given",
    r"\bsaid\b": "printed, given",
    r"\bheard\b": "received",
    r"\blies?\b": "is, is in",
    r"\blikewise\b": "also, the same",
    r"\bbegun\b": "started",
    r"\bswallow(s|ed)?\b": "ignores",
    r"\bof its own accord\b": "automatically",
    r"\b(what|whatever|all) there (is|are)\b": "all, available",
    r"\b(an|the|every|each|all|in|after|of|[\d,]+) updates?\b(?! \w+ing)": "step",
    r"\bkept memory\b|\bmemory kept\b": "saved activations",
    r"\b(come|comes|came) to (its|their) end\b": "finishes",
    r"\b(what|what came|what comes|what becomes|became|comes) of (it|both|a|the|them)\b": "result",
    r"\bpass(es|ed|ing)? (it|them) over\b": "skips",
    r"\bmend\b": "fix",
    r"\b(be|been) had\b": "be computed, be available",
    r"\b(is|are) no (folder|file|directory|run)\b": "is not a directory",
    r"\b(give|gives|gave) up\b": "fails",
    r"\blast words?\b": "last line",
    r"\b(make|makes|made) again\b": "recomputes",
    r"\bas good as equal\b": "nearly equal",
    r"\bquicker\b": "faster",
    r"\b(in|out of) reach\b": "available",
    r"^(?-i:Of )[a-z]": "a sentence with a subject and a verb",
}
SOURCES = (".md", ".yaml", ".yml", ".sh", ".py")
SKIPPED = {".venv", ".git", "tests", "outputs", "build"}


def python_texts(source: str) -> list[tuple[int, str]]:
    """The first line and the text of each string and each block of comments; adjacent strings are joined."""
    texts = []
    for node in ast.walk(tree := ast.parse(source)):
        for child in ast.iter_child_nodes(node):
            child.inside = isinstance(node, (ast.JoinedStr, ast.FormattedValue)) or getattr(node, "inside", False)
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = (part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
            texts.append((node.lineno, "".join(parts)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and not node.inside:
            texts.append((node.lineno, node.value))
    last = -1
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comment = token.string.lstrip("#! ")
            if token.start[0] == last + 1:
                texts[-1] = (texts[-1][0], f"{texts[-1][1]} {comment}")
            else:
                texts.append((token.start[0], comment))
            last = token.start[0]
    return texts


def texts_of(path) -> list[tuple[int, str]]:
    """The texts of a file with their first lines; of documents and YAML files, the paragraphs."""
    source = path.read_text()
    if path.suffix == ".py":
        return python_texts(source)
    paragraphs, line = [], 1
    for paragraph in source.split("\n\n"):
        paragraphs.append((line, re.sub(r"(?m)^\s*#+ ?", "", paragraph)))
        line += paragraph.count("\n") + 2
    return paragraphs


def banned_phrases(text: str) -> list[str]:
    """The banned phrases in a text, with what to write instead."""
    text = " ".join(text.split())
    hits = ((match, instead) for pattern, instead in BANNED.items() for match in re.finditer(pattern, text, re.I))
    return [f"'{match[0]}' (write: {instead})" for match, instead in hits]


def test_language_no_banned_phrases():
    found = []
    for path in sorted(ROOT.rglob("*")):
        name = path.relative_to(ROOT)
        if path.suffix in SOURCES and path.is_file() and not SKIPPED & set(name.parts):
            found += [f"{name}:{line}: {hit}" for line, text in texts_of(path) for hit in banned_phrases(text)]
    assert not found, "\n".join(["banned phrases, see CONTRIBUTING.md:", *found])


def test_language_banned_phrases_are_detected():
    """In documents, across line breaks, in comments, and in joined and formatted strings."""
    assert banned_phrases("the run\n    goes on from there")
    assert banned_phrases("a training that was killed")
    assert not banned_phrases("a training image of the run, and 3 steps")
    source = 'x = (\n    f"{1} is "\n    "no folder"\n)\n# what is\n# at hand\n'
    assert [len(banned_phrases(text)) for _, text in python_texts(source)] == [1, 1]
