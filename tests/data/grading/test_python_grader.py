"""`python` graders: rewards, and everything their process is kept from."""

import time
from typing import Any

import pytest

from cluster.errors import InputError
from data.grading import make_grader
from data.grading.python_grader import PythonGrader
from data.grading.types import GradeResult


def run(source: str, text: str = "x", item: dict[str, Any] | None = None) -> GradeResult:
    grader = make_grader({"type": "python", "name": "p", "source": source})
    assert isinstance(grader, PythonGrader)
    try:
        return grader.grade(item or {}, {"output_text": text})
    finally:
        grader.close()


def expression(code: str) -> str:
    return f"def grade(sample, item):\n    return {code}\n"


def test_the_function_sees_sample_and_item_and_its_number_is_the_reward() -> None:
    source = expression("item['share'] * sample['output_json']['n'] + len(sample['output_text']) * 0")
    assert run(source, '{"n": 2}', {"share": 0.25}).reward == 0.5
    assert run(expression("7")).reward == 1.0
    assert run(expression("-3")).reward == 0.0


def test_the_library_of_the_documented_example_is_there() -> None:
    """The example of OpenAI's guide: rapidfuzz's WRatio."""
    source = (
        "from rapidfuzz import fuzz, utils\n"
        "def grade(sample, item):\n"
        "    output_text = sample['output_text']\n"
        "    reference_answer = item['reference_answer']\n"
        "    return fuzz.WRatio(output_text, reference_answer, processor=utils.default_process) / 100.0\n"
    )
    assert run(source, "fuzzy wuzzy", {"reference_answer": "wuzzy fuzzy"}).reward == pytest.approx(0.95)


@pytest.mark.parametrize(
    "code",
    [
        "open('/etc/passwd').read()",
        "open('/tmp/rayloop-sandbox', 'w')",
        "__import__('os').listdir('/')",
        "__import__('socket').create_connection(('127.0.0.1', 5432))",
        "__import__('_socket').socket()",
        "__import__('os').fork()",
        "__import__('os').kill(1, 0)",
        "__import__('subprocess').run(['true'])",
        "__import__('posix').execv('/bin/true', ['true'])",
        "__import__('threading').Thread(target=print).start()",
        "__import__('os').environ['PATH']",
        "len([0] * 10**10)",
        "1 / 0",
        "'1.0'",
        "True",
        "float('nan')",
        "exit()",
    ],
)
def test_what_is_forbidden_or_fails_abstains(code: str) -> None:
    result = run(expression(code))
    assert (result.reward, result.error) == (None, "python_grader_runtime_error"), result.reason


def test_a_process_that_ends_itself_abstains_and_the_next_answer_gets_another() -> None:
    grader = make_grader({"type": "python", "source": expression("__import__('os')._exit(0) if item['end'] else 1")})
    assert grader.grade({"end": 1}, {"output_text": "x"}).error == "python_grader_server_error"
    assert grader.grade({"end": 0}, {"output_text": "x"}).reward == 1.0


def test_a_shell_command_does_nothing(tmp_path: Any) -> None:
    run(expression(f"__import__('os').system('touch {tmp_path}/made')"))
    assert not (tmp_path / "made").exists()


def test_a_grader_that_hangs_is_ended_at_its_deadline() -> None:
    grader = make_grader({"type": "python", "source": "def grade(s, i):\n    while i['hang']: pass\n    return 1\n"})
    assert isinstance(grader, PythonGrader)
    assert grader.grade({"hang": 0}, {"output_text": "x"}).reward == 1.0  # its process is up
    result = grader.grade_by({"hang": 1}, {"output_text": "x"}, time.monotonic() + 0.2)
    assert (result.reward, result.error) == (None, "unresponsive_reward_error")
    assert grader.grade({"hang": 0}, {"output_text": "x"}).reward == 1.0
    grader.close()


@pytest.mark.parametrize(("source", "message"), [("def grade(:", "is no Python"), ("x = 1", "must define grade")])
def test_malformed_source_is_refused(source: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_grader({"type": "python", "source": source})


def test_source_that_fails_on_import_abstains() -> None:
    assert "no_such" in run("import no_such\ndef grade(s, i):\n    return 1\n").reason
