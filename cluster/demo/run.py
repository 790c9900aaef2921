"""The demo, act by act. `run_demo` reads like its programme; each stage is a method that does one thing.

Everything is done the way an operator would do it: by the command line and over HTTP. The demo decides
nothing by the truth: it promotes what the gates and the rollout say, and looks at held-out alerts when all
is over.
"""

import json
import os
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from cluster.demo import held_out, report, world
from cluster.demo.commands import Api, Commands, Processes, Traffic
from cluster.demo.damage import damage_adapter
from cluster.demo.home import DemoHome, fresh_home, write_corpus, write_suite
from cluster.demo.plan import BASE_VERSION, SIMULATED, DemoPlan, write_config, write_control_config
from cluster.demo.report import Findings, Moment, Row
from cluster.demo.story import Stage, Story
from cluster.errors import UnavailableError
from cluster.loop import JobError
from cluster.turn import choose

METHODS = ("sft", "dpo", "kto")
SIDE_BY_SIDE = (("dpo",), ("sft", "kto"))
"""Methods that share a process; the groups take about as long as each other."""
POLL_S = 0.3
TRAFFIC_LIMIT_S = 300.0
FRESH_SEEDS = 1_000
ENDED = ("promoted", "rolled_back", "failed")
ACT_TWO_REASON = "second act of the demo: let the live traffic judge a version that its gates would stop"


def run_demo(plan: DemoPlan, root: Path, story: Story) -> tuple[Findings, dict[str, Path]]:
    """The whole programme; returns what was found and where the report is."""
    home, processes = fresh_home(root)
    demo = Demo(plan, home, processes, story)
    done = False
    try:
        story.act("Act one: an agent learns from its own traffic")
        demo.make_base()
        demo.go_live()
        demo.work_with_analysts()
        demo.curate()
        demo.sweep()
        demo.train()
        demo.evaluate()
        demo.roll_out()
        demo.findings.loop_seconds = story.elapsed_s
        if demo.findings.promoted:
            story.act("Act two: a damaged candidate is given traffic")
            demo.damage_and_roll_back()
        story.act("Afterwards: how good was it really?")
        demo.train_control()
        demo.measure_held_out()
        written = demo.write_report()
        done = True
        return demo.findings, written
    finally:
        if not (done and plan.keep_up):
            demo.close()


