"""Stages that measure models, decide on them, and register the one that passed."""

from __future__ import annotations

from pathlib import Path

from posttrain.ancestry import Ancestry
from posttrain.benchmarks import identify_benchmarks
from posttrain.building.data import DataSteps
from posttrain.building.layout import BASE, Evaluation
from posttrain.errors import ModelError
from posttrain.hardware import resolve_dtype
from posttrain.model_reference import resolve_model
from posttrain.pipeline import Code, Input, Output
from posttrain.recipe import (
    EvaluateConfig,
    GateConfig,
    JudgeConfig,
    OnlineConfig,
    RegisterConfig,
    TrainingConfig,
)
from posttrain.recipe.evaluate import OTHER
from posttrain.recipe.gate import CANDIDATE, COMPARISON, TRAINED, WATCH
from posttrain.recipe.judge import JUDGE, OPPONENT, RATINGS, By
from posttrain.recipe.register import CHOICE, VERDICT
from posttrain.recipe.test_sets import TESTS


class JudgingSteps(DataSteps):
    """Adds evaluate, judge, gate and register."""

    def _add_evaluate(self, where: str, config: EvaluateConfig) -> None:
        candidate = self._model(f"{where}.model", config.model)
        name = config.dataset or self.last_dataset
        if not config.tasks and not config.test_sets and name is None:
            fix = "name `tasks`, `test_sets`, or a `dataset` for perplexity"
            self._problem(where, "has nothing to measure", fix)
            return
        config = config.model_copy(update={"dtype": resolve_dtype(config.dtype)})
        inputs = self._measured(where, config, name)
        if inputs is None:
            return
        if candidate == self.base:
            base = self._add("evaluate", config, {"model": self.base, **inputs})
            self.evaluations[base.step] = Evaluation(base, base, candidate)
            return
        base = self._evaluate_again(config, self.base, inputs, "base")
        output = self._add("evaluate", config, {"model": candidate, **inputs})
        self.evaluations[output.step] = Evaluation(base, output, candidate)

    def _measured(
        self, where: str, config: EvaluateConfig, dataset: str | None
    ) -> dict[str, Input] | None:
        """What an evaluation reads besides the model; None where some of it is not there."""
        inputs: dict[str, Input | None] = {}
        if config.tasks:
            inputs["benchmarks"] = identify_benchmarks(
                config.tasks, config.task_folders, config.offline_root, self.digests
            )
        if dataset is not None:
            inputs["dataset"] = self._prepare(f"{where}.dataset", dataset)
        for other in config.other_datasets:
            inputs[OTHER + other] = self._prepare(f"{where}.other_datasets", other)
        for position, tests in enumerate(config.test_sets):
            there = f"{where}.test_sets[{position}].dataset"
            inputs[TESTS + tests.dataset] = self._tests(there, tests.dataset)
        found = {name: value for name, value in inputs.items() if value is not None}
        return found if len(found) == len(inputs) else None

    def _tests(self, where: str, dataset: str) -> Input | None:
        """Rows to be asked: the held-out ones of what is trained on, else all as they are."""
        trained = {
            name
            for stage in self.recipe.stages
            if isinstance(stage, TrainingConfig)
            for name in (stage.dataset, *self.recipe.made_of(stage.dataset))
        }
        if dataset in trained or dataset in self.prepared:
            return self._prepare(where, dataset)
        return self._dataset(where, dataset)

    def _evaluate_again(
        self, config: EvaluateConfig, model: Input, inputs: dict[str, Input], suffix: str
    ) -> Output:
        """Another model's numbers, measured once for all that is compared with them."""
        config = config.model_copy(update={"model": None})
        inputs = {"model": model, **inputs}
        for other in self.steps:
            same = other.config.model_copy(update={"name": config.name}) == config
            if same and other.inputs == inputs:
                return other.output
        return self._add("evaluate", config, inputs, suffix=suffix)

    def _add_judge(self, where: str, config: JudgeConfig) -> None:
        model = self._model(f"{where}.model", config.model)
        opponent = self._model(f"{where}.against", config.against)
        name = config.dataset or self.last_dataset
        if model == opponent:
            fix = "put it after a stage that trains, or name another model as `against`"
            self._problem(where, "would compare a model with itself", fix)
        elif name is None:
            self._problem(where, "has no prompts to ask", "name a `dataset`")
        elif (dataset := self._prepare(f"{where}.dataset", name)) is not None:
            named = model.step if isinstance(model, Output) else config.model
            update = {"dtype": resolve_dtype(config.dtype), "model": named}
            config = config.model_copy(update=update)
            inputs = {"model": model, OPPONENT: opponent, "dataset": dataset}
            inputs |= self._judges(where, config.by)
            self.comparisons[self._add("judge", config, inputs).step] = model

    def _judges(self, where: str, by: By) -> dict[str, Input]:
        """The model that compares, or the sheets that people filled in."""
        inputs: dict[str, Input] = {}
        if by.model is not None:
            judge = self._judging_model(f"{where}.by.model", by.model.model)
            inputs = {JUDGE: judge} if judge is not None else {}
        elif by.reward is not None:
            name = by.reward.reward
            if name in self.rewards:
                inputs[JUDGE] = self.rewards[name]
            else:
                known = ", ".join(self.rewards) or "none"
                fix = f"reward stages before it: {known}"
                self._problem(f"{where}.by.reward", f"no stage before it is `{name}`", fix)
        elif by.people is not None:
            for number, path in enumerate(by.people.ratings):
                if Path(path).is_file():
                    inputs[f"{RATINGS}{number}"] = Code(path, self.digests.file_digest(Path(path)))
                else:
                    fix = "name the filled sheets; leave `ratings` out until there are some"
                    there = f"{where}.by.people.ratings[{number}]"
                    self._problem(there, f"there is no file `{path}`", fix)
        return inputs

    def _judging_model(self, where: str, name: str) -> Input | None:
        """A model of the recipe, or one of its own."""
        if name in (BASE, *self.models):
            return self._model(where, name)
        fix = f"stages with a model: {', '.join([BASE, *self.models])}"
        try:
            judge = resolve_model(name, self.digests)
        except ModelError as error:
            self._problem(where, str(error), fix)
            return None
        if judge.kind == "gguf":
            message = f"`{name}` is a GGUF file, which only a recipe's own `model` may be"
            self._problem(where, message, f"name a model folder or a Hub id; {fix}")
            return None
        return judge

    def _add_gate(self, where: str, config: GateConfig) -> None:
        if not self.evaluations:
            fix = "put `- evaluate: {tasks: [...]}` before it"
            self._problem(where, "has no numbers to decide on", fix)
            return
        named = {"candidates": config.candidates, "against": (config.against,)}
        unknown = [
            (key, name)
            for key, names in named.items()
            for name in names
            if name not in self.evaluations and (key, name) != ("against", "base")
        ]
        for key, name in unknown:
            fix = f"evaluations before it: {', '.join(self.evaluations)}"
            self._problem(f"{where}.{key}", f"no evaluation before it is `{name}`", fix)
        if unknown:
            return
        judged = [self.evaluations[name] for name in config.candidates or [*self.evaluations][-1:]]
        bases = {self._compared_with(config, one) for one in judged}
        if bases & {one.candidate for one in judged}:
            fix = "put the gate after a stage that trains"
            whom = "the base model" if config.against == "base" else f"`{config.against}`"
            self._problem(where, f"would compare {whom} with itself", fix)
        elif len(bases) > 1:
            fix = "give their `evaluate` stages the same settings"
            self._problem(f"{where}.candidates", "are not measured alike", fix)
        elif not self._asks_too_much(where, config, judged):
            output = self._add_decision(config, judged)
            self.verdicts[output.step] = judged

    def _asks_too_much(self, where: str, config: GateConfig, judged: list[Evaluation]) -> bool:
        """Whether the gate asks for what is not measured; reports it."""
        measured = self._step(judged[0].candidate).config
        assert isinstance(measured, EvaluateConfig)
        known = measured.names()
        asked = {"must_improve": config.must_improve, "max_drops": tuple(config.max_drops)}
        problems = [
            (f"{where}.{key}", f"no task `{name}` is evaluated", f"there are: {', '.join(known)}")
            for key, names in asked.items()
            for name in names
            if name not in known
        ]
        for one in judged:
            judges = [judge for judge, model in self.comparisons.items() if model == one.model]
            if len(judges) > 1:
                message = f"{' and '.join(judges)} judge one model, and the gate looks at one judge"
                problems.append((where, message, "put all but one of them behind the gate"))
        for problem in problems:
            self._problem(*problem)
        return bool(problems)

    def _compared_with(self, config: GateConfig, one: Evaluation) -> Output:
        return one.base if config.against == "base" else self.evaluations[config.against].candidate

    def _add_decision(self, config: GateConfig, judged: list[Evaluation]) -> Output:
        """The gate, and before it the champion's numbers on the same items."""
        inputs = self._gate_inputs(config, judged)
        name = config.champion or next(
            (stage.name for stage in self.recipe.stages if isinstance(stage, RegisterConfig)), None
        )
        champion = self.champions.get(name) if name else None
        if champion is None or config.against_champion == "ignore":
            return self._add("gate", config.model_copy(update={"champion": None}), inputs)
        measured = self._step(judged[0].candidate)
        others = {key: value for key, value in measured.inputs.items() if key != "model"}
        assert isinstance(measured.config, EvaluateConfig)
        inputs["champion"] = self._evaluate_again(
            measured.config, champion.artifact, others, "champion"
        )
        return self._add("gate", config.model_copy(update={"champion": name}), inputs)

    def _gate_inputs(self, config: GateConfig, judged: list[Evaluation]) -> dict[str, Input]:
        """The evaluations and comparisons, and what was seen while the candidates were trained."""
        inputs: dict[str, Input] = {"base": self._compared_with(config, judged[0])}
        ancestry = Ancestry(self.steps)
        for one in judged:
            several = bool(config.candidates)
            name = one.candidate.step
            inputs[f"{CANDIDATE}{name}" if several else "candidate"] = one.candidate
            for judge, model in self.comparisons.items():
                if model == one.model:
                    key = f"{COMPARISON}:{name}" if several else COMPARISON
                    inputs[key] = self._step_output(judge)
            watch = f"{WATCH}{name}:" if several else WATCH
            for step in ancestry.trained_by(one.model):
                inputs[f"{TRAINED}{step.name}"] = step.output
                if isinstance(step.config, OnlineConfig):
                    inputs[f"{watch}{step.name}"] = step.output
        return inputs

    def _add_register(self, where: str, config: RegisterConfig) -> None:
        if not self.verdicts:
            fix = (
                "put `- gate: {}` before it, after an `evaluate`; or register by hand: "
                "`posttrain registry add MODEL --name NAME --override REASON`"
            )
            self._problem(where, "would register a model that no gate has passed", fix)
            return
        gate, judged = [*self.verdicts.items()][-1]
        if config.model is not None:
            named = self._model(f"{where}.model", config.model)
            judged = [one for one in judged if one.model == named]
        if not judged:
            fix = "evaluate it and put a gate before this stage, or name a model that was judged"
            message = f"`{gate}` has not judged the model of `{config.model}`"
            self._problem(f"{where}.model", message, fix)
        elif any(_is_adapter(one.model) for one in judged):
            fix = "put `- merge: {}` before the evaluation"
            self._problem(where, "needs complete weights, and this is an adapter", fix)
        else:
            inputs: dict[str, Input] = {VERDICT: self._step_output(gate)}
            for one in judged:
                name = "model" if len(judged) == 1 else f"{CHOICE}{one.candidate.step}"
                inputs[name] = one.model
            licenses = {name: spec.license for name, spec in self.recipe.datasets.items()}
            stated = {name: license for name, license in licenses.items() if license}
            self._add("register", config.model_copy(update={"licenses": stated}), inputs)


def _is_adapter(model: Input) -> bool:
    return isinstance(model, Output) and model.kind == "adapter"
