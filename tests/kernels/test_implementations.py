"""Every implementation on every case of the suite; then what is particular to each."""

import pytest

from tests.kernels.suite import CASES, IMPLEMENTATIONS, check


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=str)
def test_suite(implementation, case):
    check(implementation, case)


def test_names_of_cases_are_unique():
    names = [case.name for case in CASES]
    assert len(names) == len(set(names))
