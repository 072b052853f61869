"""A store with a model that was trained, measured and judged, made by hand."""

from __future__ import annotations

from pathlib import Path

from posttrain.evaluate.results import (
    Check,
    EvaluationResults,
    Outcome,
    PerplexityCheck,
    Settings,
    TaskResult,
    TaskSettings,
    Verdict,
    Versus,
)
from posttrain.lineage import Graph
from posttrain.registry import Entry, judged_by
from posttrain.stages.program import StageInput, StageJob
from posttrain.store import Artifact, InputRecord
from posttrain.store.files import write_json
from tests.unit.lineage_store import Made, kept, of, source

BASE = "OWNER/tiny@0123456789012345678901234567890123456789"
SETTINGS = Settings(
    lm_eval="0.4.13",
    tasks=(TaskSettings(name="hellaswag", version="1", num_fewshot=0),),
    limit=400,
    seed=0,
    dtype="float32",
    questions_in_chat_template=False,
    chat_template=None,
    perplexity_rows=24,
    perplexity_max_length=1024,
)


def check(base: float, candidate: float, verdict: Outcome = "pass") -> Check:
    difference = candidate - base
    return Check(
        task="hellaswag",
        metric="acc_norm",
        base=base,
        candidate=candidate,
        difference=difference,
        low=difference - 0.015,
        high=difference + 0.015,
        n=400,
        p_worse=0.5,
        mcnemar_p=None,
        smallest_detectable_drop=0.031,
        items_needed=None,
        verdict=verdict,
        sentence=f"hellaswag: {difference:+.3f} on 400 items",
    )


def verdict_of(outcome: Outcome, value: float = 0.44, champion: str | None = None) -> Verdict:
    one = check(0.41, value, outcome)
    beside = None
    if champion is not None:
        two = check(0.42, value, outcome)
        beside = Versus(
            opponent=champion,
            verdict=outcome,
            reasons=("as good as the champion",),
            checks=(two,),
            perplexities=(),
        )
    return Verdict(
        verdict=outcome,
        reasons=(one.sentence,),
        checks=(one,),
        perplexity=PerplexityCheck(
            requirement="must_not_rise",
            base=9.8,
            candidate=5.1,
            difference=0.653,
            low=0.6,
            high=0.7,
            rows=24,
            p_worse=0.0,
            verdict=outcome,
            sentence="perplexity: 9.8 -> 5.1 on 24 rows",
        ),
        max_drop=0.02,
        confidence=0.95,
        champion=beside,
    )


class Judging(Made):
    """A store with models, each measured and judged."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self._base: Artifact | None = None

    def candidate(
        self,
        number: int = 1,
        outcome: Outcome | None = "pass",
        *,
        champion: str | None = None,
        mlflow: str | None = None,
    ) -> Artifact:
        """A merged model of its own; with an outcome, what a gate said of it."""
        dataset = self._told(
            self.dataset(
                [kept(0), kept(1, output=1), kept(2, split="validation")],
                inputs={"rows": source("/home/somebody/chats.jsonl")},
                config={"dataset": "chats", "number": number},
            ),
            details={"rows_in": 4, "train": 2, "validation": 1, "bad": 1},
        )
        base = InputRecord(kind="model", digest="base", source=BASE)
        config = {"optimization": {"learning_rate": 0.0002}, "extra_args": {"hub_token": "hf_s3"}}
        adapter = self.trained(dataset, inputs={"model": base}, config={**config, "seed": number})
        model = self.put(
            "merge",
            "model",
            {"model": of(adapter), "prompts": of(dataset)},
            lambda folder: (folder / "model.safetensors").write_text(f"weights {number}"),
            mlflow=mlflow,
        )
        if outcome is not None:
            self.judge(model, outcome, champion=champion)
        return model

    def judge(
        self, model: Artifact, outcome: Outcome, value: float = 0.44, champion: str | None = None
    ) -> Artifact:
        """The verdict on a model."""
        origin = InputRecord(kind="model", digest="base", source=BASE)
        base = self._base = self._base or self._evaluation(origin, 0.41)
        candidate = self._evaluation(of(model), value)
        verdict = verdict_of(outcome, value, champion)
        return self.put(
            "gate",
            "verdict",
            {"base": of(base), "candidate": of(candidate)},
            verdict.save,
            config={"against": "base", "champion": champion, "value": value, "outcome": outcome},
        )

    def choose(self, models: dict[str, Artifact], choice: str) -> Artifact:
        """The verdict on several candidates, of which one passes."""
        of_each = {name: verdict_of("pass" if name == choice else "fail") for name in models}
        verdict = of_each[choice].model_copy(update={"candidates": of_each, "choice": choice})
        inputs = {
            f"candidate:{name}": of(self._evaluation(of(one), 0.44)) for name, one in models.items()
        }
        config = {"candidates": list(models)}
        return self.put("gate", "verdict", inputs, verdict.save, config=config)

    def _evaluation(self, model: InputRecord, value: float) -> Artifact:
        task = TaskResult(
            task="hellaswag",
            metric="acc_norm",
            value=value,
            standard_error=0.0248,
            n=400,
            higher_is_better=True,
            metrics={"acc_norm": value},
            groups={},
        )
        results = EvaluationResults(
            tasks=(task,),
            perplexity=None,
            settings=SETTINGS,
            settings_digest=SETTINGS.digest,
        )

        def write(folder: Path) -> None:
            results.save(folder)
            (folder / "items").write_text(model.digest)

        config = {"value": value}
        made = self.put("evaluate", "evaluation", {"model": model}, write, config=config)
        return self._told(made, metrics={"hellaswag": value})

    def _told(self, artifact: Artifact, **facts: object) -> Artifact:
        """The artifact with more in its manifest."""
        manifest = artifact.manifest.model_copy(update=facts)
        write_json(artifact.path / "manifest.json", manifest.model_dump(mode="json"))
        return artifact.model_copy(update={"manifest": manifest})

    def entry(self, model: Artifact) -> Entry:
        """What is registered of a model."""
        graph = Graph.read(self.store)
        return Entry.of(graph, model, judged_by(graph, model))


def stage_dir(
    home: Path, config: dict[str, object], inputs: dict[str, Artifact], name: str = "0" * 64
) -> Path:
    """A work folder of `register`, ready to run."""
    folder = home / "store" / "work" / name
    (folder / "output").mkdir(parents=True)
    job = StageJob(
        stage="register",
        name="register",
        config=config,
        inputs={
            key: StageInput(kind=made.kind, path=str(made.path), digest=made.digest)
            for key, made in inputs.items()
        },
    )
    write_json(folder / "stage.json", job.model_dump(mode="json"))
    return folder
