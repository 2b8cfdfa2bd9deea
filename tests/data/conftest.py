"""Fixtures of the tests of data in files."""

import shutil

import pytest

from tests.data.forms import ARCHIVES, photos, write_form


@pytest.fixture(scope="session")
def forms(tmp_path_factory):
    """The same images as class folders and in each form of `ARCHIVES`, without an index."""
    root = tmp_path_factory.mktemp("forms")
    photos(root / "folder")
    for form in ARCHIVES:
        write_form(form, root / "folder", root / form)
    return root


@pytest.fixture
def copy(forms, tmp_path):
    """`copy(form)` returns a new copy of the images in a form."""
    return lambda form="folder": shutil.copytree(forms / form, tmp_path / form)
