"""Programs of the page on serving."""

import re

from tests.chain import ROOT

(PAGE,) = re.findall(r"^## Other programs\n(.*?)^## ", (ROOT / "docs/serve.md").read_text(), re.MULTILINE | re.DOTALL)


def block(language: str) -> str:
    (text,) = re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
    return str(text)
