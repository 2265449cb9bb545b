"""The index that a search asks, and the file beside the encoded one in which it is kept."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ask_lightning.cli.encoded_pairs import EncodedPairs, Side
from ask_lightning.cli.errors import UsageError
from ask_lightning.knowledge.exact_search import Search
from ask_lightning.knowledge.faiss_search import FaissSearch
from ask_lightning.utilities.atomic_files import atomic_write
from ask_lightning.utilities.file_checksum import sampled_checksum
from ask_lightning.utilities.file_lock import file_lock
from ask_lightning.utilities.optional_imports import import_optional

COMPARED_BY_AUTO = 2_000_000
"""Number of rows up to which `auto` compares all of them (docs/benchmarks.md)."""

_NAMED = ("auto", "exact", "ivf", "hnsw")
_FORMAT = "ask-lightning index 2"


@dataclass(frozen=True)
class ChosenIndex:
    """What a search asks.

    Attributes:
        name: `"exact"`, `"ivf"`, `"hnsw"` or a Faiss factory string.
        search: Search by the index. None: all rows are compared.
        said: Sentence that tells the user which index it is, and why.
    """

    name: str
    search: Search | None
    said: str


def factory_of(name: str, num_rows: int) -> str:
    """The Faiss factory string of an index.

    Args:
        name: `"ivf"`, `"hnsw"`, or a factory string, which is returned as it is.
        num_rows: Number of the rows, at least 1.

    Returns:
        The string. An inverted file has about as many lists as each list has rows, of which an
        eighth is visited; both kinds hold a byte for each number.

    Examples:
        >>> factory_of("ivf", 1_000_000), factory_of("ivf", 100), factory_of("Flat", 100)
        ('IVF1024,SQ8;nprobe=128', 'IVF16,SQ8;nprobe=2', 'Flat')
    """
    if name == "ivf":
        lists = 1 << max(0, round(num_rows.bit_length() / 2))
        return f"IVF{lists},SQ8;nprobe={max(1, lists // 8)}"
    return "HNSW32,SQ8;efSearch=256" if name == "hnsw" else name


def choose_index(path: Path, pairs: EncodedPairs, side: Side, name: str) -> ChosenIndex:
    """Choose what searches a side of an encoded file; an index that is not there yet is built and kept.

    Args:
        path: Path of the encoded file.
        pairs: Its content.
        side: `"audio"` to search clips, `"text"` to search captions.
        name: `"auto"`, `"exact"`, `"ivf"`, `"hnsw"`, or a Faiss factory string.

    Raises:
        UsageError: Faiss is missing, does not know the index or cannot build it.
    """
    rows = getattr(pairs, side)
    what = f"{len(rows):,} {'clips' if side == 'audio' else 'captions'}"
    chosen = name
    if name == "auto":
        kept = [one for one in ("hnsw", "ivf") if StoredIndex(path, side, one).is_of(pairs)]
        chosen = kept[0] if kept else "ivf" if len(rows) > COMPARED_BY_AUTO else "exact"
    if chosen == "exact":
        return ChosenIndex(chosen, None, f"All {what} are compared with a query.")
    stored = StoredIndex(path, side, chosen)
    try:
        search = stored.load(pairs) or stored.build(pairs, what)
    except (ImportError, ValueError) as error:
        remedy = f" `--index` has to be {', '.join(_NAMED)} or a Faiss factory string."
        raise UsageError(str(error) + remedy) from error
    where = stored.path.name if stored.path.exists() else "memory"
    said = f"The {what} are searched by the index {chosen} ({where}), which may miss some; `--index exact` "
    return ChosenIndex(chosen, search, said + "compares all.")


@dataclass(frozen=True)
class StoredIndex:
    """An index beside an encoded file, and a small file that says of what it is.

    Attributes:
        encoded: Path of the encoded file.
        side: The side that is searched.
        name: Name of the index, or its factory string.
    """

    encoded: Path
    side: Side
    name: str

    @property
    def path(self) -> Path:
        """Path of the index."""
        readable = "".join(sign if sign.isalnum() else "_" for sign in self.name)
        return self.encoded.with_name(f"{self.encoded.name}.{self.side}.{readable}.faiss")

    def is_of(self, pairs: EncodedPairs) -> bool:
        """Whether the file is there, of these very embeddings and undamaged, as `sampled_checksum` tells.

        Args:
            pairs: The content of the encoded file.
        """
        try:
            return self._is_said_to_be_of(pairs) and self._noted == self._note_of(pairs)
        except OSError:
            return False

    def load(self, pairs: EncodedPairs) -> Search | None:
        """Load the index.

        Args:
            pairs: The content of the encoded file.

        Returns:
            The search; None where there is no index of these embeddings.
        """
        if not self.is_of(pairs):
            return None
        rows = getattr(pairs, self.side)
        try:
            return FaissSearch.load(self.path, rows, factory_of(self.name, len(rows)))
        except OSError:
            return None

    def build(self, pairs: EncodedPairs, what: str) -> Search:
        """Build the index and keep it beside the encoded file, in place of one of other embeddings.

        Two processes that build at once do so one after the other, and the second one takes what is there.

        Args:
            pairs: The content of the encoded file.
            what: Words that say what is searched.

        Raises:
            ImportError: Faiss is missing.
            ValueError: Faiss does not understand the name, or cannot build such an index of these rows.
        """
        rows = getattr(pairs, self.side)
        factory = factory_of(self.name, len(rows))
        with ExitStack() as held:
            with suppress(OSError):  # where the index cannot be written either
                held.enter_context(file_lock(self.path.with_suffix(".lock")))
            if (found := self.load(pairs)) is not None:
                return found
            print(
                f"{self._why_anew(pairs)}Building the index {factory} of {what}, once:",
                file=sys.stderr,
                flush=True,
            )
            started = time.monotonic()
            with _progress(len(rows)) as advance:
                built = FaissSearch(rows, factory, advance=advance)
            took = f"It took {time.monotonic() - started:.0f} s"
            try:
                # Else one of other embeddings would stay beside this index, were this process killed here.
                self._note.unlink(missing_ok=True)
                with atomic_write(self.path) as temporary:
                    built.save(temporary)
                note = json.dumps(self._note_of(pairs), indent=2) + "\n"
                with atomic_write(self._note) as temporary:
                    temporary.write_text(note, encoding="utf-8")
            except OSError as error:
                reason = error.strerror or error
                print(f"{took}, and cannot be kept as {self.path} ({reason}).", file=sys.stderr)
                return built
            print(f"{took}. It is kept as {self.path}.", file=sys.stderr)
        # What is mapped into memory needs less of it than what was built there.
        return self.load(pairs) or built

    @property
    def _note(self) -> Path:
        return self.path.with_suffix(".json")

    @property
    def _noted(self) -> dict[str, object]:
        """What the small file says; empty where it is missing or damaged."""
        try:
            noted = json.loads(self._note.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return noted if isinstance(noted, dict) else {}

    def _why_anew(self, pairs: EncodedPairs) -> str:
        """A sentence that says why the index that is there is built anew; empty where there is none."""
        if not self.path.exists():
            return ""
        noted, identity = self._noted, self._identity(pairs)
        if "format" not in noted:
            return f"{self._note.name} is missing or damaged, which says of what {self.path} is. "
        if noted["format"] != identity["format"]:
            return f"{self.path} was built by another version of ask-lightning. "
        if noted.get("factory") != identity["factory"]:
            return f"{self.path} is an index {noted.get('factory')}. "
        if self._is_said_to_be_of(pairs):
            return f"{self.path} is damaged. "
        return "The encoded file has changed since its index was built. "

    def _is_said_to_be_of(self, pairs: EncodedPairs) -> bool:
        """Whether the small file names these embeddings."""
        return self._noted.items() >= self._identity(pairs).items()

    def _note_of(self, pairs: EncodedPairs) -> dict[str, object]:
        """What the small file has to say of the index that is there."""
        content = {"bytes": self.path.stat().st_size, "content": sampled_checksum(self.path)}
        return self._identity(pairs) | content

    def _identity(self, pairs: EncodedPairs) -> dict[str, object]:
        """What the index depends on."""
        rows = getattr(pairs, self.side)
        return {
            "format": _FORMAT,
            "factory": factory_of(self.name, len(rows)).partition(";")[0],
            "checksum": pairs.checksums.get(self.side),
            "shape": list(rows.shape),
        }


@contextmanager
def _progress(num_rows: int) -> Iterator[Callable[[int], object]]:
    """A bar on the standard error that is moved by numbers of rows; without rich there is none."""
    try:
        console = import_optional("rich.console").Console(stderr=True)
        progress = import_optional("rich.progress").Progress(
            console=console, transient=True, disable=not sys.stderr.isatty()
        )
    except ImportError:
        yield lambda rows: None
        return
    with progress:
        learning = progress.add_task("learning", total=None)
        filling = progress.add_task("adding rows", total=num_rows, visible=False)

        def advance(rows: int) -> None:
            progress.update(learning, visible=False)
            progress.update(filling, advance=rows, visible=True)

        yield advance
