"""`posttrain data preferences`: pairs from a model's own answers, and from people."""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from posttrain.terminal import make_console

if TYPE_CHECKING:
    from posttrain.preferences.agreement import PairAgreement, Share
    from posttrain.preferences.pair_files import PairsRecord
    from posttrain.preferences.pairing import Lengths, PairReport, PairSettings
    from posttrain.preferences.rated import RatedReport
    from posttrain.preferences.sampling import Progress, Sampling

app = typer.Typer(
    help="Make preference data: sample pairs from a model, or have people rate answers blind.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

_SECONDS_BETWEEN_LINES = 10.0

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of what is drawn.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is at --out.")]


@app.command()
def sample(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Model folder, Hub id, gguf:FILE, package:NAME, or a model or adapter in the "
            "store: STAGE, digits.",
        ),
    ],
    prompts: Annotated[
        list[str],
        typer.Option(
            "--prompts",
            metavar="FILE|DATASET",
            help="Rows of any format, a .txt file with a prompt a line, a .jsonl file with "
            "`prompt` or `messages`, or a dataset in the store. May be given several times.",
        ),
    ],
    reward: Annotated[
        str,
        typer.Option(
            "--reward",
            metavar="REWARD",
            help="What scores the answers: a reward model in the store (STAGE, digits), its "
            "folder, or FILE.py:NAME, a function of prompts, answers and references.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Pairs to write, .jsonl.")],
    adapter: Annotated[
        str | None,
        typer.Option("--adapter", metavar="NAME", help="Adapter on MODEL: a folder, STAGE, digits"),
    ] = None,
    answers: Annotated[int, typer.Option(min=2, help="Answers to each prompt.")] = 4,
    temperature: Annotated[
        float, typer.Option(min=0.01, help="Tokens are drawn from softmax(logits / temperature).")
    ] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 128,
    max_prompt_tokens: Annotated[
        int, typer.Option(min=1, help="Longer prompts are left out.")
    ] = 1024,
    seed: Seed = 0,
    limit: Annotated[int | None, typer.Option(min=1, help="Use the first prompts only.")] = None,
    pairs: Annotated[
        Literal["best-worst", "all", "adjacent"],
        typer.Option(help="Which two of a prompt's answers make a pair."),
    ] = "best-worst",
    min_margin: Annotated[
        float, typer.Option(min=0.0, help="Leave out pairs whose scores differ by less.")
    ] = 0.0,
    batch_size: Annotated[int, typer.Option(min=1, help="Answers written at once.")] = 32,
    backend: Annotated[
        Literal["transformers", "vllm"], typer.Option(help="What writes the answers.")
    ] = "transformers",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Sample answers from MODEL, score them, and write pairs of a better and a worse one.

    Answers are kept beside the pairs as they come: a run that was stopped goes on with the same
    command, and other pairs of the same answers need no sampling.
    """
    from posttrain.preferences.pairing import PairSettings
    from posttrain.preferences.sampling import Sampling
    from posttrain.recipe.online import Rollout

    _check_free(out, overwrite)
    rollout = Rollout(
        temperature=temperature,
        max_prompt_tokens=max_prompt_tokens,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        backend=backend,
    )
    sampling = Sampling(rollout, answers, seed)
    pairing = PairSettings(choose=pairs, min_margin=min_margin)
    with _alone(out):
        record = _sample(
            (model, adapter), prompts, limit, reward, sampling, pairing, out, overwrite
        )
    if as_json:
        typer.echo(json.dumps({"out": str(out), **record.model_dump(mode="json")}, indent=2))
    else:
        _show_pairs(record.report, out)


@app.command()
def sheet(
    source: Annotated[
        str,
        typer.Argument(
            metavar="PAIRS|ANSWERS",
            help="Rows with `chosen` and `rejected`, or with a `prompt` and several `answers`.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="New folder to write.")],
    raters: Annotated[int, typer.Option(min=1, max=99, help="People who rate.")] = 2,
    overlap: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of the items that every rater gets.")
    ] = 0.3,
    sheet_format: Annotated[
        Literal["csv", "html"],
        typer.Option("--format", help="A CSV file for a spreadsheet, or a page for a browser."),
    ] = "html",
    question: Annotated[str, typer.Option(metavar="TEXT", help="What the raters are asked.")] = (
        "Which answer is better?"
    ),
    seed: Seed = 0,
    limit: Annotated[int | None, typer.Option(min=1, help="Use the first rows only.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write a blind sheet for each rater, and apart from them the key that undoes the blinding."""
    from posttrain.errors import UsageError
    from posttrain.preferences.items import read_items
    from posttrain.preferences.sheets import make_key, write_sheets

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"--out {out}: is not empty; name a new folder")
    items, left_out = read_items(source, limit, seed)
    written = write_sheets(out, make_key(items, raters, overlap, seed, question), sheet_format)
    orders = written.key.orders
    shared = sum(all(name in given for given in orders.values()) for name in written.key.items)
    if as_json:
        files = {rater: str(path) for rater, path in written.files.items()}
        counts = {"items": len(items), "shared": shared, "left_out": left_out}
        given = {rater: len(orders[rater]) for rater in orders}
        typer.echo(json.dumps({**counts, "given": given, "files": files}, indent=2))
        return
    console = make_console(width=140)
    for rater, path in written.files.items():
        console.print(f"{path}  {len(orders[rater]):,} items for {rater}")
    console.print(f"{out / 'key.json'}  the key: keep it, and hand it to no rater")
    console.print(f"\n{len(items):,} items, {shared:,} of them for every rater", style="bold")
    if left_out:
        console.print(f"{left_out:,} rows left out: no two unlike answers")
    if written.too_long:
        text = f"{written.too_long:,} items are longer than a spreadsheet's cell; use --format html"
        console.print(f"warning: {text}", style="yellow")
    console.print(
        f"Then: posttrain data preferences read {out} FILLED.csv ... --out rated.jsonl", style="dim"
    )


