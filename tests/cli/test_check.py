"""``ctxbench check``: the table, JSON, exit codes, and plug-ins that misbehave."""

from __future__ import annotations

from pathlib import Path

import pytest

from ctxbench.testing import LAWS, STATUSES

PLUGINS = Path(__file__).parents[1] / "plugins"
HEAD = "from ctxbench.method import Method\nimport torch\n"
BAD = {
    "build": ("def build(*_):\n    raise ValueError('planted in build')\n", "planted in build"),
    "forward": (
        "class Bad(torch.nn.Module):\n    def forward(self, x):\n        raise ValueError('planted in forward')\n"
        "build = lambda *_: Bad()\n",
        "planted in forward",
    ),
    "shape": (
        "class Bad(torch.nn.Module):\n    def forward(self, x):\n        return x[:, 1:]\nbuild = lambda *_: Bad()\n",
        "expected shape (2, 19, 16)",
    ),
    "nan": (
        "class Bad(torch.nn.Module):\n    def forward(self, x):\n        return x / 0\nbuild = lambda *_: Bad()\n",
        "expected finite values",
    ),
    "nothing": ("build = lambda *_: None\n", "build must return a torch.nn.Module"),
}


def test_a_sound_plugin_passes_and_every_law_is_listed(ctxbench) -> None:
    result = ctxbench("check", "flawed", "--plugin", PLUGINS / "flawed.py")
    assert result.code == 0
    assert all(law in result.out for law in LAWS)
    assert "0 violated" in result.out
    assert "METHOD.reach is not given" in result.out


def test_verbose_lists_every_case_and_quiet_the_total_alone(ctxbench) -> None:
    verbose = ctxbench("check", "flawed", "--plugin", PLUGINS / "flawed.py", "-v")
    quiet = ctxbench("check", "flawed", "--plugin", PLUGINS / "flawed.py", "-q")
    assert "flawed/reference" in verbose.out
    assert quiet.out.strip().splitlines() == [verbose.out.strip().splitlines()[-1]]


def test_json_is_one_object_a_method(ctxbench) -> None:
    (report,) = ctxbench("check", "flawed", "--plugin", PLUGINS / "flawed.py", "--json").json
    assert (report["method"], report["ok"]) == ("flawed", True)
    assert {finding["law"] for finding in report["findings"]} == set(LAWS)
    assert {finding["status"] for finding in report["findings"]} <= set(STATUSES)


@pytest.mark.parametrize("name", BAD)
def test_a_plugin_that_misbehaves_gets_a_message_and_exit_code_4(ctxbench, tmp_path: Path, name: str) -> None:
    source, message = BAD[name]
    plugin = tmp_path / "bad.py"
    plugin.write_text(f"{HEAD}{source}METHOD = Method('bad', build=build)\n")
    result = ctxbench("check", "bad", "--plugin", plugin)
    assert result.code == 4
    assert message in result.out
    assert "look at" in result.out
    assert "Traceback" not in result.out + result.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dens"], "did you mean 'dense'"),
        (["dense", "--impl", "blockd"], "unknown impl of dense 'blockd'; did you mean 'blocked'"),
        (["dense", "--plugin", "nowhere.py"], "no plug-in at 'nowhere.py'"),
        (["raises", "--plugin", PLUGINS / "broken" / "raises.py"], "could not be loaded"),
        ([], "Missing argument"),
    ],
    ids=["method", "impl", "plug-in", "broken plug-in", "nothing"],
)
def test_wrong_input_is_a_usage_error(ctxbench, arguments: list, message: str) -> None:
    result = ctxbench("check", *arguments)
    assert result.code == 2
    assert message in result.err


def test_a_broken_plugin_does_not_keep_others_from_being_checked(ctxbench) -> None:
    result = ctxbench(
        "check", "flawed", "-v", "--plugin", PLUGINS / "broken" / "exits.py", "--plugin", PLUGINS / "flawed.py"
    )
    assert result.code == 0
    assert "plug-in 'exits'" in result.err


def test_the_forms_of_a_method_are_listed_with_what_is_tried_and_why_not(ctxbench) -> None:
    found = {(each["impl"], each["form"]): each for each in ctxbench("check", "hierarchical", "--forms", "--json").json}
    seed = found["blocked", "form=seed/bidirectional"]
    assert seed["laws"] > 10
    assert seed["modes"] == ["forward", "train"]
    assert "form=seed cannot be continued" in seed["reason"]
    assert found["all", "form=seed/bidirectional/rope"]["reason"].startswith("form=seed, as the source document has it")
    assert found["triton", ""]["laws"] == 0
    assert 0 < found["native", "form=causal_linear/rope"]["laws"] < found["native", "form=causal_linear"]["laws"]
    every = ctxbench("check", "hierarchical", "--impl", "native", "--forms", "--every", "--json").json
    at = {each["form"]: each["laws"] for each in every}
    assert at["form=causal_linear/rope"] == at["form=causal_linear"]
    listed = ctxbench("check", "dense", "--impl", "blocked", "--forms")
    assert listed.code == 0
    assert "bidirectional/t5" in listed.out
    assert "the others say why not" in listed.out
