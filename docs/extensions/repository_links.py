"""Links of the documents to files of the repository, which a reader of the site finds on the web."""

from typing import Any
from urllib.parse import urlsplit

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.connect("doctree-read", _as_text)
    return {"parallel_read_safe": True}


def _as_text(app: Sphinx, doctree: nodes.document) -> None:
    """Replace links to documents above ``docs/``, which are not part of the site, by their text."""
    for reference in list(doctree.findall(pending_xref)):
        target = urlsplit(reference["reftarget"]).path
        # MyST's name of a document outside of the folder; Sphinx's own roles name pages of the site like this.
        if target.startswith("/") and reference.get("refdomain") != "std":
            reference.replace_self(nodes.inline("", reference.astext()))
