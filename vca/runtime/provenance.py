"""Which code this is: the commit and what is not committed, also of a copy that a sweep made of it."""

import subprocess
from pathlib import Path

CODE = Path(__file__).parents[2]  # this checkout, or a copy of it
COMMIT, DIFF = "COMMIT", "uncommitted.diff"  # in a copy, beside the code


def provenance() -> tuple[str | None, str]:
    """The commit, None where nothing says it, and the diff of the tracked files against it."""
    if (CODE / COMMIT).exists():
        return (CODE / COMMIT).read_text().strip() or None, (CODE / DIFF).read_text()
    return git("rev-parse", "HEAD"), git("diff", "HEAD") or ""


def git(*arguments: str) -> str | None:
    """Output of a git command on this checkout, or None where there is no git or no checkout."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=CODE, capture_output=True, text=True, errors="replace", timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
