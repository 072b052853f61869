"""From a situation to advice: the rules that hold, merged by priority."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from posttrain.advisor.conditions import (
    TRAINING_STAGES,
    Base,
    Comparison,
    Decided,
    Instead,
    Tasks,
    Trains,
    fill,
)
from posttrain.advisor.memory import Weights
from posttrain.advisor.rules import EARLY, Decision, Rule, Scalar, Source, load_rules
from posttrain.advisor.situation import Situation
from posttrain.recipe.adapters import LoraConfig

_MOST_ALTERNATIVES = 5
_MOST_FAILURES = 2
"""Comparisons that may fail in a rule for its method to be a runner-up."""

_NAMES = {
    ("instead", "prompting"): "Few-shot prompting",
    ("instead", "retrieval"): "Retrieval (RAG)",
    ("preferences", "dpo"): "DPO",
    ("preferences", "ppo"): "Reward model and PPO",
    ("preferences", "orpo"): "ORPO",
    ("preferences", "kto"): "KTO",
    ("trains", "all"): "Full fine-tuning",
    ("trains", "adapter"): "LoRA",
    ("pretrain_trains", "all"): "Continued pretraining of all weights",
    ("pretrain_trains", "adapter"): "Continued pretraining by LoRA",
    ("base", "unquantized"): "LoRA on unquantized weights",
    ("base", "4bit"): "QLoRA",
    ("together", "mix"): "A multi-task mix",
    ("together", "adapters"): "An adapter for each task",
}
_STAGE_NAMES = {
    "pretrain": "continued pretraining",
    "sft": "SFT",
    "reward": "a reward model",
    "ppo": "PPO",
    "dpo": "DPO",
    "orpo": "ORPO",
    "kto": "KTO",
}


@dataclass(frozen=True)
class Note:
    """One sentence of advice, with the rule and the sources that it comes from."""

    rule: str
    text: str
    sources: tuple[Source, ...]


@dataclass(frozen=True)
class Setting:
    """A number to begin with."""

    key: str
    """Recipe key by stage, such as `sft.adapter.rank`."""
    value: Scalar
    rule: str

    @property
    def stage(self) -> str:
        """The stage whose key it is."""
        return self.key.partition(".")[0]

    @property
    def name(self) -> str:
        """The last part of the key, in words."""
        return self.key.rpartition(".")[2].replace("_", " ")


@dataclass(frozen=True)
class Alternative:
    """A runner-up, and what would make it the better choice."""

    name: str
    right_if: str
    rule: str


@dataclass(frozen=True)
class Advice:
    """What to do in a situation, and why."""

    situation: Situation
    stages: tuple[str, ...]
    """Training stages in order, those that posttrain lacks included; empty: do not train yet."""
    weights: Weights | None
    """What SFT and the stages after it train; None without training."""
    pretrain_weights: Weights | None
    """What continued pretraining trains; None without it."""
    instead: Instead | None
    """What to do before any training."""
    together: Tasks | None
    """How several tasks are taught."""
    replay: bool
    """Whether general chats are mixed into SFT."""
    merge: bool
    """Whether adapters are merged before deployment."""
    reasons: tuple[Note, ...]
    settings: tuple[Setting, ...]
    watch: tuple[Note, ...]
    alternatives: tuple[Alternative, ...]

    @property
    def title(self) -> str:
        """The method in a line."""
        if self.instead is not None:
            return f"{_NAMES['instead', self.instead]} first; no training yet"
        parts = [self._stage_title(stage) for stage in self.stages]
        line = ", then ".join(parts)
        if self.together == "mix":
            line += f", on a mix of {self.situation.tasks} tasks"
        elif self.together == "adapters":
            line += f", an adapter for each of {self.situation.tasks} tasks"
        return line[0].upper() + line[1:]

    def setting(self, key: str) -> Scalar | None:
        """Value of a key, where a rule sets it."""
        return next((one.value for one in self.settings if one.key == key), None)

    def _stage_title(self, stage: str) -> str:
        weights = self.pretrain_weights if stage == "pretrain" else self.weights
        if weights == "full":
            return f"{_STAGE_NAMES[stage]} of all weights"
        rank = self.setting(f"{stage}.adapter.rank") or LoraConfig().rank
        how = {"lora": "LoRA", "qlora": "QLoRA"}[weights or "lora"]
        return f"{_STAGE_NAMES[stage]} by {how} of rank {rank}"


def advise(situation: Situation, rules: Sequence[Rule] | None = None) -> Advice:
    """Method, settings, reasons and runners-up for a situation.

    Args:
        situation: data, goals and hardware.
        rules: what to go by. Default: those in `rules.yaml`.
    """
    rules = load_rules() if rules is None else rules
    holding = [rule for rule in rules if _holds(rule, situation, {})]
    early = _decide(rule for rule in holding if not _is_late(rule))
    stages = _stages(early)
    known: dict[str, Decided] = {**_relevant(early, stages), "stages": frozenset(stages)}
    rules_now = [rule for rule in rules if _holds(rule, situation, known)]
    choice = _decide(rules_now)
    settings = _settings(rules_now, stages, choice)
    counted = [rule for rule in rules_now if _counts(rule, choice, settings, stages)]
    return Advice(
        situation=situation,
        stages=stages,
        weights=_weights(choice.trains, choice.base) if stages else None,
        pretrain_weights=_weights(choice.pretrain_trains, choice.base)
        if "pretrain" in stages
        else None,
        instead=None if stages else choice.instead,
        together=choice.together if stages else None,
        replay=bool(choice.replay),
        merge=bool(choice.merge),
        reasons=tuple(_note(rule, rule.why, situation) for rule in counted if rule.why),
        settings=settings,
        watch=tuple(_note(rule, rule.watch, situation) for rule in counted if rule.watch),
        alternatives=_alternatives(rules, counted, choice, stages, situation),
    )


def _is_late(rule: Rule) -> bool:
    return any(comparison.late for comparison in rule.when)


def _holds(rule: Rule, situation: Situation, decided: Mapping[str, Decided]) -> bool:
    return all(comparison.holds(situation, decided) for comparison in rule.when)


def _decide(rules: Iterator[Rule] | Sequence[Rule]) -> Decision:
    """For each key the value of the rule with the highest priority; of equal ones the first."""
    best: dict[str, tuple[int, Decided]] = {}
    for rule in rules:
        for key, value in rule.decides.choices.items():
            if key not in best or rule.priority > best[key][0]:
                best[key] = (rule.priority, value)
    return Decision.model_validate({key: value for key, (_, value) in best.items()})


def _stages(decision: Decision) -> tuple[str, ...]:
    wanted = {
        "pretrain": bool(decision.pretrain),
        # ORPO learns the demonstrations itself, from the base.
        "sft": bool(decision.sft) and decision.preferences != "orpo",
        "reward": decision.preferences == "ppo",
    }
    return tuple(
        stage for stage in TRAINING_STAGES if wanted.get(stage, decision.preferences == stage)
    )


def _relevant(decision: Decision, stages: tuple[str, ...]) -> dict[str, Decided]:
    """What later rules may ask for: nothing about training where there is none."""
    if not stages:
        return {}
    choices = decision.choices
    return choices if "pretrain" in stages else {**choices, "pretrain_trains": ""}


def _weights(trains: Trains | None, base: Base | None) -> Weights:
    if trains == "all":
        return "full"
    return "qlora" if base == "4bit" else "lora"


def _settings(
    rules: Sequence[Rule], stages: tuple[str, ...], choice: Decision
) -> tuple[Setting, ...]:
    """Of each key the strongest rule's value, for the stages that there are."""
    best: dict[str, tuple[int, Setting]] = {}
    for rule in rules:
        for key, value in rule.decides.settings.items():
            if key not in best or rule.priority > best[key][0]:
                best[key] = (rule.priority, Setting(key, value, rule.id))
    order = ("prepare", *stages) if stages else ()
    kept = [one for _, one in best.values() if one.stage in order and _applies(one, choice)]
    return tuple(sorted(kept, key=lambda one: (order.index(one.stage), one.key)))