@app.command()
def read(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder that `sheet` wrote, with the key.")
    ],
    rated: Annotated[
        list[Path], typer.Argument(metavar="RATED...", help="Filled sheets, in any order.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Pairs to write, .jsonl.")],
    disagreement: Annotated[
        Literal["majority", "drop"],
        typer.Option(help="Where raters disagree: keep what most say, or leave the item out."),
    ] = "majority",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Read filled sheets back: a preference dataset, and how far the raters agree."""
    from posttrain.preferences.filled import read_ratings
    from posttrain.preferences.key import read_key
    from posttrain.preferences.rated import write_rated

    _check_free(out, overwrite)
    key = read_key(folder)
    report = write_rated(out, key, read_ratings(rated, key), disagreement)
    if as_json:
        typer.echo(json.dumps({"out": str(out), **report.model_dump(mode="json")}, indent=2))
    else:
        _show_ratings(report, out)


# Sampling


def _sample(
    names: tuple[str, str | None],
    prompts: Sequence[str],
    limit: int | None,
    reward_name: str,
    sampling: Sampling,
    pairing: PairSettings,
    out: Path,
    overwrite: bool,
) -> PairsRecord:
    """Answers, scores, pairs; each mistake on the command line before the first answer."""
    from posttrain.console import observer
    from posttrain.home import Home
    from posttrain.preferences.answers import AnswerFile
    from posttrain.preferences.pair_files import answers_file, write_pairs
    from posttrain.preferences.pairing import make_pairs
    from posttrain.preferences.prompts import read_prompt_rows
    from posttrain.preferences.sources import find_policy, find_reward

    store = Home.find().store
    reward = find_reward(reward_name, store)
    rows = read_prompt_rows(prompts, store, limit)
    model = find_policy(*names, store, observer(make_console(stderr=True, width=140)))
    for source in (model, reward):
        if source.doubt is not None:
            typer.echo(f"warning: {source.doubt}", err=True)
    file = AnswerFile(answers_file(out), sampling.digest(model, rows))
    file.check(overwrite)
    tell = _teller()
    _prepare_libraries()
    from posttrain.preferences.sampling import encode, load_scorer, sample, score

    if reward.function is not None:
        load_scorer(reward, sampling.dtype)  # a mistake in it is found before anything is asked
    asked, too_long = encode(model, rows, sampling)
    sets = sample(model, asked, sampling, file, tell)
    scores = score(reward, asked, sets, sampling.dtype, tell)
    pairs, report = make_pairs(sets, scores, pairing, too_long)
    return write_pairs(out, pairs, report, model, reward, prompts, sampling, pairing)


def _prepare_libraries() -> None:
    import logging
    import os

    # Libraries read it on import; what bitsandbytes misses is for 4-bit weights alone.
    os.environ.setdefault("TQDM_DISABLE", "1")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from posttrain.train.processes import prepare_libraries

    prepare_libraries()


def _teller() -> Progress:
    """A line at once, every few seconds and when something is done, on standard error."""
    start = time.monotonic()
    last = -math.inf

    def tell(what: str, done: int, of: int) -> None:
        nonlocal last
        now = time.monotonic()
        if done == of or now - last >= _SECONDS_BETWEEN_LINES:
            last = now
            typer.echo(f"{what}: {done:,} of {of:,} ({now - start:.0f} s)", err=True)

    return tell


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Two runs of one target wait for each other."""
    from posttrain.store.locks import exclusive

    # A lock file stays for good, and nobody wants one beside the data.
    name = hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:16]
    lock = Path(tempfile.gettempdir()) / f"posttrain-{name}.lock"
    with exclusive(lock, lambda: typer.echo("waiting for another run ...", err=True)):
        yield


