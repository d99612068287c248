"""Every law a method must satisfy; run with pytest."""

from pathlib import Path

import pytest

from ctxbench.registry import import_plugin
from ctxbench.testing import laws_for

METHOD = import_plugin(str(Path(__file__).parent)).METHOD


@pytest.mark.parametrize(("law", "case"), laws_for(METHOD), ids=str)
def test_law(law, case):
    law(case)
