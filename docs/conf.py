"""Sphinx configuration. ``make docs`` builds the site into ``build/docs``."""

import sys
from pathlib import Path

from cpm_rcnn import __version__

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "docs" / "extensions"))

project = "CPM R-CNN"
author = "the CPM R-CNN authors"
release = __version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "config_reference",
    "option_coverage",
    "repository_links",
]
exclude_patterns = ["extensions"]
html_theme = "furo"
html_title = f"CPM R-CNN {release}"
html_extra_path = ["llms.txt"]
html_copy_source = False
html_show_copyright = False
html_static_path = ["static"]
html_css_files = ["options.css"]
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
# make linkcheck asks each server; pages that a script builds have no anchors.
linkcheck_timeout = 20
linkcheck_retries = 2
linkcheck_anchors_ignore_for_url = [r"https://cocodataset\.org/"]
linkcheck_allow_unauthorized = True
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
