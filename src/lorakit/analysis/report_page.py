"""The frame of the report: its style, its script, and a content policy that allows these two and nothing else."""

import base64
import hashlib
from html import escape
from pathlib import Path


def page(title: str, header: str, body: str, footer: str) -> str:
    """Give the whole document. `title` is text; the other parts are HTML.

    The content policy allows this style and this one script and forbids every request, so that even a mistake in
    escaping could neither run nor load anything.
    """
    style, script = _beside("report.css"), _beside("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{style}</style>
</head>
<body>
<header>{header}</header>
<main>{body}</main>
<footer>{footer}</footer>
<script>{script}</script>
</body>
</html>
"""


def _beside(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")
