"""The key references in docs/keys are current."""

import pytest

from scripts.keys import SCRIPTS, reference
from tests.processes import ROOT


@pytest.mark.parametrize("script", SCRIPTS)
def test_key_reference_is_current(script):
    assert (ROOT / "docs" / "keys" / f"{script}.md").read_text() == reference(script), "run python scripts/keys.py"
