"""Files of a run: files and folders that change completely or not at all, and a lock on the folder being written."""

from lfrns_hub.runs.atomic import draft_of, put_in_place, remove, rename_synced, settle, written_aside
from lfrns_hub.runs.lock import locked
from lfrns_hub.runs.places import entries

__all__ = ["draft_of", "entries", "locked", "put_in_place", "remove", "rename_synced", "settle", "written_aside"]
