"""What Sphinx checks of the documentation, for the README, which is not part of it."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_links_lead_to_files():
    links = re.findall(r"\]\(([^)#]+)", (ROOT / "README.md").read_text())
    files = [link for link in links if not link.startswith("http")]
    assert len(files) > 10
    assert [link for link in files if not (ROOT / link).exists()] == []