def _applies(setting: Setting, choice: Decision) -> bool:
    """Whether there is an adapter to set a rank of."""
    trains = choice.pretrain_trains if setting.stage == "pretrain" else choice.trains
    return trains == "adapter" or ".adapter." not in setting.key


def _counts(
    rule: Rule, choice: Decision, settings: tuple[Setting, ...], stages: tuple[str, ...]
) -> bool:
    """Whether a rule that holds has a part in the advice: it agrees with what was chosen."""
    chosen = choice.choices
    about = rule.decides.choices
    # Where nothing is trained, only what to do instead is of use.
    if bool(stages) == ("instead" in about):
        return False
    if any(chosen.get(key) != value for key, value in about.items()):
        return False
    if "base" in about and not _has_adapter(choice, stages):
        return False
    if about.get("sft") and not {"sft", "pretrain"} & set(stages):
        return False
    if rule.decides.settings and not about:
        return any(setting.rule == rule.id for setting in settings)
    return True


def _has_adapter(choice: Decision, stages: tuple[str, ...]) -> bool:
    later = any(stage != "pretrain" for stage in stages)
    return ("pretrain" in stages and choice.pretrain_trains == "adapter") or (
        later and choice.trains == "adapter"
    )


def _note(rule: Rule, text: str, situation: Situation) -> Note:
    return Note(rule.id, fill(text, situation), rule.sources)


