"""Work on many files at once, which mostly waits for the file system."""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from rich.console import Console
from rich.progress import track

_THREADS = 16
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def in_threads(
    function: Callable[[_Item], _Result], items: Sequence[_Item], title: str, progress: bool
) -> list[_Result]:
    """``function`` of each item, in order.

    Args:
        function: reads one file.
        items: what it is called with.
        title: text beside the progress bar.
        progress: show a progress bar on standard error.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        results: Iterable[_Result] = pool.map(function, items)
        if progress:
            results = track(results, title, total=len(items), console=Console(stderr=True))
        return list(results)