class Demo:
    """State that the stages hand on."""

    def __init__(self, plan: DemoPlan, home: DemoHome, processes: Processes, story: Story) -> None:
        self.plan, self.home, self.story, self.processes = plan, home, story, processes
        self.cli = Commands(write_config(home.config, plan, home.root))
        self.findings = Findings(plan.seed, plan.shuffle_feedback, SIMULATED.format(users=plan.users))
        self.adapters: dict[str, Path] = {}
        """Method -> folder of its adapter."""
        self.versions: dict[str, str] = {}
        """Method -> registered version."""
        self.api = Api("", "")
        self.traffic: Traffic | None = None
        self.ray: dict[str, str] = {}
        """Environment that makes a command join the live side's Ray cluster."""
        self.tuned: dict[str, float] = {}
        processes.add(os.getpid())

    def make_base(self) -> None:
        """Train the base model and register it as the first champion."""
        with self.story.stage("base", "Train a base model that mostly knows the old runbook") as stage:
            corpus, suite = write_corpus(self.home, self.plan), self.home.root / "suites"
            write_suite(suite, self.plan.seed)
            made = self.cli.run("train", "toy", "--examples", str(corpus), "--out", str(self.home.base), stage=stage)
            registered = self.cli.run("register", world.AGENT, "--base", str(self.home.base), stage=stage)
            assert registered["version"] == BASE_VERSION, f"a fresh registry numbered the base {registered['version']}"
            stage.found(f"{made['parameters'] / 1e6:.2f} M parameters, registered as {BASE_VERSION}")

    def go_live(self) -> None:
        """Start the live side."""
        with self.story.stage("up", "Start router, engine, grader and controller") as stage:
            up = self.cli.run("up", *(["--mlflow"] if self.plan.keep_up else []), stage=stage)
            key = Path(up["api_key_file"]).read_text(encoding="utf-8").strip()
            self.api, self.findings.urls = Api(up["urls"]["api"], key), up["urls"]
            self.ray = {"RAYLOOP_RAY__ADDRESS": up["ray_address"]}
            self.cli.environment |= self.ray
            stage.found(f"the API is at {self.api.url}")

    def work_with_analysts(self) -> None:
        """Live traffic and feedback."""
        title = f"{self.plan.users} analysts ask about {self.plan.alerts} alerts and react"
        with self.story.stage("traffic", title) as stage:
            extra = ["--control", str(self._control_events)] if self.plan.trains_control else []
            tally = self._start_traffic("--alerts", str(self.plan.alerts), *extra).wait(stage, TRAFFIC_LIMIT_S)
            self.findings.traffic = tally
            liked = 100 * tally["liked"] / max(tally["judged"], 1)
            stage.found(
                f"{tally['answers']} answers, {liked:.0f} % liked, {tally['signals'].get('correction', 0)} corrected"
            )

    def curate(self) -> None:
        """From events to a dataset."""
        with self.story.stage("curate", "Turn the event log into a dataset") as stage:
            self.findings.dataset = self.cli.run("curate", "--agent", world.AGENT, stage=stage)
            counts = self.findings.dataset["counts"]
            sizes = (
                f"{sum(counts[kind].values())} {kind}" for kind in ("sft", "preference", "unpaired") if kind in counts
            )
            stage.found(f"{', '.join(sizes)} examples, hash {self.findings.dataset['dataset_hash'][:12]}")

    def sweep(self) -> None:
        """A short sweep of learning rate and KL coefficient."""
        plan = self.plan
        with self.story.stage("sweep", f"Try {plan.trials} settings of DPO") as stage:
            line = ["tune", "run", "--method", "dpo", "--dataset", self.findings.dataset["dataset_id"]]
            line += ["--trials", str(plan.trials), "--learning-rate", plan.sweep_learning_rates]
            line += ["--beta", plan.sweep_betas, "--base", f"{world.AGENT}@champion"]
            self.findings.sweep = self.cli.run(*line, stage=stage)
            chosen = self.findings.sweep.get("chosen") or {}
            self.tuned = {k: v for k, v in chosen.get("config", {}).items() if k in ("learning_rate", "beta")}
            shown = ", ".join(f"{name.replace('_', ' ')} {value:.2g}" for name, value in self.tuned.items())
            stage.found(shown or "none was good enough: the defaults stay")

    def train(self) -> None:
        """SFT, DPO and KTO on the same feedback, in two Ray Train runs side by side."""
        with self.story.stage("train", "Train SFT, DPO and KTO adapters on the same feedback") as stage:
            write_config(self.home.config, self.plan, self.home.root, self.tuned)
            common = ["--dataset", self.findings.dataset["dataset_id"], "--base", f"{world.AGENT}@champion"]
            common += ["--register", world.AGENT]
            lines = [["train", "run", *(p for m in group for p in ("--method", m)), *common] for group in SIDE_BY_SIDE]
            made = self.cli.run_all(lines, stage)
            runs = {run["method"]: run for each in made for run in each["runs"]}
            self.adapters |= {method: Path(runs[method]["adapter_dir"]) for method in METHODS}
            self.versions = {method: runs[method]["version"] for method in METHODS}
            stage.found(", ".join(f"{method} is {version}" for method, version in self.versions.items()))

    def train_control(self) -> None:
        """The same training on the same answers, the reactions dealt out anew: it must learn nothing."""
        if not self.plan.trains_control:
            return
        with self.story.stage("control", "Train DPO on shuffled feedback, as a control") as stage:
            config = write_control_config(self.home.control, self.plan, self.home.root, self.tuned)
            cli = Commands(config, self.ray)
            cli.run("import", str(self._control_events), "--format", "events", stage=stage)
            dataset = cli.run("curate", "--agent", world.AGENT, stage=stage)
            line = [
                "train",
                "run",
                "--method",
                "dpo",
                "--dataset",
                dataset["dataset_id"],
                "--base",
                str(self.home.base),
            ]
            self.adapters["shuffled"] = Path(cli.run(*line, stage=stage)["adapter_dir"])
            stage.found("measured at the end; it is never registered")

    def evaluate(self) -> None:
        """Every version against the champion, on recorded feedback."""
        with self.story.stage("evaluate", "Evaluate each version against the champion") as stage:
            line = ["evaluate", *(self.versions[m] for m in METHODS), "--against", "champion"]
            self.findings.gates = self.cli.run(*line, stage=stage, accepted=(0, 1))["evaluations"]
            rates = (f"{m} {'passed' if f['passed'] else 'failed'}{_win_rate_text(f)}" for m, f in self._judged())
            stage.found(", ".join(rates))

    def roll_out(self) -> None:
        """Give the best version a growing share of live traffic until it is promoted, or not."""
        chosen = choose(self.findings.gates)
        if chosen is None:
            self.findings.why_not = "no version passed its gates"
            self.story.note("no version passed its gates, so none gets traffic")
            return
        with self.story.stage("canary", f"Roll out {chosen} under live traffic") as stage:
            end = self._rollout(chosen, stage)
            if end["state"] == "promoted":
                self.findings.promoted = chosen
            else:
                self.findings.why_not = f"the rollout of {chosen} ended {end['state']}: {end['reason']}"
            stage.found(f"{end['state']}: {end['reason']}")

    def damage_and_roll_back(self) -> None:
        """A bad adapter reaches users because a person overrides the gates; the guardrails take it back."""
        with self.story.stage("rollback", "Give a damaged adapter a share, against its gates") as stage:
            method = next(m for m, version in self.versions.items() if version == self.findings.promoted)
            folder = damage_adapter(self.adapters[method], self.home.files / "damaged", self.plan.damage)
            made = self.cli.run("register", world.AGENT, str(folder), "--base-model", str(self.home.base), stage=stage)
            damaged = str(made["version"])
            end = self._rollout(damaged, stage, "--override-gates", "--reason", ACT_TWO_REASON)
            self.adapters["damaged"], self.versions["damaged"] = folder, damaged
            if end["state"] == "rolled_back":
                self.findings.rolled_back, self.findings.rolled_back_reason = damaged, end["reason"]
            else:
                self.findings.why_kept = f"the rollout of {damaged} ended {end['state']}: {end['reason']}"
            stage.found(f"{damaged} {end['state']}: {end['reason']}")

    def measure_held_out(self) -> None:
        """Ask every version about alerts that nothing has seen, and compare with the truth."""
        title = f"Ask every version about {self.plan.held_out} alerts that nothing has seen"
        with self.story.stage("held_out", title) as stage:
            prompts, answers = self.home.files / "held_out.jsonl", self.home.files / "answers.jsonl"
            alerts = held_out.write_prompts(prompts, self.plan.seed, self.plan.held_out)
            line = [
                "train",
                "generate",
                "--base",
                str(self.home.base),
                "--prompts",
                str(prompts),
                "--out",
                str(answers),
            ]
            line += [part for folder in self.adapters.values() for part in ("--adapter", str(folder))]
            self.cli.run(*line, "--max-new-tokens", "32", "--with-base", stage=stage)
            texts = _read_answers(answers)
            self.findings.rows = self._rows(lambda folder: held_out.measure(alerts, texts[folder]))
            stage.found(report.outcome(self.findings))

    def write_report(self) -> dict[str, Path]:
        """Summary and report, on disk."""
        self.findings.stages = dict(self.story.seconds)
        if not self.plan.keep_up:
            self.findings.urls = {}
        return report.write(self.findings, self.home.root)

    def close(self) -> None:
        """End what this demo started, and nothing else."""
        if self.traffic is not None and self.traffic.process.poll() is None:
            self.traffic.stop()
        if self.api.url or (self.home.root / "run" / "up.json").exists():
            self.story.note("stopping what was started")
            Commands(self.home.config).run("down")

    # The parts that several stages share

    @property
    def _control_events(self) -> Path:
        return self.home.files / "control_events.jsonl"

    def _start_traffic(self, *arguments: str) -> Traffic:
        plan = self.plan
        line = [
            "--seed",
            str(plan.seed),
            "--users",
            str(plan.users),
            "--concurrency",
            str(plan.concurrency),
            *arguments,
        ]
        if plan.shuffle_feedback:
            line.append("--shuffle-feedback")
        self.traffic = Traffic(self.api, self.home.files, line)
        self.processes.add(self.traffic.process.pid)
        return self.traffic

    def _rollout(self, version: str, stage: Stage, *options: str) -> dict[str, Any]:
        """Start a rollout under live traffic and watch it to its end: its `state` and `reason`."""
        limit = self.plan.rollout_limit_s
        seed = str(self.plan.seed + FRESH_SEEDS + len(self.findings.moments))  # alerts not asked about before
        bounds = ["--seconds", str(2 * limit), "--rate-per-s", str(self.plan.live_rate_per_s), "--seed", seed]
        bounds += ["--alerts-per-session", str(self.plan.live_alerts_per_session)]
        traffic = self._start_traffic(*bounds)
        try:
            started = self.cli.run("rollout", "start", version, "--agent", world.AGENT, *options, stage=stage)
            watch = ["rollout", "watch", started["rollout_id"], "--timeout-s", str(limit)]
            with self.cli.beside(*watch, accepted=(0, 1)) as future:
                self._follow(version, stage, future)
            end = future.result()
            if end["state"] not in ENDED:
                end = self._take_back(end)
            return {"state": end["state"], "reason": end.get("reason") or ""}
        finally:
            traffic.stop()

    def _take_back(self, end: dict[str, Any]) -> dict[str, Any]:
        """Roll back by hand what is undecided, unless it has just been decided."""
        try:
            self.cli.run("rollout", "rollback", end["rollout_id"], "--reason", "undecided when the time was up")
        except JobError:
            return self.cli.run("rollout", "status", end["rollout_id"])
        return {"state": "undecided", "reason": end.get("reason") or "the time was up"}

    def _follow(self, version: str, stage: Stage, watch: "Future[dict[str, Any]]") -> None:
        """Keep what the router says of the share until the rollout is over."""
        while not watch.done():
            time.sleep(POLL_S)
            try:
                found = self.api.get("/agents/status")["data"]
            except UnavailableError as error:
                stage.says(str(error))
                continue
            route = next(r for r in found if r["agent"] == world.AGENT)
            share = route["share"] if route["candidate"] == version else float(route["stable"] == version)
            self.findings.moments.append(Moment(round(self.story.elapsed_s, 2), share, version))
            said = self.traffic.progress() if self.traffic else ""
            stage.says(f"{100 * share:.0f} % of users on {version}; {said}")

    def _judged(self) -> list[tuple[str, dict[str, Any]]]:
        by_version = {version: method for method, version in self.versions.items()}
        return [(by_version[found["version"]], found) for found in self.findings.gates]

    def _rows(self, measure: Any) -> list[Row]:
        """The lines of the table: base, methods, control, promoted, damaged."""
        notes = {
            "sft": "on the same feedback",
            "shuffled": "DPO on shuffled feedback",
            "damaged": "rolled back",
        }
        names = ["base", *METHODS, *[n for n in ("shuffled", "damaged") if n in self.adapters]]
        rows = []
        for name in names:
            version = BASE_VERSION if name == "base" else self.versions.get(name)
            accuracy = measure(str(self.adapters[name]) if name in self.adapters else None)
            rows.append(Row(name, version, accuracy, notes.get(name, "")))
        for row in list(rows):
            if row.version is not None and row.version == self.findings.promoted:
                rows.append(Row("promoted", row.version, row.accuracy, f"it is {row.name}, chosen by its gates"))
        return rows


def _win_rate(found: dict[str, Any]) -> float | None:
    """The win rate of one evaluation, on recorded feedback."""
    return next((gate["value"] for gate in found["gates"] if gate["suite"] == "win_rate"), None)


def _win_rate_text(found: dict[str, Any]) -> str:
    rate = _win_rate(found)
    return "" if rate is None else f" (win rate {rate:.2f})"


def _read_answers(path: Path) -> dict[str | None, list[str]]:
    """Adapter folder (`None` for the base) -> its answers, in the order of the prompts."""
    texts: dict[str | None, list[str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        texts.setdefault(row["adapter"], []).append(row["text"])
    return texts
