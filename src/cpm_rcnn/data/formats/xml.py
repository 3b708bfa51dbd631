"""XML files as trees whose elements know their lines."""

from pathlib import Path
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from cpm_rcnn.errors import UserError


class _LineElement(Element):
    """An element that knows the line of its start tag."""

    line: int


class XMLFault(ValueError):
    """Why a file is not well-formed XML; the message starts with the line."""


def parse_xml(path: Path) -> Element:
    """The root of an XML file, whose elements know their lines (:func:`line_of`).

    Document type definitions are refused: no annotation tool writes one, and their entities can expand without limit.

    Raises:
        UserError: the file cannot be read; the message names it.
        XMLFault: the file is not well-formed, or has a document type definition.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    parser = expat.ParserCreate()
    builder = TreeBuilder(element_factory=_LineElement)

    def start(tag: str, attributes: dict[str, str]) -> None:
        element = builder.start(tag, attributes)
        assert isinstance(element, _LineElement)
        element.line = parser.CurrentLineNumber

    def refuse(*_: object) -> None:
        raise XMLFault(f"line {parser.CurrentLineNumber}: has a document type definition")

    parser.StartElementHandler = start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    parser.StartDoctypeDeclHandler = refuse
    parser.buffer_text = True
    try:
        parser.Parse(raw, True)
    except expat.ExpatError as error:
        raise XMLFault(f"line {error.lineno}: {expat.ErrorString(error.code)}") from None
    except (LookupError, ValueError) as error:  # an unknown encoding
        raise error if isinstance(error, XMLFault) else XMLFault(f"line 1: {error}") from None
    return builder.close()


def line_of(element: Element) -> int:
    """The number of the line of an element that :func:`parse_xml` has returned."""
    assert isinstance(element, _LineElement)
    return element.line


def root_tag(path: Path) -> str | None:
    """The name of the root element, from the start of a file; None if there is none."""
    found: list[str] = []
    parser = expat.ParserCreate()
    parser.StartElementHandler = lambda tag, attributes: found.append(tag)
    try:
        with path.open("rb") as file:
            parser.Parse(file.read(4096))
    except (OSError, LookupError, ValueError, expat.ExpatError):
        pass
    return found[0] if found else None


def text_of(element: Element, path: str) -> str:
    """The text of a descendant without surrounding blanks; empty if there is none."""
    return (element.findtext(path) or "").strip()
