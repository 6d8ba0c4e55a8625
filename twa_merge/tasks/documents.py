"""Files of text → documents."""

from __future__ import annotations

import glob
import importlib
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import TaskError, listing

LOADERS = {".txt": "text", ".jsonl": "json", ".parquet": "parquet"}


def import_extra(module: str) -> ModuleType:
    """A module that comes with the extra ``hf``.

    Raises:
        TaskError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise TaskError(
            f"The task causal-lm needs the package {module.partition('.')[0]}.",
            found=str(error),
            remedy='pip install "twa-merge[hf]"',
        ) from error


def read_documents(data: str | Path, text_field: str = "text") -> list[str]:
    """The documents in ``data``, in the order of the file names and of the rows in them.

    Args:
        data: a file, a folder (searched with its subfolders) or a glob. Each ``.txt`` is one
            document, each row of a ``.jsonl`` or ``.parquet`` another. Blank ones are left out.
        text_field: column of ``.jsonl`` and ``.parquet`` that holds the text.

    Raises:
        TaskError: there is nothing to read, or it cannot be read.
    """
    files = _find(data)
    by_kind = {s: [f for f in files if f.suffix.lower() == s] for s in LOADERS}
    # Files with rows are read one by one: read together, `datasets` would cast the later ones to
    # the first one's columns, and fill a missing column with nothing.
    groups = [[f] for s in (".jsonl", ".parquet") for f in by_kind[s]]
    if by_kind[".txt"]:
        groups.insert(0, by_kind[".txt"])
    documents = [text for group in groups for text in _read(group, text_field) if text.strip()]
    if not documents:
        raise TaskError(
            "The data holds no text.",
            expected="at least one document that is not blank",
            found=listing([str(f) for f in files], 3),
            remedy="check --data",
        )
    return documents


def _find(data: str | Path) -> list[Path]:
    path = Path(data).expanduser()
    if path.is_dir():
        found = [p for p in path.rglob("*") if not _hidden(p.relative_to(path))]
    elif path.exists():
        found = [path]
    else:
        found = [Path(name) for name in glob.glob(str(path), recursive=True)]
    files = sorted(p for p in found if p.is_file())
    readable = [p for p in files if p.suffix.lower() in LOADERS]
    # A folder may hold other things; a file that was named must not be passed over in silence.
    refused = [] if path.is_dir() else [p for p in files if p not in readable]
    if not readable or refused:
        raise TaskError(
            f"There is no text in {data}." if files else f"There is no file {data}.",
            expected=", ".join(LOADERS),
            found=listing([p.name for p in refused or files]) or None,
            remedy="give --data a file, a folder or a glob of such files",
        )
    return readable


def _hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def _read(files: Sequence[Path], text_field: str) -> Iterator[str]:
    """Texts of files of one kind. Rows are streamed: nothing is written to a cache."""
    datasets = import_extra("datasets")
    suffix = files[0].suffix.lower()
    files = [f for f in files if f.stat().st_size]
    if not files:
        return
    options = {"encoding": "utf-8-sig", "sample_by": "document"} if suffix == ".txt" else {}
    column = "text" if suffix == ".txt" else text_field
    with tempfile.TemporaryDirectory() as cache, _quiet(datasets):
        try:
            rows = datasets.load_dataset(
                LOADERS[suffix],
                # Names are taken for patterns: unescaped, a file called [1].txt would be left out.
                data_files=[glob.escape(str(f.resolve())) for f in files],
                split="train",
                streaming=True,
                cache_dir=cache,
                **options,
            )
            for batch in rows.iter(batch_size=256):
                yield from _column(batch, column, files[0])
        except UnicodeDecodeError as error:
            raise _not_utf8(files, error) from error
        # Whatever a broken file makes the parsers below raise, the user is to see it as that.
        except (
            OSError,
            ValueError,
            TypeError,
            StopIteration,
            datasets.exceptions.DatasetsError,
        ) as e:
            raise TaskError(
                f"{_named(files)} cannot be read.",
                expected=f"a {suffix} file",
                found=f"{type(e).__name__}: {str(e).strip() or 'no rows'}".splitlines()[0],
                remedy="check the file, or leave it out",
            ) from e


def _column(batch: dict[str, list[Any]], column: str, file: Path) -> Iterator[str]:
    if column not in batch:
        raise TaskError(
            f"{file} has no column {column!r}.",
            expected=column,
            found=listing(batch, 20),
            remedy="name the column with the text: --text-field NAME",
        )
    for text in batch[column]:
        if text is not None and not isinstance(text, str):
            raise TaskError(
                f"The column {column!r} of {file} does not hold text.",
                expected="text in every row",
                found=f"{type(text).__name__}: {str(text)[:60]}",
                remedy="name the column with the text: --text-field NAME",
            )
        yield text or ""


def _not_utf8(files: Sequence[Path], error: UnicodeDecodeError) -> TaskError:
    """The error that names the file and the byte, which the decoder of a chunk does not know."""
    for file in files:
        offset = _first_invalid(file)
        if offset is not None:
            return TaskError(
                f"{file} is not valid UTF-8.",
                found=f"an invalid byte at offset {offset}",
                remedy="convert it, for example: iconv -f latin1 -t utf-8",
            )
    return TaskError(f"{_named(files)} is not valid UTF-8.", found=str(error))


def _first_invalid(file: Path) -> int | None:
    offset = 0
    with file.open("rb") as lines:
        for line in lines:
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return offset + error.start
            offset += len(line)
    return None


def _named(files: Sequence[Path]) -> str:
    return str(files[0]) if len(files) == 1 else f"One of {listing([str(f) for f in files], 3)}"


@contextmanager
def _quiet(datasets: ModuleType) -> Iterator[None]:
    """No bars and no log lines of `datasets`: what goes wrong is said once, by our error."""
    bars, level = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if not bars:
            datasets.enable_progress_bars()
