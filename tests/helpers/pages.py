"""What a report page holds."""

from __future__ import annotations

import json


def data_of(page) -> dict:
    """What the page's script reads."""
    text = page.read_text(encoding="utf-8")
    start = text.index('id="data">') + len('id="data">')
    return json.loads(text[start : text.index("</script>", start)])
