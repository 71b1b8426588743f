"""While a process imports, garbage is not looked for, and what it imported never is."""

import gc

import pytest

from regrow.infra.imports import importing, uncollected


def test_imports_are_left_alone_and_later_garbage_is_not():
    before = gc.get_freeze_count()
    with importing():
        assert not gc.isenabled()
        kept = [[number] for number in range(1000)]
    try:
        assert gc.isenabled()
        assert gc.get_freeze_count() >= before + len(kept)
    finally:
        gc.unfreeze()


def test_an_import_that_fails_leaves_the_search_on():
    with pytest.raises(ImportError), importing():
        raise ImportError("no such module")
    gc.unfreeze()
    assert gc.isenabled()


def test_what_is_not_for_good_is_looked_through_later():
    before = gc.get_freeze_count()
    with uncollected():
        assert not gc.isenabled()
    assert gc.isenabled()
    assert gc.get_freeze_count() == before
