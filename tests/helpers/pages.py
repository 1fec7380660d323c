"""The data of a report page."""

from __future__ import annotations

import json


def data_of(page) -> dict:
    """The data that the page's script reads."""
    text = page.read_text(encoding="utf-8")
    start = text.index('id="data">') + len('id="data">')
    return json.loads(text[start : text.index("</script>", start)])
