"""Tools in a row: the forms in which data has them, and what is no list of tools."""

import json
from typing import Any

import pytest

from cleangpt.corpora.tools import tools_in
from cleangpt.errors import UserError

TOOLS = [{"name": "weather", "parameters": {"default": None, "enum": ["é", 0, False]}}, {"type": "function"}]
FORMS: dict[str, tuple[Any, Any]] = {
    "a list": (TOOLS, TOOLS),
    "text": (json.dumps(TOOLS), TOOLS),
    "a list of texts": ([json.dumps(tool) for tool in TOOLS], TOOLS),
    "an empty list": ([], []),
    "null": (None, None),
    "the text null": ("null", None),
    "blank": (" ", None),
}


@pytest.mark.parametrize("form", FORMS)
def test_tools_come_as_a_list_or_as_text(form: str) -> None:
    given, expected = FORMS[form]
    assert tools_in({"functions": given}, "functions", "a.jsonl, line 7") == expected
    assert tools_in({"functions": given}, "tools", "a.jsonl, line 7") is None, "of another field"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (0, "int in the field 'tools'; allowed: a list of JSON schemas"),
        (False, "bool in the field"),
        ({"name": "weather"}, "dict in the field"),
        ("weather", "the text in the field 'tools' is not valid JSON: "),
        ("[" * 100_000, "the text in the field 'tools' is not valid JSON: "),
        ('{"name": "weather"}', "dict in the field"),
        ([TOOLS[0], "weather"], "the text in the field 'tools' is not valid JSON: "),
        ([TOOLS[0], None], "a list with NoneType in the field"),
        ("[1]", "a list with int in the field"),
        ([{"name": "\ufdd0"}], r"the field 'tools' has U\+FDD0 or U\+FDD1"),
        ([{"\ud800": "a"}], "the field 'tools' has an unpaired surrogate"),
        (r'[{"name": "\ud800"}]', "the field 'tools' has an unpaired surrogate"),
    ],
)
def test_what_is_no_list_of_tools_is_one_line_with_its_place(given: Any, told: str) -> None:
    with pytest.raises(UserError, match=f"^a.jsonl, line 7: {told}") as refused:
        tools_in({"tools": given}, "tools", "a.jsonl, line 7")
    assert "\n" not in str(refused.value)
