"""Commit and uncommitted changes of the running code, which may be a sweep's copy of it."""

import subprocess
from pathlib import Path

from vca.runtime.digest import file_sha256

CODE = Path(__file__).parents[2]  # this checkout, or a sweep's copy of it
PARTS = ("configs", "models", "scripts", "vca")  # folders of a copy, besides the root scripts
COMMIT, DIFF = "COMMIT", "uncommitted.diff"  # files of a copy


def provenance() -> tuple[str | None, str]:
    """Return the commit (None if unknown) and the diff against it, untracked files included."""
    if (CODE / COMMIT).exists():
        return (CODE / COMMIT).read_text().strip() or None, (CODE / DIFF).read_text()
    new = (git("ls-files", "--others", "--exclude-standard", *PARTS, ":(glob)*.py") or "").splitlines()
    diffs = [git("diff", "HEAD"), *(git("diff", "--no-index", "/dev/null", name) for name in new)]
    return git("rev-parse", "HEAD"), "".join(f"{diff}\n" for diff in diffs if diff)


def git(*arguments: str) -> str | None:
    """Return the output of a git command on this checkout; None without git or a checkout."""
    differ = 1 if "--no-index" in arguments else 0
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=CODE, capture_output=True, text=True, errors="replace", timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode in (0, differ) else None


def code_sha256() -> dict[str, str]:
    """Return the first 12 digits of the sha256 of each Python file of `vca`, `models` and the root scripts."""
    files = [*CODE.glob("*.py"), *CODE.glob("vca/**/*.py"), *CODE.glob("models/**/*.py")]
    return {str(path.relative_to(CODE)): file_sha256(path)[:12] for path in files}