def _alternatives(
    rules: Sequence[Rule],
    counted: Sequence[Rule],
    choice: Decision,
    stages: tuple[str, ...],
    situation: Situation,
) -> tuple[Alternative, ...]:
    """What rules name themselves, then methods that lost, then those that nearly hold."""
    named = [
        Alternative(other.name, fill(other.right_if, situation), rule.id)
        for rule in counted
        for other in rule.instead_of_it
    ]
    lost = _runners_up(rules, choice, stages, situation) if stages else []
    unique: dict[str, Alternative] = {}
    for alternative in [*named, *(one for _, one in sorted(lost, key=lambda pair: pair[0]))]:
        unique.setdefault(alternative.name, alternative)
    return tuple(unique.values())[:_MOST_ALTERNATIVES]


def _runners_up(
    rules: Sequence[Rule], choice: Decision, stages: tuple[str, ...], situation: Situation
) -> list[tuple[tuple[int, int], Alternative]]:
    """Rules that decide otherwise, by how many of their comparisons fail."""
    found = []
    for rule in rules:
        for key, value in rule.decides.choices.items():
            name = _NAMES.get((key, str(value)))
            if name is None or key not in EARLY or not _differs(key, value, choice, stages):
                continue
            failed = [one for one in rule.when if not one.holds(situation, {})]
            if len(failed) > _MOST_FAILURES or any(_is_far(one, situation) for one in failed):
                continue
            wishes = " and ".join(one.wish(situation) for one in failed)
            right_if = wishes or fill(rule.right_if, situation)
            if right_if:
                rank = (len(failed), -rule.priority)
                found.append((rank, Alternative(name, right_if, rule.id)))
    return found


def _is_far(failed: Comparison, situation: Situation) -> bool:
    """Whether another goal would be needed, or data of a kind that there is none of."""
    have = getattr(situation, failed.term, None)
    return failed.term == "goals" or (have == 0 and not isinstance(have, bool))


def _differs(key: str, value: Decided, choice: Decision, stages: tuple[str, ...]) -> bool:
    """Whether a rule speaks of something that was decided, and otherwise."""
    if key == "instead":
        return False
    if key == "base" and not _has_adapter(choice, stages):
        return False
    chosen = choice.choices.get(key)
    return chosen is not None and chosen != value


def weights_of(advice: Advice) -> tuple[Weights, ...]:
    """What each of the training stages trains, in their order."""
    return tuple(
        cast(Weights, advice.pretrain_weights if stage == "pretrain" else advice.weights)
        for stage in advice.stages
    )
