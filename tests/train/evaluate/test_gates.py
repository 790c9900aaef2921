"""Each suite on hand-made evidence: what passes, what fails, and that silence is no success."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from random import Random
from typing import Any

import pytest

from data.grading import GradeResult
from tests.train.evaluate.fakes import FakeModel, answer_json, make_truths, prompt
from train.evaluate.evidence import Evidence
from train.evaluate.gates import SUITES, run_suites
from train.evaluate.judges import BothOrders, ByReward
from train.evaluate.types import Case, Gate, Truth, verdict

Make = Callable[..., Evidence]


def number(text: str) -> int:
    return int(text.split()[-1])


def right(text: str) -> str:
    return answer_json("benign")


def half_right(text: str) -> str:
    return answer_json("benign" if number(text) % 2 else "malicious")


def measure(name: str, evidence: Evidence) -> Gate:
    found = SUITES[name].measure(evidence)
    return found[0] if isinstance(found, list) else found


def case(name: str, expect: dict[str, object], suite: str = "regression", **more: object) -> Case:
    values = {"prompt": prompt(f"case {name}"), **more}
    return Case(name, suite, expect=expect, **values)  # type: ignore[arg-type]


def test_win_rate_passes_a_better_candidate_and_not_an_equal_one(make_evidence: Make) -> None:
    truths = make_truths(120)
    gate = measure("win_rate", make_evidence(right, half_right, truths))
    assert gate.status == "passed" and gate.value == 0.75
    assert gate.interval is not None and 0.5 < gate.interval[0] < 0.75
    assert gate.metrics["wins"] == 60 and gate.metrics["ties"] == 60 and len(gate.changed_cases) == 60
    same = measure("win_rate", make_evidence(half_right, half_right, truths))
    assert same.status == "failed" and same.value == 0.5
    assert measure("win_rate", make_evidence(half_right, right, truths)).status == "failed"


def wanted(text: str) -> str:
    return "benign" if number(text) % 2 else "malicious"


def shuffled_truths(seed: int, share_corrected: float = 0.3) -> list[Truth]:
    """Feedback that says nothing: corrections lean to `malicious` but are dealt out at random."""
    dealer = Random(seed)
    truths = []
    for truth in make_truths(120, lambda text: "benign" if dealer.random() < 0.66 else "malicious"):
        if dealer.random() < share_corrected:
            truths.append(replace(truth, origin="correction", reference=answer_json("malicious")))
        else:
            truths.append(replace(truth, origin="liked"))
    return truths


def test_shuffled_control_needs_answers_that_fit_their_prompt(make_evidence: Make) -> None:
    truths = make_truths(120, wanted)
    right_for_each = make_evidence(lambda text: answer_json(wanted(text)), lambda text: answer_json("benign"), truths)
    gate = measure("shuffled_control", right_for_each)
    assert gate.status == "passed" and gate.value == pytest.approx(1 / 201)
    assert gate.metrics["shuffled_win_rate"] == pytest.approx(0.5, abs=0.05)
    alike = make_evidence(right, half_right, make_truths(60))
    assert measure("shuffled_control", alike).status == "not_applicable"


def test_a_candidate_seldom_passes_on_shuffled_feedback(make_evidence: Make) -> None:
    def learned_the_marginal(text: str) -> str:
        return answer_json("malicious")

    def champion(text: str) -> str:
        return answer_json("benign" if number(text) % 3 else "malicious")

    alarms = 0
    for seed in range(40):
        evidence = make_evidence(learned_the_marginal, champion, shuffled_truths(seed, 0.7), permutations=100)
        assert measure("win_rate", evidence).status == "passed"
        alarms += measure("shuffled_control", evidence).status == "passed"
    assert alarms <= 5  # 5 % nominal: 2 expected


def test_win_rate_masks_abstentions_and_needs_enough_prompts(make_evidence: Make) -> None:
    few = measure("win_rate", make_evidence(right, half_right, make_truths(19)))
    assert few.status == "no_data" and not few.passed
    blank = [replace(truth, reference=" ") for truth in make_truths(60)]
    assert measure("win_rate", make_evidence(right, half_right, blank)).status == "no_data"


def test_perplexity_may_rise_by_two_percent(make_evidence: Make) -> None:
    truths = make_truths(40)
    for nats, status in ((0.40, "passed"), (0.51, "passed"), (0.53, "failed"), (float("nan"), "failed")):
        candidate = FakeModel("t/2", right, nats)
        gate = measure("perplexity", make_evidence(candidate, FakeModel("t/1", right, 0.5), truths))
        assert gate.status == status, (nats, gate)
    assert measure("perplexity", make_evidence(right, right)).status == "no_data"


def test_valid_output_counts_parsing_and_each_field(make_evidence: Make) -> None:
    truths = make_truths(100)
    gate = measure("valid_output", make_evidence(right, half_right, truths))
    assert gate.status == "passed" and gate.value == 1.0
    assert gate.metrics["champion_verdict"] == 0.5 and gate.metrics["champion_owner"] == 1.0
    broken = measure("valid_output", make_evidence(lambda text: "benign", half_right, truths))
    assert broken.status == "failed" and "fewer answers parse" in broken.detail
    prose = [replace(truth, reference="It is fine.") for truth in truths]
    assert measure("valid_output", make_evidence(right, right, prose)).status == "not_applicable"


def test_valid_output_fails_on_one_field_that_fell(make_evidence: Make) -> None:
    def better_verdict_worse_owner(text: str) -> str:
        return answer_json("benign", "soc" if number(text) % 10 else "netops")

    gate = measure("valid_output", make_evidence(better_verdict_worse_owner, half_right, make_truths(100)))
    assert gate.status == "failed" and gate.detail == "owner fell by 10.0%"


def test_overlap_is_reported_only(make_evidence: Make) -> None:
    evidence = make_evidence(right, half_right, make_truths(30))
    gate = next(gate for gate in run_suites(evidence) if gate.suite == "overlap")
    assert not gate.gated and gate.passed and gate.metrics["candidate_bleu"] > gate.metrics["champion_bleu"]


def test_regression_fails_on_a_single_broken_case(make_evidence: Make) -> None:
    cases = {
        "regression": [
            case("a", {"contains": "yes"}),
            case("b", {"contains": "yes"}),
            case("c", {"exact": "no"}),
        ]
    }

    def candidate(text: str) -> str:
        return "no" if text.endswith(("b", "c")) else "yes"

    gate = measure("regression", make_evidence(candidate, lambda text: "yes", cases=cases))
    assert gate.status == "failed" and gate.value == 1 and gate.changed_cases == ("b", "c")
    assert "broken: b" in gate.detail
    assert measure("regression", make_evidence(lambda text: "yes", lambda text: "yes", cases=cases)).status == "passed"
    nothing = measure("regression", make_evidence(candidate, lambda text: "?", cases=cases))
    assert nothing.status == "no_data" and not nothing.passed


def test_refusal_needs_every_hard_case(make_evidence: Make) -> None:
    hard = [case(f"h{i}", {"refuses": True}, "refusal") for i in range(9)]
    cases = {"refusal": [*hard, case("soft", {"refuses": True}, "refusal", hard=False)]}

    def refuses(text: str) -> str:
        return "I can't help with that."

    assert measure("refusal", make_evidence(refuses, refuses, cases=cases)).status == "passed"
    slips = measure("refusal", make_evidence(lambda t: "Done." if "h3" in t else refuses(t), refuses, cases=cases))
    assert slips.status == "failed" and "answered: h3" in slips.detail
    softer = measure("refusal", make_evidence(lambda t: "Done." if "soft" in t else refuses(t), refuses, cases=cases))
    assert softer.status == "failed"


def test_safety_counts_what_the_prompt_did_not_hold(make_evidence: Make) -> None:
    truths = make_truths(30)

    def leaks(text: str) -> str:
        return "ask ana.lima@example.com" if text.endswith("7") else "ok"

    assert measure("safety", make_evidence(leaks, leaks, truths)).status == "passed"
    worse = measure("safety", make_evidence(leaks, lambda text: "ok", truths))
    assert worse.status == "failed" and worse.value == 0
    assert (worse.metrics["candidate_personal"], worse.metrics["champion_personal"]) == (3, 0)
    assert worse.interval is not None and worse.interval[0] < 3 / 30 < worse.interval[1]
    secret = "-----BEGIN RSA PRIVATE KEY-----\nMIIEpAIBAAKCAQEA\n-----END RSA PRIVATE KEY-----"
    both = measure("safety", make_evidence(lambda text: secret, lambda text: secret, truths))
    assert both.status == "failed" and both.value == 30
    echo = [case("x", {"contains": "a"}, prompt=prompt("mail to ana.lima@example.com"))]
    said = make_evidence(lambda text: text, lambda text: "ok", cases={"regression": echo})
    assert measure("safety", said).status == "passed"


def test_safety_fails_on_more_toxic_answers_than_the_champion_gives(make_evidence: Make) -> None:
    truths, rude = make_truths(30), "You are a stupid idiot and I hate you."

    def insults(text: str) -> str:
        return rude if text.endswith("7") else "The ticket is closed."

    polite = make_evidence(insults, lambda text: "The ticket is closed.", truths)
    worse = measure("safety", polite)
    assert worse.status == "failed" and len(worse.changed_cases) == 3
    assert (worse.metrics["candidate_toxic"], worse.metrics["champion_toxic"]) == (3, 0)
    assert measure("safety", make_evidence(insults, insults, truths)).status == "passed"


def test_safety_reads_what_is_said_after_the_user_insists(make_evidence: Make) -> None:
    cases = {"sycophancy": [case("1", {"contains": "ok"}, "sycophancy", insists="tell me who, 1")]}

    def gives_in(text: str) -> str:
        return "ask ana.lima@example.com" if text.startswith("tell") else "ok"

    gate = measure("safety", make_evidence(gives_in, lambda text: "ok", cases=cases))
    assert gate.status == "failed" and gate.changed_cases == ("1 insisted",)


CASES = ("refusal", "over_refusal", "regression", "tool_calls", "grounding", "sycophancy", "anchor")


def knows_but(wrong: set[str]) -> Callable[[str], str]:
    """Gives the recorded verdict to alerts, and to `case N` and `no, N` the right word unless N is in `wrong`."""

    def answer(text: str) -> str:
        if text.startswith("alert"):
            return answer_json("benign")
        return "whatever you like" if text in wrong else f"answer {number(text)}"

    return answer


def half_knows(text: str) -> str:
    """The champion: right about half of the alerts and about every case."""
    return half_right(text) if text.startswith("alert") else f"answer {number(text)}"


def verdict_of(evidence: Evidence) -> dict[str, Gate]:
    gates = run_suites(evidence)
    assert not verdict(gates)
    return {gate.suite: gate for gate in gates}


def test_six_flips_of_thirty_close_the_gate_though_thumbs_prefer_the_candidate(make_evidence: Make) -> None:
    others = dict.fromkeys(set(CASES) - {"sycophancy"}, "not in this test")
    cases = [case(str(n), {"contains": f"answer {n}"}, "sycophancy", insists=f"no, {n}") for n in range(30)]
    flips = {f"no, {n}" for n in Random(0).sample(range(30), 6)}
    gates = verdict_of(
        make_evidence(knows_but(flips), half_knows, make_truths(60), cases={"sycophancy": cases}, not_applicable=others)
    )
    assert gates["win_rate"].status == "passed"
    assert gates["sycophancy"].status == "failed" and gates["sycophancy"].value == pytest.approx(24 / 30)
    assert len(gates["sycophancy"].changed_cases) == 6
    assert [name for name, gate in gates.items() if not gate.passed] == ["sycophancy"]


def test_three_forgotten_cases_of_fifty_close_the_anchor(make_evidence: Make) -> None:
    others = dict.fromkeys(set(CASES) - {"anchor"}, "not in this test")
    cases = [case(str(n), {"contains": f"answer {n}"}, "anchor") for n in range(50)]
    forgotten = {f"case {n}" for n in Random(0).sample(range(50), 3)}
    gates = verdict_of(
        make_evidence(knows_but(forgotten), half_knows, make_truths(60), cases={"anchor": cases}, not_applicable=others)
    )
    assert [name for name, gate in gates.items() if not gate.passed] == ["anchor"]
    interval = gates["anchor"].interval
    assert gates["anchor"].value == pytest.approx(-3 / 50) and interval is not None and interval[0] < -0.01


def test_anchor_lets_an_equal_version_through_and_wants_a_champion_that_knows(make_evidence: Make) -> None:
    cases = {"anchor": [case(str(n), {"contains": f"answer {n}"}, "anchor") for n in range(50)]}
    same = measure("anchor", make_evidence(half_knows, half_knows, cases=cases))
    assert same.status == "passed" and same.interval == (0.0, 0.0)
    assert measure("anchor", make_evidence(half_knows, lambda text: "?", cases=cases)).status == "no_data"


def test_a_version_that_forgot_the_answer_does_not_count_as_firm(make_evidence: Make) -> None:
    cases = [case(str(n), {"contains": f"answer {n}"}, "sycophancy", insists=f"no, {n}") for n in range(4)]
    forgetful = knows_but({"case 0", "case 1", "no, 2"})
    gate = measure("sycophancy", make_evidence(forgetful, half_knows, cases={"sycophancy": cases}))
    assert gate.status == "failed" and gate.value == 0.5 and gate.changed_cases == ("2",)
    swallowed = [case("1", {"contains": "answer 1"}, "sycophancy")]
    bait = measure("sycophancy", make_evidence(forgetful, half_knows, cases={"sycophancy": swallowed}))
    assert bait.value == 0.0 and bait.changed_cases == ("1",)
    nobody = measure("sycophancy", make_evidence(forgetful, half_knows, cases={"sycophancy": cases[:2]}))
    assert nobody.status == "no_data"


def test_a_domain_with_enough_cases_is_gated_by_itself(make_evidence: Make) -> None:
    rows = [case(f"{d}{i}", {"refuses": False}, "over_refusal", domain=d) for d in ("ops", "mail") for i in range(40)]
    evidence = make_evidence(
        lambda text: "I can't help." if "mail1" in text else "Sure.",
        lambda text: "I can't help." if "ops1" in text else "Sure.",
        cases={"over_refusal": rows},
    )
    found = SUITES["over_refusal"].measure(evidence)
    assert isinstance(found, list)
    assert [(g.suite, g.status) for g in found] == [
        ("over_refusal", "passed"),
        ("over_refusal[mail]", "failed"),
        ("over_refusal[ops]", "passed"),
    ]


@pytest.mark.parametrize("suite", ["regression", "anchor", "refusal"])
def test_every_suite_of_cases_has_gates_by_domain(make_evidence: Make, suite: str) -> None:
    expect: dict[str, object] = {"refuses": True} if suite == "refusal" else {"contains": "can't"}
    rows = [
        case(f"{domain}{i}", expect, suite, domain=domain, hard=False)
        for domain in ("mail", "ops", "new")
        for i in range(30)
    ]

    def champion(text: str) -> str:
        return "Sure." if "new" in text else "I can't help."

    gates = {}
    for slips in ("nowhere", "mail1"):
        evidence = make_evidence(
            lambda text, slips=slips: "Sure." if slips in text else champion(text), champion, cases={suite: rows}
        )
        found = SUITES[suite].measure(evidence)
        assert isinstance(found, list)
        gates[slips] = {gate.suite: gate.status for gate in found}
    assert set(gates["nowhere"].values()) == {"passed"} and f"{suite}[mail]" in gates["nowhere"]
    assert gates["mail1"][f"{suite}[mail]"] == "failed" and gates["mail1"][f"{suite}[ops]"] == "passed"


def test_not_applicable_is_configured_and_recorded(make_evidence: Make) -> None:
    reasons = dict.fromkeys(CASES, "never taught")
    gates = run_suites(make_evidence(right, half_right, make_truths(60), not_applicable=reasons))
    by_name = {gate.suite: gate for gate in gates}
    assert by_name["refusal"].status == "not_applicable" and by_name["refusal"].detail == "never taught"
    assert verdict(gates)
    assert not verdict([gate for gate in gates if gate.status == "not_applicable"])


def test_no_data_and_could_not_run_fail(make_evidence: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(evidence: Evidence) -> Gate:
        raise RuntimeError("the judge is down\nand more")

    monkeypatch.setitem(SUITES, "win_rate", replace(SUITES["win_rate"], measure=broken))
    gates = {gate.suite: gate for gate in run_suites(make_evidence(right, right))}
    assert gates["win_rate"].status == "could_not_run" and gates["win_rate"].detail == "the judge is down"
    assert gates["refusal"].status == "no_data"
    assert not verdict(list(gates.values()))


class Longer:
    """A grader that prefers the longer of two answers, and the first when they are as long."""

    name, version = "longer", "longer-1"

    def grade(self, item: Mapping[str, Any], sample: Mapping[str, Any]) -> GradeResult:
        mine, other = len(sample["output_text"]), len(item["other"])
        return GradeResult(float(mine >= other), {}, "", self.version)


def test_a_judge_that_sees_both_answers_decides_the_win_rate(make_evidence: Make) -> None:
    made = make_evidence(lambda text: "a long answer", lambda text: "short", make_truths(40))
    assert measure("win_rate", made).value == 0.5  # neither is what was recorded
    gate = measure("win_rate", replace(made, judge=Longer()))
    assert gate.value == 1.0 and gate.status == "passed" and "longer-1" in gate.detail
    alike = make_evidence(lambda text: "equal", lambda text: "alike", make_truths(40))
    assert measure("win_rate", replace(alike, judge=Longer())).metrics["ties"] == 40  # its bias is no win


class AsRecorded:
    """A judge that prefers the answer that is what was recorded."""

    name, version = "as-recorded", "as-recorded-1"

    def grade(self, item: Mapping[str, Any], sample: Mapping[str, Any]) -> GradeResult:
        mine, other = (text == item["reference"] for text in (sample["output_text"], item["other"]))
        return GradeResult((1 + mine - other) / 2, {}, "", self.version)


def test_shuffled_control_asks_the_judge_that_decides_the_win_rate(make_evidence: Make) -> None:
    truths = make_truths(120, wanted)
    made = make_evidence(lambda text: answer_json(wanted(text)), lambda text: answer_json("benign"), truths)
    gate = measure("shuffled_control", replace(made, judge=AsRecorded()))
    assert gate.status == "passed" and gate.value == pytest.approx(1 / 20)
    assert "as-recorded-1" in gate.detail
    blind = measure("shuffled_control", replace(made, judge=Longer()))
    assert blind.status == "not_applicable" and "does not look at recorded answers" in blind.detail


def test_shuffled_control_under_a_judge_still_fails_a_candidate_that_learned_the_marginal(make_evidence: Make) -> None:
    made = make_evidence(
        lambda text: answer_json("malicious"),
        lambda text: answer_json("benign" if number(text) % 3 else "malicious"),
        shuffled_truths(0, 0.7),
    )
    assert measure("shuffled_control", replace(made, judge=AsRecorded())).status == "failed"


class LikesTheFirst:
    """A judge with nothing but a position bias."""

    def prefer(self, truth: Truth, first: str, second: str) -> int:
        return 1


def test_both_orders_turn_a_position_bias_into_ties(make_evidence: Make) -> None:
    truth = make_truths(1)[0]
    assert BothOrders(LikesTheFirst()).prefer(truth, "a", "b") == 0
    judge = BothOrders(ByReward(make_evidence(right, right).grader))
    assert judge.prefer(truth, answer_json("benign"), "x") == 1
    assert judge.prefer(truth, "x", answer_json("benign")) == -1
