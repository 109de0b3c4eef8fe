"""``aios-edge infer``: one-shot inference with a bundle, no server."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from aios_edge.cli.refusal import refusal_as_json
from aios_edge.errors import DataError, ProfileError, UsageError

if TYPE_CHECKING:
    from aios_edge.golden import RawInput
    from aios_edge.manifest import Manifest
    from aios_edge.profile import DeviceProfile

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_ENDINGS = (*_DELIMITERS, ".jsonl", ".txt")
#: Files that people name, whether or not a bundle takes what is in them.
_FILE_ENDINGS = (*_ENDINGS, ".npy", ".npz", ".wav", ".jpg", ".jpeg", ".png")


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("inputs", nargs=-1, metavar="[INPUT]...")
@click.option("--file", "file", type=click.Path(path_type=Path), help="Read inputs from a csv, tsv, jsonl or txt file.")
@click.option("--column", "columns", multiple=True, help="Column of a file; twice for pairs.  [default: text]")
@click.option("--profile", "profile_name", help="Device profile, by name or file, for provider and threads.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def infer(
    bundle: Path,
    inputs: tuple[str, ...],
    file: Path | None,
    columns: tuple[str, ...],
    profile_name: str | None,
    as_json: bool,
) -> None:
    """Run a BUNDLE on each INPUT: a text, or for models of pairs two texts with a tab between them.

    An INPUT that is the path of a .csv, .tsv, .jsonl or .txt file is read like --file; any other file, and one that
    doesn't exist, is refused. Without INPUT and --file, each line of standard input is one, and always a text. Inputs
    run one by one, as an agent answers single requests. Without --profile the bundle's own is used if it matches this
    machine, else one thread of its CPU.
    """
    from aios_edge.bundle.read import open_bundle
    from aios_edge.tasks import task_for
    from device_agent.runtime import open_runtime

    if inputs and file is not None:
        raise UsageError("both INPUT and --file were given", remedy="Give one of them")
    for text in inputs:
        _check_input(text)
    if columns and file is None and not any(map(_is_file, inputs)):
        raise UsageError("--column is a column of a file, and none was given", remedy="Add --file FILE")
    with refusal_as_json(as_json):
        opened = open_bundle(bundle)
        manifest = opened.manifest
        raw = list(_raw_inputs(inputs, file, columns, manifest))
        task = task_for(manifest, opened.path)
        runtime = open_runtime(opened, _profile(profile_name, manifest))
        if runtime.provider_reason:
            click.echo(f"running on {runtime.providers_active[0]}: {runtime.provider_reason}", err=True)

        answers: list[dict[str, Any]] = []
        for item in raw:
            (prediction,) = task.decode(runtime.run(task.encode([item])))
            if as_json:
                answers.append(
                    {
                        "input": item,
                        "label": prediction.label,
                        "score": prediction.score,
                        "probabilities": dict(zip(manifest.labels, prediction.probabilities, strict=True)),
                    }
                )
            else:
                shown = item if isinstance(item, str) else "\t".join(item)
                click.echo(f"{prediction.label}\t{prediction.score:.4f}\t{shown}")
    if as_json:
        click.echo(json.dumps(answers, ensure_ascii=False, allow_nan=False))


def _profile(name: str | None, manifest: Manifest) -> DeviceProfile:
    from aios_edge.host import inspect_host, matches
    from aios_edge.profile import DeviceProfile, Provider
    from aios_edge.profile_files import load_profile

    if name is not None:
        return load_profile(name)
    reason: str
    try:
        profile = load_profile(manifest.profile)
        match = matches(profile, inspect_host())
        if match.ok:
            return profile
        reason = "; ".join(match.reasons)
    except ProfileError as error:  # a profile of the exporter's own, which this machine doesn't have
        reason = str(error)
    click.echo(f"profile '{manifest.profile}' is not this machine ({reason}): one CPU thread is used", err=True)
    return DeviceProfile(
        schema="1.0",
        name="one-cpu-thread",
        title="One thread of this machine's CPU",
        arch="any",
        providers=(Provider(name="CPUExecutionProvider"),),
        precision_preference=(manifest.precision,),
        quantization="none",
    )


def _stdin_lines() -> tuple[str, ...]:
    if sys.stdin is None or sys.stdin.isatty():  # None: closed by whoever started us
        raise UsageError("there is no input", remedy="Give INPUT, --file FILE, or pipe lines into standard input")
    return _lines(_decoded(sys.stdin.buffer.read(), "standard input"))


def _lines(content: str) -> tuple[str, ...]:
    """Lines as a text editor shows them. ``str.splitlines`` also breaks at U+0085, U+2028 and form feeds, which
    stand in the middle of real sentences."""
    return tuple(line.rstrip("\r") for line in content.removesuffix("\n").split("\n")) if content else ()


def _parsed(text: str, manifest: Manifest, where: str) -> RawInput:
    """A text, or a pair with a tab between."""
    if not manifest.preprocess.pair:
        return text
    first, tab, second = text.partition("\t")
    if not tab:
        raise UsageError("is one text, this model takes pairs", where=where, remedy="Put a tab between the two texts")
    return first, second


def _raw_inputs(
    inputs: tuple[str, ...], file: Path | None, columns: tuple[str, ...], manifest: Manifest
) -> Iterator[RawInput]:
    if file is not None:
        yield from _from_file(file, columns, manifest)
        return
    for number, text in enumerate(inputs or _stdin_lines(), 1):
        if inputs and _is_file(text):
            yield from _from_file(Path(text), columns, manifest)
        else:
            yield _parsed(text, manifest, f"input {number}")


def _check_input(text: str) -> None:
    """Refuse an INPUT that names a file we can't read: answering to the name would look like an answer to the file."""
    kind = Path(text).suffix.lower()
    if _is_there(text):
        if kind not in _ENDINGS and (kind.strip(".") or "/" in text):  # a plain word may be a file's name by chance
            what = "is a file, and INPUT takes only a .csv, .tsv, .jsonl or .txt file"
            raise UsageError(what, where=text, remedy="Pipe its lines into standard input, if it holds text")
    elif kind in _FILE_ENDINGS and not any(map(str.isspace, text)):
        raise UsageError("does not exist", where=text, remedy="To classify such a word, pipe it into standard input")


