"""What is wrong or unusual about entries of annotation files."""

from collections.abc import Sequence
from dataclasses import dataclass

# Number of places that are kept, and that messages show.
PLACES = 5
_SHOWN = 3


def counted(count: int, singular: str, plural: str) -> str:
    """For example "1 image" or "2 images"."""
    return f"{count} {singular if count == 1 else plural}"


@dataclass(frozen=True)
class Problem:
    """One kind of problem, with the entries that have it.

    Attributes:
        text: what it is, with the number of entries, for example ``2 images listed twice``.
        count: number of entries.
        places: the first few of them, by id or line.
    """

    text: str
    count: int
    places: tuple[str, ...] = ()

    @classmethod
    def at(cls, text: str, places: Sequence[str]) -> "Problem":
        """The problem of all entries in ``places``."""
        return cls(text, len(places), tuple(places[:PLACES]))

    def __str__(self) -> str:
        """For example ``4 images listed twice (image 1, image 2, image 3, ...)``."""
        if not self.places:
            return self.text
        return f"{self.text} ({', '.join(self.places[:_SHOWN])}{', ...' * (self.count > _SHOWN)})"
