"""Other people's weight files in: readers, layouts, and the table of published weights.

`open_weights` reads a file of any known format, `Layout`, `recognise` and `load` put it into a net, `CATALOG` and
`download` know and fetch what is published. The nets and the layouts each of them takes are in `kindling.nets`.
"""

from kindling.formats.catalog import CATALOG, Published, cache_folder, download
from kindling.formats.files import open_weights
from kindling.formats.stored import Stored, StoredTensors
from kindling.formats.weights import Layout, Match, load, recognise

__all__ = [
    "CATALOG",
    "Layout",
    "Match",
    "Published",
    "Stored",
    "StoredTensors",
    "cache_folder",
    "download",
    "load",
    "open_weights",
    "recognise",
]
