"""What a run writes: files and folders that change whole or not at all, and a lock on the folder that it writes to."""

from lfrns_hub.runs.atomic import draft_of, put_in_place, remove, rename_synced, settle, written_aside
from lfrns_hub.runs.lock import locked
from lfrns_hub.runs.places import entries

__all__ = ["draft_of", "entries", "locked", "put_in_place", "remove", "rename_synced", "settle", "written_aside"]
