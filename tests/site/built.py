"""The built pages that the tests of this folder read: `VQSSL_SITE` names their folder."""

import os
from pathlib import Path

SITE = Path(os.environ["VQSSL_SITE"]).resolve()
PAGES = sorted(path.relative_to(SITE).as_posix() for path in SITE.rglob("*.html"))
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}