def _is_file(text: str) -> bool:
    """Whether an INPUT is a file that we read."""
    return Path(text).suffix.lower() in _ENDINGS and _is_there(text)


def _is_there(text: str) -> bool:
    try:
        return Path(text).is_file()
    except OSError:  # longer than a path may be
        return False


def _from_file(path: Path, columns: tuple[str, ...], manifest: Manifest) -> Iterator[RawInput]:
    pair = manifest.preprocess.pair
    names = columns or (("text", "text_pair") if pair else ("text",))
    if len(names) != (2 if pair else 1):
        raise UsageError(f"this model takes {2 if pair else 1} column(s), {len(names)} were given with --column")
    kind = path.suffix.lower()
    if kind not in _ENDINGS:
        raise UsageError(
            f"this bundle takes text, which {kind or 'a file without an ending'} doesn't hold",
            where=str(path),
            remedy="Give a .csv, .tsv, .jsonl or .txt file",
        )
    try:
        content = _decoded(path.read_bytes(), str(path))
    except FileNotFoundError as error:
        raise UsageError("does not exist", where=str(path)) from error
    if kind == ".txt":
        for number, line in enumerate(_lines(content), 1):
            yield _parsed(line, manifest, f"{path}, line {number}")
        return
    rows = _json_rows(content, path) if kind == ".jsonl" else _table_rows(content, path, _DELIMITERS[kind])
    for number, row in rows:
        texts: list[str] = []
        for name in names:
            if not isinstance(text := row.get(name), str):
                has = ", ".join(str(key) for key in row if key is not None)
                what = f"line {number} has no text in column {name!r}"
                raise DataError(what, where=str(path), remedy=f"It has {has}; choose with --column")
            texts.append(text)
        yield (texts[0], texts[1]) if pair else texts[0]


def _table_rows(content: str, path: Path, delimiter: str) -> Iterator[tuple[int, dict[str, Any]]]:
    # newline handling is csv's, so that a quoted field may hold line breaks
    reader = csv.DictReader(io.StringIO(content, newline=""), delimiter=delimiter, strict=True)
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise DataError(
            f"line {reader.reader.line_num}: {error}", where=str(path), remedy="Fix the line's quotes"
        ) from error


def _json_rows(content: str, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(f"line {number} is not JSON ({error})", where=str(path)) from error
        if not isinstance(row, dict):
            raise DataError(f"line {number} is not a JSON object", where=str(path))
        yield number, row


def _decoded(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"line {line} is not UTF-8", where=where, remedy="Convert it with iconv") from error
