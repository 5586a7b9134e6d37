"""The directory that a person names for a report or a comparison."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def output_directory(path: Path) -> Iterator[Path]:
    """Make ``path`` where it is missing, and yield it to be written into.

    Raises:
        OSError: if it cannot be made or written; names the directory, the file that failed and the cure.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        yield path
    except OSError as error:
        # the second name is that of the file that was to appear
        name = error.filename2 or error.filename
        where = f" at {name}" if name and str(name) != str(path) else ""
        raise OSError(
            f"{path} could not be written: {error.strerror or error}{where}; give --output a directory that can be written"
        ) from error