def _check_free(out: Path, overwrite: bool) -> None:
    from posttrain.errors import UsageError

    if not out.name.endswith(".jsonl"):
        raise UsageError(f"--out {out}: write a name that ends with .jsonl")
    if out.exists() and not overwrite:
        raise UsageError(f"--out {out}: is there already; add --overwrite to replace it")


# Showing


def _show_pairs(report: PairReport, out: Path) -> None:
    from rich.table import Table

    from posttrain.preferences.pair_files import answers_file, record_file
    from posttrain.preferences.pairing import remarks

    counts = report.counts
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(justify="right")
    table.add_column()
    distinct = counts.answers - counts.answers_blank - counts.answers_repeated
    lines = [
        (counts.prompts, "prompts"),
        (counts.prompts_too_long, "prompts left out: none in the row, or too long"),
        (counts.answers, "answers"),
        (distinct, "answers that are distinct and not blank"),
        (counts.answers_cut, "answers cut off at the longest length"),
        (counts.prompts_one_answer, "prompts without two distinct answers"),
        (counts.pairs_tied, "pairs left out: equal scores"),
        (counts.pairs_close, "pairs left out: margin too small"),
        (counts.pairs, "pairs"),
    ]
    always = ("prompts", "answers", "pairs")
    for count, text in lines:
        if count or text in always:
            table.add_row(f"{count:,}", text, style="bold" if text == "pairs" else "")
    console = make_console(width=140)
    console.print(table)
    if report.lengths is not None:
        console.print()
        for line in _numbers(report, report.lengths):
            console.print(line)
    for remark in remarks(report):
        console.print(f"warning: {remark}", style="yellow")
    console.print(f"\n{out}  the pairs; {record_file(out).name}: what made them")
    console.print(f"{answers_file(out)}  all answers", style="dim")


def _numbers(report: PairReport, lengths: Lengths) -> list[str]:
    """Margins, scores and lengths, a line each."""
    margins = ", ".join(f"{name} {_number(value)}" for name, value in report.margins.items())
    scores = f"chosen {_number(report.mean_chosen)}, rejected {_number(report.mean_rejected)}"
    longer = lengths.longer_chosen
    wins = f"; the longer one wins in {_share(longer)} of {longer.of:,}" if longer else ""
    return [
        f"margin       {margins}",
        f"mean score   {scores}",
        f"mean tokens  chosen {lengths.chosen:.1f}, rejected {lengths.rejected:.1f}{wins}",
    ]


def _show_ratings(report: RatedReport, out: Path) -> None:
    from posttrain.preferences.rated import remarks

    console = make_console(width=140)
    counts = report.counts
    rest = {
        "ties": counts.ties,
        "skipped": counts.skipped,
        "disagreed": counts.disagreed,
        "not rated": counts.unrated,
    }
    listed = ", ".join(f"{count:,} {text}" for text, count in rest.items() if count)
    console.print(
        f"{counts.items:,} items -> {counts.pairs:,} pairs" + (f"; {listed}" if listed else ""),
        style="bold",
    )
    console.print()
    console.print(_raters(report))
    if report.agreement:
        console.print()
        console.print(_agreements(report.agreement))
    if report.alpha is not None:
        console.print(f"Krippendorff's alpha of all raters: {report.alpha:.2f}")
    if report.with_proposal is not None:
        by = ", ".join(report.proposed_by)
        console.print(
            f"\nAs proposed by {by}: {_share(report.with_proposal)} of {report.with_proposal.of:,} "
            f"pairs; {report.pairs_turned:,} turned round"
        )
    for remark in remarks(report):
        console.print(f"warning: {remark}", style="yellow")
    console.print(f"\n{out}  the pairs; {out.name}.json: these numbers")


def _raters(report: RatedReport) -> object:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("rater")
    for column in ("rated", "ties", "skips", "chose A", "as proposed", "kappa"):
        table.add_column(column, justify="right", no_wrap=True)
    for one in report.raters:
        pair = one.with_proposal
        table.add_row(
            one.rater,
            f"{one.rated:,} of {one.given:,}",
            f"{one.ties:,}",
            f"{one.skips:,}",
            _share(one.chose_a),
            _share(pair.agreed if pair else None),
            _kappa(pair),
        )
    return table


def _agreements(pairs: Sequence[PairAgreement]) -> object:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("raters")
    for column in ("items", "agreed", "Cohen's kappa"):
        table.add_column(column, justify="right", no_wrap=True)
    for pair in pairs:
        agreed = _share(pair.agreed)
        table.add_row(", ".join(pair.raters), f"{pair.agreed.of:,}", agreed, _kappa(pair))
    return table


def _share(found: Share | None) -> str:
    if found is None:
        return ""
    return f"{found.value:.0%} ({found.low:.0%} to {found.high:.0%})"


def _kappa(pair: PairAgreement | None) -> str:
    if pair is None:
        return ""
    if pair.kappa is None:
        return "undefined"
    return f"{pair.kappa.value:.2f} ({pair.kappa.low:.2f} to {pair.kappa.high:.2f})"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
