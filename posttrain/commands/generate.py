"""`posttrain generate` and `posttrain adapters`: asking models, and the adapters that there are."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from posttrain.terminal import make_console

if TYPE_CHECKING:
    from posttrain.data.rows import Messages
    from posttrain.finding import Adapter, AdapterFacts, Base
    from posttrain.generation import Answer, Settings

_MODEL = "Model folder, Hub id, gguf:FILE, package:NAME, or a model in the store: STAGE, digits."


def generate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=_MODEL)],
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            metavar="NAME",
            help="Adapter on MODEL: a folder, STAGE or first digits of a fingerprint; `base` is "
            "MODEL without one. Given several times, each answers.",
        ),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", metavar="TEXT", help="What to say to the model.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--file",
            metavar="FILE",
            help="Prompts: a line of a .txt file each, or `prompt` or `messages` of a .jsonl file. "
            "Without --prompt and --file standard input is the prompt.",
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="Longest answer in tokens.")
    ] = 256,
    temperature: Annotated[
        float,
        typer.Option(min=0.0, help="0: the likeliest answer; 1: drawn as is."),
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of what is drawn.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Put prompts to MODEL, to adapters on it, or to both beside each other."""
    from posttrain.console import observer
    from posttrain.finding import find_adapters, find_model
    from posttrain.generation import Settings
    from posttrain.home import Home

    store = Home.find().store
    base = find_model(model, store, observer(make_console(stderr=True, width=140)))
    voices = find_adapters(adapter or ["base"], base, store)
    for voice in voices:
        if voice is not None and voice.doubt is not None:
            typer.echo(f"warning: {voice.doubt}", err=True)
    prompts = _prompts(prompt, file)
    settings = Settings(max_new_tokens, temperature, seed)
    streams = len(prompts) == 1 and sys.stdout.isatty() and not as_json
    answers = _ask(base, voices, prompts, settings, streams)
    if streams:
        return
    if as_json:
        typer.echo(_json(base, settings, answers))
    elif len(answers) == 1:
        typer.echo(answers[0].text)
    else:
        _show_answers(prompts, answers)


def adapters(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="Only those on this model. " + _MODEL)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """List the adapters in the store, oldest first."""
    from posttrain.finding import find_model, list_adapters
    from posttrain.home import Home

    store = Home.find().store
    facts = list_adapters(store, find_model(model, store) if model else None)
    if as_json:
        typer.echo(json.dumps({"adapters": [asdict(one) for one in facts]}, indent=2))
    elif facts:
        _show_adapters(facts)
    else:
        typer.echo("There is no adapter" + (f" on {model}" if model else "") + " in the store.")


# Asking


def _prompts(prompt: str | None, file: Path | None) -> list[Messages]:
    """What is asked.

    Raises:
        UsageError: nothing, or in two ways.
    """
    from posttrain.data.rows import Message
    from posttrain.errors import UsageError
    from posttrain.generation import read_prompts

    if prompt is not None and file is not None:
        raise UsageError("write one of --prompt and --file")
    if file is not None:
        return read_prompts(file)
    if prompt is None:
        if sys.stdin.isatty():
            typer.echo("The prompt, then Ctrl-D:", err=True)
        prompt = sys.stdin.read()
    if not prompt.strip():
        raise UsageError("the prompt is empty: write --prompt TEXT or --file FILE, or pipe a text")
    return [(Message("user", prompt.rstrip("\n")),)]


def _ask(
    base: Base,
    voices: Sequence[Adapter | None],
    prompts: list[Messages],
    settings: Settings,
    streams: bool,
) -> list[Answer]:
    """The answers of each voice to all prompts; on a terminal, seen while they are written."""
    # Libraries read it on import; what bitsandbytes misses is for 4-bit weights alone.
    os.environ.setdefault("TQDM_DISABLE", "1")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from posttrain.generation import Generator
    from posttrain.train.processes import prepare_libraries

    prepare_libraries()
    console = make_console(width=140)
    generator = Generator(base)
    answers = []
    for voice in voices:
        if streams and len(voices) > 1:
            console.print(f"{voice.name if voice else 'base'}:", style="bold")
        for answer in generator.answers(prompts, voice, settings, _write if streams else None):
            if streams:
                typer.echo("\n" if voice is not voices[-1] else "")
            answers.append(answer)
    return answers


def _write(text: str) -> None:
    typer.echo(text, nl=False)
    sys.stdout.flush()


def _json(base: Base, settings: Settings, answers: Sequence[Answer]) -> str:
    from posttrain.data.rows import plain_messages

    listed = [{**asdict(one), "prompt": plain_messages(one.prompt)} for one in answers]
    found = {"model": base.name, "digest": base.digest, **asdict(settings), "answers": listed}
    return json.dumps(found, ensure_ascii=False, indent=2)


def _show_answers(prompts: Sequence[Messages], answers: Sequence[Answer]) -> None:
    """A table with the answers to each prompt below each other."""
    from rich.table import Table

    several = len({answer.adapter for answer in answers}) > 1
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("prompt", overflow="fold", max_width=40)
    if several:
        table.add_column("adapter", overflow="fold", style="bold")
    table.add_column("answer", overflow="fold")
    for prompt in prompts:
        shown = prompt[-1].content
        for answer in answers:
            if answer.prompt is prompt:
                more = " ..." if answer.ended == "length" else ""
                cells = [shown, answer.adapter] if several else [shown]
                table.add_row(*cells, f"{answer.text}{more}")
                shown = ""
        table.add_section()
    make_console(width=140).print(table)


# Listing


def _show_adapters(facts: Sequence[AdapterFacts]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    right = ("rank", "parameters", "size")
    columns = ("fingerprint", "adapter", "type", "rank", "parameters", "held-out loss", "base")
    for column in (*columns, "made", "size"):
        folds = column in ("adapter", "base")
        table.add_column(
            column,
            justify="right" if column in right else "left",
            no_wrap=not folds,
            overflow="fold",
        )
    for one in facts:
        table.add_row(
            one.fingerprint[:12],
            f"{one.recipe}/{one.name}",
            one.type,
            str(one.rank or ""),
            _millions(one.trained_parameters),
            _losses(one),
            one.base.removesuffix(".gguf"),
            one.made[:16].replace("T", " "),
            f"{one.size / 1e6:,.1f} MB",
        )
    make_console(width=140).print(table)


def _losses(one: AdapterFacts) -> str:
    if one.held_out_loss is None:
        return ""
    before = f"{one.held_out_loss_before:.2f} -> " if one.held_out_loss_before is not None else ""
    return f"{before}{one.held_out_loss:.2f}"


def _millions(count: int | None) -> str:
    if count is None:
        return ""
    return f"{count:,}" if count < 100_000 else f"{count / 1e6:.1f}M"
