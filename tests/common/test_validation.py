"""Checks of arguments: what passes, and which argument an error names."""

from __future__ import annotations

import pytest

from amct_ext.common.validation import check_callable, check_record_name, check_types


def test_the_first_argument_of_a_wrong_type_is_named() -> None:
    check_types(model=(1, int), names=(None, list, type(None)))
    with pytest.raises(TypeError, match="names must be list or None, not str"):
        check_types(model=(1, int), names=("a", list, type(None)))


@pytest.mark.parametrize("path", ["r", "folder/record.txt", "folder/" + "n" * 254])
def test_names_of_files_pass(path: str) -> None:
    check_record_name(path)


@pytest.mark.parametrize("path", ["", "folder/", "folder/" + "n" * 255])
def test_what_cannot_name_a_file_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match="config_file must name a file"):
        check_record_name(path, "config_file")


def test_callables_and_none_pass() -> None:
    check_callable(loss=len, other=None)
    with pytest.raises(TypeError, match="loss must be callable or None, not int"):
        check_callable(other=None, loss=3)
