"""Names for artifacts that must stay, with all that they were made from."""

from __future__ import annotations

import json

from regrow.infra.store import Store


def pinned(store: Store) -> dict[str, str]:
    """{name: key} of all pins."""
    files = sorted(name for name in store.sizes("pins") if name.endswith(".json"))
    return {
        name.removesuffix(".json"): json.loads(store.read_bytes(f"pins/{name}"))["key"]
        for name in files
    }


def pin(store: Store, name: str, key: str) -> None:
    """Pin an artifact; a name that was another's now means this one."""
    store.write_bytes(f"pins/{name}.json", json.dumps({"key": key}).encode())


def unpin(store: Store, name: str) -> bool:
    """Take a pin back; False when there was no such pin."""
    there = store.exists(f"pins/{name}.json")
    if there:
        store.remove(f"pins/{name}.json")
    return there
